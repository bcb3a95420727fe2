"""What a rule may keep and read: decimal fractions, bases, places and metadata values."""

import logging
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipeline.step import Keep, as_text, asked, places_in, table_numbers, table_texts
from tests import steps


@pytest.mark.parametrize(
    ("keep", "base", "expected"),
    [
        (0.29, 100, 29),  # in binary 28.999999999999996
        (0.57, 100, 57),
        (0.15, 12_800_000, 1_920_000),
        (0.1, 9, 0),
        (1.0, 7, 7),
        (1e-07, 10**8, 10),
        (0.3333333333333333, 3, 0),
        (2, 100, 2),
        (1000, 3, 1000),
    ],
)
def test_a_fraction_is_taken_as_written_and_rounded_down(keep, base, expected):
    assert asked(keep, base) == expected


@given(st.integers(1, 9999), st.integers(0, 10**10))
def test_a_fraction_of_four_digits_is_exact(parts, base):
    assert asked(parts / 10000, base) == parts * base // 10000


@pytest.mark.parametrize("keep", [0, 1, -3, 0.0, 1.0000001, -0.5, True, math.nan, "0.5"])
def test_keep_is_a_fraction_or_a_count(keep):
    with pytest.raises(ValidationError):
        TypeAdapter(Keep).validate_python(keep, strict=True)


@pytest.mark.parametrize("keep", [2, 10**9, 1.0, 1e-9])
def test_good_values_of_keep_stay_as_they_are(keep):
    found = TypeAdapter(Keep).validate_python(keep, strict=True)
    assert (found, type(found)) == (keep, type(keep))


def test_the_base_is_the_pool_or_what_entered_and_more_than_there_is_warns(caplog):
    step = steps.step_of(steps.memory_run(), [steps.samples_of({}, {}, {"problem": "bad_metadata"}), steps.uids(7)])
    assert (step.listed, step.survivors) == (4, 3)
    assert (step.base("pool"), step.base("survivors")) == (4, 3)
    with caplog.at_level(logging.WARNING):
        assert (step.budget(0.5, "pool"), step.budget(0.5, "survivors"), step.budget(3, "pool")) == (2, 1, 3)
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert step.budget(4, "survivors") == step.budget(1.0, "pool") == 3
    warned = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert warned == ["01-rule: 4 samples asked for, 3 are left: all are kept"] * 2


def test_places_count_units_over_groups_and_rows_in_units():
    run = steps.memory_run()
    step = steps.step_of(run, [steps.uids(1, 2), steps.uids(), steps.uids(3), steps.uids(4)], group_units=3)
    groups = [
        (run.rows(rows), run.rows(place)) for rows, place in zip(step.samples.parts, step.places.parts, strict=True)
    ]
    found = [
        [list(map(int, at)) for at in places_in(*group, np.array(rows))]
        for group, rows in zip(groups, [[0, 1, 2], [0]], strict=True)
    ]
    assert found == [[[0, 0, 2], [0, 1, 0]], [[3], [0]]]
    assert [at.tolist() for at in places_in(*groups[0], np.array([2, 1]))] == [[2, 0], [0, 1]]


@pytest.mark.parametrize(
    ("column", "numbers"),
    [
        (pa.array([1, None, -3]), [1.0, math.nan, -3.0]),
        (pa.array([0.5, math.nan, None, math.inf]), [0.5, math.nan, math.nan, math.inf]),
        (pa.array([0.5, None], pa.float16()), [0.5, math.nan]),
        (pa.array([True, False, None]), [1.0, 0.0, math.nan]),
        (pa.array(["0.25", " 3 ", "a", "", None, "1e3"]), [0.25, 3.0, math.nan, math.nan, math.nan, 1000.0]),
        (pa.array([2**63], pa.uint64()), [2.0**63]),
        (pa.array([150], pa.decimal128(5, 2)).cast(pa.decimal128(5, 2)), [150.0]),
        (pa.array([b"1"]), [math.nan]),
        (pa.array([[1.0]]), [math.nan]),
        (pa.nulls(2), [math.nan, math.nan]),
    ],
)
def test_numbers_of_any_column(column, numbers):
    np.testing.assert_array_equal(table_numbers(pa.table({"x": column}), "x"), np.array(numbers))
    assert np.isnan(table_numbers(pa.table({"x": column}), "y")).all()


def test_texts_of_any_column():
    table = pa.table({"x": [True, False, None], "n": [3, None, 4], "s": ["En", "", None], "f": [3.0, 0.5, None]})
    assert table_texts(table, "x") == ["true", "false", None]
    assert table_texts(table, "n") == ["3", None, "4"]
    assert table_texts(table, "s") == ["En", "", None]
    assert table_texts(table, "f") == ["3", "0.5", None]
    assert table_texts(table, "none") == [None] * 3


def test_values_compare_as_a_reader_sees_them():
    assert [as_text(v) for v in (True, 3, 3.0, 2.5, "True", "3.0")] == ["true", "3", "3", "2.5", "True", "3.0"]
