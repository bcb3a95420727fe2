"""Charts: numbers at the right places."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import charts


def attributes(svg: str, kind: str, name: str) -> list[float]:
    """One attribute of every element of a class."""
    return [float(v) for v in re.findall(rf'class="{kind}"[^>]*? {name}="([-0-9.]+)"', svg)]


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_ticks_lie_inside_their_range_evenly_and_are_few(low: float, span: float) -> None:
    high = low + span
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-6 * span <= v <= high + 1e-6 * span for v in found)
    gaps = [b - a for a, b in pairwise(found)]
    assert all(abs(g - gaps[0]) <= 1e-6 * span for g in gaps)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (-0.5, "−0.5"), (12000, "12,000"), (1.5e9, "1.5e+09"), (7.0, "7")]
)
def test_a_number_is_short(value: float, text: str) -> None:
    assert charts.number(value) == text


def test_a_histogram_draws_bars_as_high_as_their_rows_and_the_threshold_where_it_is() -> None:
    svg = charts.histogram(0.0, 1.0, [10, 40], [0, 20], 0.5)
    before, after = (attributes(svg, kind, "height") for kind in ("before", "after"))
    assert before[1] / before[0] == pytest.approx(4, abs=0.01) and after == pytest.approx([before[1] / 2], abs=0.1)
    (line,) = attributes(svg, "threshold", "x1")
    assert line == pytest.approx(attributes(svg, "before", "x")[1])
    assert "threshold 0.5" in svg


def test_a_threshold_outside_the_scores_is_not_drawn() -> None:
    assert "threshold" not in charts.histogram(0.0, 1.0, [1], [1], 1.5)
    assert "threshold" not in charts.histogram(0.0, 1.0, [1], [1], None)


def test_a_scatter_gives_four_times_the_members_twice_the_radius_and_more_kept_a_later_shade() -> None:
    points = [
        {"cluster": 1, "d_intra": 0.1, "d_inter": 0.9, "size": 400, "share": 0.05},
        {"cluster": 2, "d_intra": 0.3, "d_inter": 0.5, "size": 100, "share": 1.0},
    ]
    svg = charts.scatter(points)
    (first,), (second,) = attributes(svg, "s0", "r"), attributes(svg, "s4", "r")
    assert first == 2 * second
    (left,), (right,) = attributes(svg, "s0", "cx"), attributes(svg, "s4", "cx")
    (top,), (bottom,) = attributes(svg, "s0", "cy"), attributes(svg, "s4", "cy")
    assert left < right and top < bottom


def test_many_clusters_are_drawn_smaller_but_never_too_small_to_see() -> None:
    found = [charts.largest_radius(n) for n in (1, 60, 240, 100_000)]
    assert found == [13, 13, 6.5, 3.5]


def test_one_cluster_alone_and_one_value_alone_are_drawn() -> None:
    svg = charts.scatter([{"cluster": 0, "d_intra": 0.1, "d_inter": 0.0, "size": 1, "share": 0.5}])
    assert "<circle" in svg and "nan" not in svg
    assert "<polyline" in charts.sparkline([0.5])


def test_a_sparkline_falls_where_the_values_fall() -> None:
    first, last = re.search(r'points="[\d.]+,([\d.]+) .*,([\d.]+)"', charts.sparkline([3.0, 2.0, 1.0])).groups()  # type: ignore[union-attr]
    assert float(first) < float(last)
