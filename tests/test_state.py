"""Decisions so far: what a step may change, what it may not, and the counts that come with it."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import SchemaError
from pipeline.schema import ALIVE, DROPPED, PROBLEM, STATE, UID
from pipeline.state import Begin, drop, dropped_table, reasons
from tests import steps

TWIN = bytes(range(16))


def state(*dropped_by):
    return pa.table({"dropped_by": pa.array(dropped_by, pa.uint8())}, STATE)


def mask(*rows):
    return np.array(rows, bool)


def test_a_step_writes_down_what_it_drops_and_leaves_all_else_alone():
    before = state(0, 1, 0, PROBLEM)
    made = drop(before, 2, mask(1, 0, 0, 0), [4], "duplicate", pa.array([0.9]), 0.85, pa.array([TWIN], UID))
    assert (made.tables["state"].schema, made.tables["dropped"].schema) == (STATE, DROPPED)
    assert made.tables["state"].column("dropped_by").to_pylist() == [2, 1, 0, PROBLEM]
    told = {"reason": "duplicate", "value": 0.9, "threshold": 0.85, "duplicate_of": TWIN}
    assert made.tables["dropped"].to_pylist() == [told]


def test_reasons_and_thresholds_may_differ_from_row_to_row():
    reason, bound = pa.array(["a", "b"]), pa.array([None, 0.1])
    told = drop(state(0, 0), 3, mask(1, 1), [2], reason, pa.array([0.0, None]), bound).tables["dropped"]
    found = [(r["reason"], r["value"], r["threshold"], r["duplicate_of"]) for r in told.to_pylist()]
    assert found == [("a", 0.0, None, None), ("b", None, 0.1, None)]


def test_a_row_is_dropped_once():
    with pytest.raises(SchemaError, match="step 2 drops rows that are not alive"):
        drop(state(0, 1), 2, mask(1, 1), [2], "again")


def test_counts_are_of_this_step_alone_and_by_unit():
    before = state(0, 1, 0, 0, PROBLEM)
    assert drop(before, 2, mask(0, 0, 1, 1, 0), [2, 0, 3], pa.array(["low", "high"])).facts == {
        "entered": 3,
        "alive": 1,
        "dropped": {"high": 1, "low": 1},
        "alive_by_unit": [1, 0, 0],
    }


@pytest.mark.parametrize("lengths", [[1], [3], [1, 2]])
def test_a_lost_row_is_noticed(lengths):
    with pytest.raises(SchemaError, match=f"step 1: 2 rows in, 2 judged, {sum(lengths)} listed"):
        drop(state(0, 0), 1, mask(0, 1), lengths, "x")
    with pytest.raises(SchemaError, match="step 1: 2 rows in, 3 judged, 2 listed"):
        drop(state(0, 0), 1, mask(1, 0, 0), [2], "x")


@pytest.mark.parametrize(
    "columns",
    [
        {"reason": pa.array(["x"])},
        {"reason": "x", "value": pa.array([1.0])},
        {"reason": "x", "value": pa.array([1, 2])},  # not float64
    ],
)
def test_a_reason_too_few_is_noticed(columns):
    with pytest.raises(SchemaError, match="2 rows are dropped, and told of: "):
        drop(state(0, 0), 1, mask(1, 1), [2], **columns)


def test_every_row_finds_its_reason_again():
    by_N = np.array([2, 0, PROBLEM, 1, 2], np.uint8)
    twins = pa.array([TWIN, None], UID)
    told = [
        dropped_table(1, pa.array(["bad_vector"])),
        dropped_table(1, "low_score", pa.array([0.1]), 0.2),
        dropped_table(2, pa.array(["duplicate", "other"]), pa.array([0.9, None]), pa.array([0.8, 0.7]), twins),
    ]
    found = reasons(by_N, told)
    assert found.schema.names == DROPPED.names and found.schema.field("reason").type == pa.string()
    assert [tuple(row.values()) for row in found.to_pylist()] == [
        ("duplicate", 0.9, 0.8, TWIN),
        (None, None, None, None),
        ("bad_vector", None, None, None),
        ("low_score", 0.1, 0.2, None),
        ("other", None, 0.7, None),
    ]
    with pytest.raises(SchemaError, match="step 2 dropped 2 rows, and says why of 1"):
        reasons(by_N, [*told[:2], told[2].slice(1)])


def test_problems_of_reading_come_before_those_of_the_models_in_order():
    run = steps.memory_run()
    samples = steps.samples_of({"problem": "missing_caption"}, {}, {}, {})
    first, second = (steps.evidence_of(np.ones((4, 2))) for _ in range(2))
    first = first.set_column(3, "problem", pa.array(["unreadable_image", "bad_vector", None, None], pa.string()))
    second = second.set_column(3, "problem", pa.array([None, "unreadable_image", "bad_vector", None], pa.string()))
    made = run.map(Begin(), *(steps.stored(run, [table]) for table in (samples, first, second)))
    state, dropped = (run.rows(made[name].parts[0]).table() for name in ("state", "dropped"))
    assert state.column("dropped_by").to_pylist() == [PROBLEM, PROBLEM, PROBLEM, ALIVE]
    assert dropped.column("reason").to_pylist() == ["missing_caption", "bad_vector", "bad_vector"]
    assert next(made["state"].facts()) == {
        "entered": 4,
        "alive": 1,
        "dropped": {"bad_vector": 2, "missing_caption": 1},
        "alive_by_unit": [1],
    }
