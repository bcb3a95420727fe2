"""filter: DataComp's basic filter worked by hand, every reason, and values of every type and absence."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.machine import Machine
from pipeline.select.filter import Column, Filter, Language
from tests import steps

BASIC = Filter(min_words=3, min_chars=6, min_side_px=200, max_aspect=3.0)


def judged(rule, samples, columns=None):
    own = pa.table({"none": pa.nulls(samples.num_rows)}) if columns is None else pa.table(columns)
    return rule.build(Machine())(samples, own)


def reasons(rule, samples, columns=None):
    return judged(rule, samples, columns).reason.to_pylist()


def by_column(bounds, values):
    return reasons(Filter(columns={"x": bounds}), steps.samples_of(*[{}] * len(values)), {"x": values})


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a b c", "min_chars"),
        ("a b cd", None),
        ("one two", "min_words"),
        ("aaaaaa", "min_words"),
        ("a  b\tc d", None),
        ("ä ö\u3000üß", None),  # six code points, of more bytes; an ideographic space parts words too
        ("", "min_words"),
    ],
)
def test_captions_of_datacomp_s_basic_filter(caption, reason):
    sample = steps.samples_of({"caption": caption, "width": 300, "height": 300})
    assert reasons(BASIC, sample) == [reason]


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (200, 200, None),
        (600, 200, None),
        (200, 600, None),
        (601, 200, "max_aspect"),
        (200, 601, "max_aspect"),
        (199, 199, "min_side_px"),
        (400, 199, "min_side_px"),
        (0, 0, "min_side_px"),
    ],
)
def test_sizes_of_datacomp_s_basic_filter(width, height, reason):
    sample = steps.samples_of({"caption": "one two three", "width": width, "height": height})
    assert reasons(BASIC, sample) == [reason]


def test_a_quotient_that_rounds_up_is_still_the_bound():
    # 1.1 x 10 is 11, although 11 / 10 > 1.1 would hold for some such pairs in binary
    sides = [(11, 10), (33, 30), (110, 100), (111, 100)]
    samples = steps.samples_of(*({"width": w, "height": h} for w, h in sides))
    assert reasons(Filter(max_aspect=1.1), samples) == [None, None, None, "max_aspect"]
    assert reasons(Filter(max_aspect=1), steps.samples_of({"width": 7, "height": 7})) == [None]


@pytest.mark.parametrize(
    ("sides", "reason"),
    [
        ({"width": 10, "height": 10, "original_width": 500, "original_height": 400}, None),
        ({"width": 500, "height": 400, "original_width": 10, "original_height": 10}, "min_side_px"),
        ({"width": 500, "height": 400, "original_width": 10}, None),  # half an original is none
        ({"width": 500, "height": 400, "original_height": 10}, None),
        ({"original_width": 500, "original_height": 400}, None),
        ({"width": 500}, "missing_min_side_px"),
        ({"height": 500, "original_width": 700}, "missing_min_side_px"),
    ],
)
def test_the_original_sides_come_before_the_stored_ones(sides, reason):
    assert reasons(BASIC, steps.samples_of({"caption": "one two three", **sides})) == [reason]


def test_values_and_thresholds_are_those_of_the_reason():
    samples = steps.samples_of(
        {"caption": "one two", "width": 100, "height": 100},
        {"caption": "a b c", "width": 100, "height": 100},
        {"caption": "one two three", "width": 100, "height": 500},
        {"caption": "one two three", "width": 200, "height": 500},
        {"caption": "one two three", "width": 200, "height": 900},
        {"caption": None, "width": 1, "height": 1},
    )
    verdict = judged(BASIC, samples)
    found = list(zip(*(v.to_pylist() for v in (verdict.reason, verdict.value, verdict.threshold)), strict=True))
    assert found == [
        ("min_words", 2, 3),
        ("min_chars", 5, 6),
        ("min_side_px", 100, 200),
        (None, None, None),
        ("max_aspect", 4.5, 3),
        ("missing_min_words", None, None),
    ]


def test_a_sample_without_the_value_is_dropped_as_missing():
    bare = steps.samples_of({})
    assert reasons(Filter(min_words=0), bare) == ["missing_min_words"]
    assert reasons(Filter(min_chars=0), bare) == ["missing_min_chars"]
    assert reasons(Filter(min_side_px=0), bare) == ["missing_min_side_px"]
    assert reasons(Filter(max_aspect=9), bare) == ["missing_max_aspect"]
    assert reasons(Filter(language=Language(keep=["en"], column="lang")), bare) == ["missing_language"]
    assert reasons(Filter(columns={"x": Column(min=0)}), bare) == ["missing_x"]
    assert reasons(Filter(columns={"x": Column(equals="a")}), bare) == ["missing_x"]


@pytest.mark.parametrize(
    "values", [[1, 2, 3, None], [1.0, 2.0, 3.0, np.nan], ["1", "2.0", " 3", "x"], ["1", "2", "3", None]]
)
def test_a_column_within_bounds_that_are_kept_themselves(values):
    assert by_column(Column(min=2), values) == ["columns.x", None, None, "missing_x"]
    assert by_column(Column(max=2), values) == [None, None, "columns.x", "missing_x"]
    assert by_column(Column(min=2, max=2), values) == ["columns.x", None, "columns.x", "missing_x"]


def test_columns_are_compared_in_float64():
    below = float(np.nextafter(0.3, 0))
    assert by_column(Column(min=0.3), [0.3, below]) == [None, "columns.x"]


@pytest.mark.parametrize(
    ("equals", "values", "expected"),
    [
        (True, [True, False, None], [None, "columns.x", "missing_x"]),
        (3, [3, 4, None], [None, "columns.x", "missing_x"]),
        (3, [3.0, 4.0, None], [None, "columns.x", "missing_x"]),
        ("en", ["en", "EN", None], [None, "columns.x", "missing_x"]),
        ("", ["", " ", None], [None, "columns.x", "missing_x"]),
    ],
)
def test_a_column_equal_to_a_value_of_any_type(equals, values, expected):
    assert by_column(Column(equals=equals), values) == expected


def test_a_column_that_must_not_be_one_of_several():
    assert by_column(Column(not_in=["a", 3, True]), ["a", "b", "3", "true", None]) == [
        "columns.x", None, "columns.x", "columns.x", "missing_x",
    ]  # fmt: skip
    assert by_column(Column(not_in=[3]), [3, 4, None]) == ["columns.x", None, "missing_x"]


def test_languages_by_the_pool_s_own_column():
    rule = Filter(language=Language(keep=["en", "de"], column="lang"))
    found = reasons(rule, steps.samples_of({}, {}, {}, {}), {"lang": ["en", "fr", None, "de"]})
    assert found == [None, "language", "missing_language", None]


def test_columns_that_a_rule_uses_and_their_types():
    rule = Filter(
        language=Language(keep=["en"], column="lang"),
        columns={"a": Column(min=1), "b": Column(equals=1), "c": Column(max=1, not_in=["x"])},
    )
    found = {name: str(kind) for name, kind in rule.uses_columns().items()}
    assert found == {"a": "double", "b": "string", "c": "string", "lang": "string"}
    assert BASIC.uses_columns() == {}


def test_overlaps_count_every_condition_that_survivors_fail_but_drops_only_the_first():
    captions = ["one", "a b c", "a b", "a fine caption", None, "one"]
    rows = [{"caption": c, "width": 10, "height": 10 * (n + 1)} for n, c in enumerate(captions)]
    rows[5]["problem"] = "bad_metadata"
    step = steps.step_of(
        steps.memory_run(),
        [steps.samples_of(*rows[:2]), steps.samples_of(), steps.samples_of(*rows[2:])],
        group_units=3,
    )
    outcome = Filter(min_words=3, min_chars=6, max_aspect=2).apply(step)
    assert steps.kept(step, outcome) == []
    [facts] = outcome.state.facts()
    assert facts["overlap"] == {
        "max_aspect": 1,
        "min_chars": 1,
        "min_words+min_chars": 1,
        "min_words+min_chars+max_aspect": 2,
    }
    assert facts["dropped"] == {"max_aspect": 1, "min_chars": 1, "min_words": 2, "missing_min_words": 1}
    assert facts["alive_by_unit"] == [0, 0, 0]


def test_a_filter_sees_the_survivors_only_and_units_may_lack_the_column():
    step = steps.step_of(
        steps.memory_run(),
        [steps.samples_of({}, {"problem": "bad_metadata"}), steps.samples_of({})],
        columns=[pa.table({"x": [5, 0]}), pa.table({"y": [5]})],
        group_units=2,
    )
    outcome = Filter(columns={"x": Column(min=1)}).apply(step)
    assert [v[0] for v in steps.verdicts(step, outcome)] == [None, "earlier", "missing_x"]
    assert next(outcome.state.facts())["overlap"] == {"columns.x": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Filter(), "filter needs at least one bound"),
        (lambda: Column(), "give at least one of min, max, equals, not_in"),
        (lambda: Filter(min_words=-1), "greater than or equal to 0"),
        (lambda: Filter(max_aspect=0.5), "greater than or equal to 1"),
    ],
)
def test_a_filter_without_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
