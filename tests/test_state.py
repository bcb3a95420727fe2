"""Decisions so far: what a step may change, what it may not, and the counts that come with it."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import SchemaError
from pipeline.schema import ALIVE, PROBLEM, STATE, UID
from pipeline.state import Begin, alive, drop, made
from tests import steps

TWIN = bytes(range(16))


def state(*dropped_by):
    rows = [
        {"dropped_by": by, "reason": "earlier" if by else None, "value": 0.5 if by else None, "threshold": None}
        for by in dropped_by
    ]
    return pa.Table.from_pylist(rows, schema=STATE)


def mask(*rows):
    return np.array(rows, bool)


def test_a_step_writes_down_what_it_drops_and_leaves_all_else_alone():
    before = state(0, 1, 0, PROBLEM)
    value = pa.array([0.9, 0.8, 0.7, 0.6])
    twin = pa.array([TWIN] * 4, UID)
    after = drop(before, 2, mask(1, 0, 0, 0), "duplicate", value, pa.scalar(0.85), twin)
    assert after.schema == STATE
    assert after.to_pylist() == [
        {"dropped_by": 2, "reason": "duplicate", "value": 0.9, "threshold": 0.85, "duplicate_of": TWIN},
        *before.to_pylist()[1:],
    ]
    assert alive(after).tolist() == [False, False, True, False]


def test_reasons_and_thresholds_may_differ_from_row_to_row():
    reason, bound = pa.array(["a", "b"]), pa.array([None, 0.1])
    after = drop(state(0, 0), 3, mask(1, 1), reason, pa.array([0.0, None]), bound)
    found = [(r["reason"], r["value"], r["threshold"], r["duplicate_of"]) for r in after.to_pylist()]
    assert found == [("a", 0.0, None, None), ("b", None, 0.1, None)]


def test_a_row_is_dropped_once():
    with pytest.raises(SchemaError, match="step 2 drops rows that are not alive"):
        drop(state(0, 1), 2, mask(1, 1), "again")
    with pytest.raises(SchemaError, match="3 of 2 rows"):
        drop(state(0, 0), 2, mask(1, 0, 0), "more")


def test_counts_are_of_this_step_alone_and_by_unit():
    before = state(0, 1, 0, 0, PROBLEM)
    after = drop(before, 2, mask(0, 0, 1, 1, 0), pa.array(["z", "z", "low", "high", "z"]))
    assert made(before, after, [2, 0, 3]).facts == {
        "entered": 3,
        "alive": 1,
        "dropped": {"high": 1, "low": 1},
        "alive_by_unit": [1, 0, 0],
    }


@pytest.mark.parametrize("lengths", [[1], [3], [1, 2]])
def test_a_lost_row_is_noticed(lengths):
    with pytest.raises(SchemaError, match=f"2 rows in, 2 out, {sum(lengths)} listed"):
        made(state(0, 0), state(0, 0), lengths)
    with pytest.raises(SchemaError, match="2 rows in, 1 out, 2 listed"):
        made(state(0, 0), state(0), [2])


def test_problems_of_reading_come_before_those_of_the_models_in_order():
    run = steps.memory_run()
    samples = steps.samples_of({"problem": "missing_caption"}, {}, {}, {})
    first, second = (steps.evidence_of(np.ones((4, 2))) for _ in range(2))
    first = first.set_column(3, "problem", pa.array(["unreadable_image", "bad_vector", None, None], pa.string()))
    second = second.set_column(3, "problem", pa.array([None, "unreadable_image", "bad_vector", None], pa.string()))
    state = run.map(Begin(), *(steps.stored(run, [table]) for table in (samples, first, second)))["state"]
    rows = run.rows(state.parts[0]).table()
    assert rows.column("dropped_by").to_pylist() == [PROBLEM, PROBLEM, PROBLEM, ALIVE]
    assert rows.column("reason").to_pylist() == ["missing_caption", "bad_vector", "bad_vector", None]
    assert next(state.facts()) == {"entered": 1, "alive": 1, "dropped": {}, "alive_by_unit": [1]}
