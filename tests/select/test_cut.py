"""cut: the highest scores, exactly so many or all above a bound, with ties and missing scores by the rules."""

import itertools
import json
import logging
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.select.cut import Cut
from tests import steps

LOW, NONE = "low_score", "no_score"


def cut(rule, scores, uids=None, problem=None):
    """The step and its outcome on one unit of rows with these scores of the model `clip`."""
    rows = [{"uid": (n if uids is None else uids[n]).to_bytes(16, "big")} for n in range(len(scores))]
    for row in problem or ():
        rows[row]["problem"] = "bad_metadata"
    step = steps.step_of(
        steps.memory_run(), [steps.samples_of(*rows)], evidence={"clip": [steps.scores_of(*scores)]}, name="01-cut"
    )
    return step, rule.apply(step)


def column(rule, values, *more):
    """The same by a metadata column; `more` are the columns of further units."""
    tables = [values if isinstance(values, pa.Table) else pa.table({"s": values}) for values in (values, *more)]
    samples = [steps.uids(*range(100 * i, 100 * i + t.num_rows)) for i, t in enumerate(tables)]
    step = steps.step_of(steps.memory_run(), samples, columns=tables)
    return step, rule.apply(step)


def test_the_highest_are_kept_and_the_rest_told_the_lowest_score_kept():
    step, outcome = cut(Cut("clip", keep=2), [0.1, 0.4, 0.2, 0.3])
    low = float(np.float32(0.3))
    assert steps.kept(step, outcome) == [1, 3]
    assert steps.verdicts(step, outcome) == [
        (LOW, float(np.float32(0.1)), low),
        (None, None, None),
        (LOW, float(np.float32(0.2)), low),
        (None, None, None),
    ]
    assert json.loads(outcome.files["cut.json"]) == {"base": 4, "asked": 2, "kept": 2, "threshold": low}


def test_a_fraction_is_of_the_decimal_as_written():
    scores = [n / 256 for n in range(100)]
    step, outcome = cut(Cut("clip", keep=0.29), scores)
    assert steps.kept(step, outcome) == list(range(71, 100))


def test_a_fraction_of_the_pool_counts_every_listed_sample():
    scores = [None, None, 0.1, 0.2, 0.3, 0.4]
    step, outcome = cut(Cut("clip", keep=0.5, of="pool"), scores, problem=[0, 1])
    assert steps.kept(step, outcome) == [3, 4, 5]
    assert json.loads(outcome.files["cut.json"])["base"] == 6
    step, outcome = cut(Cut("clip", keep=0.5), scores, problem=[0, 1])
    assert steps.kept(step, outcome) == [4, 5]
    assert json.loads(outcome.files["cut.json"])["base"] == 4


@pytest.mark.goal("R13")
def test_rows_without_a_score_go_first_and_never_fill_a_quota(caplog):
    with caplog.at_level(logging.WARNING):
        step, outcome = cut(Cut("clip", keep=3), [0.2, None, math.nan, math.inf, -math.inf, -0.5])
        assert steps.kept(step, outcome) == [0, 5]
        assert [v[:2] for v in steps.verdicts(step, outcome)[1:5]] == [(NONE, None)] * 4
        assert json.loads(outcome.files["cut.json"]) == {"base": 6, "asked": 3, "kept": 2, "threshold": -0.5}


def test_more_than_there_are_keeps_them_all_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        step, outcome = cut(Cut("clip", keep=9), [0.2, 0.1])
    assert steps.kept(step, outcome) == [0, 1]
    assert caplog.messages == ["01-cut: 9 samples asked for, 2 are left: all are kept"]


def test_ties_go_to_the_lower_uid_then_to_the_earlier_row():
    step, outcome = cut(Cut("clip", keep=3), [0.5, 0.5, 0.5, 0.5, 0.4], uids=[7, 3, 7, 9, 1])
    assert steps.kept(step, outcome) == [0, 1, 2]
    step, outcome = cut(Cut("clip", keep=2), [0.5, 0.5, 0.5, 0.5, 0.4], uids=[7, 3, 7, 9, 1])
    assert steps.kept(step, outcome) == [0, 1]


def test_a_bound_is_kept_itself_and_compared_in_float64():
    step, outcome = column(Cut("column:s", min=0.28), [0.28, np.nextafter(0.28, 0), 0.3, None])
    assert steps.kept(step, outcome) == [0, 2]
    assert steps.verdicts(step, outcome)[1:] == [
        (LOW, float(np.nextafter(0.28, 0)), 0.28),
        (None, None, None),
        (NONE, None, 0.28),
    ]
    expected = {"base": 4, "asked": None, "kept": 2, "threshold": 0.28}
    assert json.loads(outcome.files["cut.json"]) == expected
    # The model's score is a float32, and 0.1 as a float32 lies above 0.1.
    step, outcome = cut(Cut("clip", min=0.1), [0.1, 0.3])
    assert steps.kept(step, outcome) == [0, 1]
    step, outcome = cut(Cut("clip", min=float(np.float32(0.3)) + 1e-12), [0.1, 0.3])
    assert steps.kept(step, outcome) == []


def test_a_column_is_ranked_in_float64_whatever_its_type_in_each_shard():
    close = [0.5, 0.5 + 2.0**-50, 0.5 - 2.0**-50]
    step, outcome = column(Cut("column:s", keep=2), close)
    assert steps.kept(step, outcome) == [0, 1]
    assert json.loads(outcome.files["cut.json"])["threshold"] == 0.5
    step, outcome = column(
        Cut("column:s", keep=4), ["3", "x", None, "1e1"], [7, 2, None], pa.table({"t": [99, 99]}), [True, False]
    )
    assert steps.kept(step, outcome) == [0, 3, 4, 5]
    assert [v[0] for v in steps.verdicts(step, outcome)] == [
        None, NONE, NONE, None, None, None, NONE, NONE, NONE, LOW, LOW,
    ]  # fmt: skip


def test_a_cut_that_keeps_nothing_has_no_threshold():
    step, outcome = cut(Cut("clip", keep=0.1), [0.5, 0.4])
    assert steps.verdicts(step, outcome) == [(LOW, 0.5, None), (LOW, float(np.float32(0.4)), None)]
    expected = {"base": 2, "asked": 0, "kept": 0, "threshold": None}
    assert json.loads(outcome.files["cut.json"]) == expected


@settings(max_examples=25)
@given(st.lists(st.sampled_from([None, 0.25, -0.25, 0.0, -0.0, 0.75]), min_size=1, max_size=24), st.data())
def test_a_cut_equals_a_sort_for_any_split_into_units_and_groups(scores, data):
    keep = data.draw(st.integers(2, 26))
    ends = [0, *sorted(data.draw(st.lists(st.integers(0, len(scores)), max_size=3))), len(scores)]
    uids = data.draw(st.lists(st.integers(0, 3), min_size=len(scores), max_size=len(scores)))
    parts = list(itertools.pairwise(ends))
    step = steps.step_of(
        steps.memory_run(),
        [steps.uids(*uids[a:b]) for a, b in parts],
        evidence={"clip": [steps.scores_of(*scores[a:b]) for a, b in parts]},
        group_units=data.draw(st.integers(1, 3)),
    )
    have = [row for row, score in enumerate(scores) if score is not None]
    expected = sorted(have, key=lambda row: (-scores[row], uids[row], row))[:keep]
    assert steps.kept(step, Cut("clip", keep=keep).apply(step)) == sorted(expected)
