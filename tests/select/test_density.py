"""Density kernels: the published worked case, the optimality condition, and slow references in fractions."""

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.select import density

COMPLEXITY = np.array([0.1, 0.1, 0.03, 0.3])
LOW = np.array([1, 1, 1, 1])
HIGH = np.array([100, 100, 100, 20])


@st.composite
def shares(draw, largest=12):
    """target, low, high, total that can be shared."""
    k = draw(st.integers(1, 6))
    low = draw(st.lists(st.integers(0, 3), min_size=k, max_size=k))
    high = [a + draw(st.integers(0, largest)) for a in low]
    target = draw(st.lists(st.floats(0, 3 * largest), min_size=k, max_size=k))
    total = draw(st.integers(sum(low), sum(high)))
    return np.array(target), np.array(low), np.array(high), total


def projection_in_fractions(target, low, high, total):
    """By the definition, exactly: try the shift between each two bends of the sum."""
    target = [Fraction(t) for t in target.tolist()]
    bounds = list(zip(target, map(int, low), map(int, high), strict=True))
    bends = sorted({b - t for t, lo, hi in bounds for b in (lo, hi)})

    def quotas(shift):
        return [min(max(t + shift, Fraction(lo)), Fraction(hi)) for t, lo, hi in bounds]

    for left, right in itertools.pairwise([*bends, bends[-1]]):
        at_left, at_right = sum(quotas(left)), sum(quotas(right))
        if at_left <= total <= at_right:
            slope = (at_right - at_left) / (right - left) if right > left else 0
            return quotas(left + ((total - at_left) / slope if slope else 0))
    raise AssertionError("no shift gives the total")


@pytest.mark.parametrize(
    ("temperature", "probability", "real", "whole"),
    [
        (
            0.1,
            [0.101156816, 0.101156816, 0.050232988, 0.7474534],
            [35.370286, 35.370286, 29.259427, 20],
            [36, 35, 29, 20],
        ),
        (0.5, [0.22929558, 0.22929558, 0.19934, 0.34206882], [34.531557, 34.531557, 30.936884, 20], [35, 34, 31, 20]),
    ],
)
@pytest.mark.parametrize("floor", [1, 15])
def test_the_published_case_worked_by_hand(temperature, probability, real, whole, floor):
    probability_K = density.softmax(COMPLEXITY, temperature)
    assert probability_K.tolist() == pytest.approx(probability, rel=1e-6)
    quota_K, shift = density.project(120 * probability_K, LOW * floor, HIGH, 120)
    assert quota_K.tolist() == pytest.approx(real, abs=5e-6)
    assert shift == pytest.approx(real[0] - 120 * probability[0], abs=1e-5)
    assert density.allocate(120 * probability_K, LOW * floor, HIGH, 120).tolist() == whole


@given(shares())
def test_the_projection_equals_exact_arithmetic(share):
    expected = projection_in_fractions(*share)
    quota_K, _ = density.project(*share)
    assert [abs(Fraction(q) - e) < Fraction(1, 10**12) for q, e in zip(quota_K.tolist(), expected, strict=True)]
    assert np.allclose(quota_K, [float(e) for e in expected], rtol=0, atol=1e-12)


@given(shares())
def test_whole_quotas_are_the_largest_remainders_in_exact_arithmetic(share):
    target, low, high, total = share
    share = np.round(target * 8) / 8, low, high, total  # short fractions: remainders tie often, and rounding shows
    expected = projection_in_fractions(*share)
    quota = [math.floor(e) for e in expected]
    by_remainder = sorted(range(len(quota)), key=lambda j: (quota[j] - expected[j], j))
    for j in by_remainder[: total - sum(quota)]:
        quota[j] += 1
    assert density.allocate(*share).tolist() == quota


@given(shares(largest=3))
def test_no_whole_quotas_are_nearer_to_the_targets(share):
    target, low, high, total = share
    ranges = [range(a, b + 1) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    least = min(
        sum((x - t) ** 2 for x, t in zip(quota, target.tolist(), strict=True))
        for quota in itertools.product(*ranges)
        if sum(quota) == total
    )
    assert ((density.allocate(*share) - target) ** 2).sum() == pytest.approx(least)


@given(shares())
def test_quotas_keep_the_sum_and_the_bounds_and_one_shift_serves_all_inside_them(share):
    target, low, high, total = share
    real, shift = density.project(*share)
    assert math.fsum(real) == pytest.approx(total, abs=1e-9)
    assert ((low <= real) & (real <= high)).all()
    inside = (low + 1e-9 < real) & (real < high - 1e-9)
    assert np.allclose((real - target)[inside], shift, atol=1e-9, rtol=0)
    assert ((real - target)[(low < high) & (real <= low)] >= shift - 1e-9).all()
    assert ((real - target)[(low < high) & (real >= high)] <= shift + 1e-9).all()
    whole = density.allocate(*share)
    assert whole.dtype == np.int64
    assert whole.sum() == total
    assert ((low <= whole) & (whole <= high)).all()
    assert (np.abs(whole - real) < 1).all()


@given(shares(), st.randoms())
def test_the_order_of_the_clusters_matters_for_ties_only(share, random):
    target, low, high, total = share
    order = list(range(len(target)))
    random.shuffle(order)
    real, _ = density.project(*share)
    moved, _ = density.project(target[order], low[order], high[order], total)
    assert np.allclose(moved, real[order], atol=1e-9, rtol=0)
    assert (
        np.abs(density.allocate(target[order], low[order], high[order], total) - density.allocate(*share)[order]).max()
        <= 1
    )


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9))
def test_targets_that_can_be_met_are_met(target):
    target = np.array(target)
    for low, high in ((target, target), (target * 0, target + 3), (target // 2, target)):
        real, _ = density.project(target.astype(float), low, high, int(target.sum()))
        assert real.tolist() == target.tolist()
        assert density.allocate(target.astype(float), low, high, int(target.sum())).tolist() == target.tolist()


@given(shares())
def test_asking_for_all_or_for_the_least_gives_the_bounds(share):
    target, low, high, _ = share
    assert density.allocate(target, low, high, int(high.sum())).tolist() == high.tolist()
    assert density.allocate(target, low, high, int(low.sum())).tolist() == low.tolist()


def test_a_quota_that_is_whole_but_for_rounding_is_not_floored_below():
    target = np.array([0.1 + 0.2, 0.7, 3 - 4e-16, 1.0])
    assert density.allocate(target * 10, np.zeros(4, int), np.full(4, 90), 50).tolist() == [3, 7, 30, 10]


def test_equal_remainders_go_to_the_lowest_clusters_whatever_their_last_bits():
    target = np.array([1e6 + 0.1, 0.1, 10.1, 1e5 + 0.1, 0.6])
    quota = density.allocate(target, np.zeros(5, int), np.full(5, 10**7), 10**6 + 10 + 10**5 + 1)
    assert quota.tolist() == [10**6, 0, 10, 10**5, 1]
    quota = density.allocate(target - [0, 0, 0, 0, 0.5], np.zeros(5, int), np.full(5, 10**7), 10**6 + 10 + 10**5 + 2)
    assert quota.tolist() == [10**6 + 1, 1, 10, 10**5, 0]


def test_equal_targets_in_eighths_tie_exactly_among_many_clusters():
    rng = np.random.default_rng(3)
    high = rng.integers(0, 10**6, 1000)
    target = rng.integers(0, 4 * 10**6, 1000) / 8
    total = int(high.sum()) // 3 + 5
    low = np.zeros(1000, int)
    quota = density.allocate(target, low, high, total)
    _, shift = density.project(target, low, high, total)
    inside = (target + shift > low) & (target + shift < high)
    left = total - int(high[~inside & (target + shift >= high)].sum())
    shift = (left - Fraction(target[inside].sum())) / int(inside.sum())
    expected = {j: Fraction(target[j]) + shift for j in np.flatnonzero(inside).tolist()}
    by_remainder = sorted(expected, key=lambda j: (math.floor(expected[j]) - expected[j], j))
    up = set(by_remainder[: left - sum(map(math.floor, expected.values()))])
    assert all(quota[j] == math.floor(e) + (j in up) for j, e in expected.items())
    assert len({e - math.floor(e) for e in expected.values()}) == 8  # hundreds of ties at the last remainder


@pytest.mark.parametrize("steps", [0, 2, 16])
def test_newtons_steps_are_for_speed_only(monkeypatch, steps):
    monkeypatch.setattr(density, "NEWTON_STEPS", steps)
    rng = np.random.default_rng(steps)
    for k in (1, 2, 7, 40):
        high = (rng.pareto(0.7, k) * 50).astype(np.int64)
        target, low = 2.0 ** rng.uniform(-20, 20, k), high // 3
        for total in rng.integers(low.sum(), high.sum() + 1, 5).tolist():
            quota, _ = density.project(target, low, high, total)
            expected = projection_in_fractions(target, low, high, total)
            assert quota.tolist() == pytest.approx([float(e) for e in expected], abs=1e-9)
            assert density.allocate(target, low, high, total).sum() == total


@pytest.mark.parametrize("wide", [False, True])
def test_bounds_and_targets_of_any_size_are_shared(wide):
    target = np.array([2.0**46, 0.0, 3.5, 2.0**-40])
    low, high = np.zeros(4, int), np.full(4, 2**45 if wide else 3)
    total = int(high.sum()) // 2 + 1
    quota = density.allocate(target, low, high, total)
    assert (quota.sum(), quota.max()) == (total, high[0])


@given(st.lists(st.integers(0, 2**13 - 1), min_size=1, max_size=30), st.data())
def test_the_nth_largest_is_that_of_a_sort(values, data):
    n = data.draw(st.integers(1, len(values)))
    assert density.nth_largest(np.array(values), 13, n) == sorted(values, reverse=True)[n - 1]


def test_equal_remainders_tie_on_either_side_of_a_step():
    target = np.array([1.5 - 2.0**-50, 1.5, 1.0])
    assert density.allocate(target, np.zeros(3, int), np.full(3, 90), 4).tolist() == [2, 1, 1]


def test_a_cluster_without_members_gets_nothing_and_its_target_does_not_count():
    target, high = np.array([np.nan, 2.0, 9.0]), np.array([0, 5, 6])
    assert density.allocate(target, np.zeros(3, int), high, 7).tolist() == [0, 1, 6]
    assert density.allocate(target[:1], high[:1], high[:1], 0).tolist() == [0]


@pytest.mark.parametrize("total", [5, 321])
def test_a_total_outside_the_bounds_is_an_error_with_numbers(total):
    message = f"cannot share {total} samples: the clusters take 8 at least and 320 at most"
    with pytest.raises(ValueError, match=message):
        density.allocate(COMPLEXITY, 2 * LOW, HIGH, total)


def test_fifty_thousand_clusters_of_ten_billion_samples_are_shared_exactly_and_quickly():
    rng = np.random.default_rng(0)
    high = np.maximum((rng.pareto(1.2, 50_000) * 60_000).astype(np.int64), 0)
    total = int(high.sum() * 0.3)
    target = total * density.softmax(rng.gamma(4, 0.02, 50_000), 0.1)
    low = np.minimum(1, high)
    begin = time.process_time()
    quota = density.allocate(target, low, high, total)
    assert time.process_time() - begin < 1  # 0.03 s
    assert quota.sum() == total
    assert ((low <= quota) & (quota <= high)).all()
    inside = (low < quota) & (quota < high)
    assert np.ptp((quota - target)[inside]) < 1 + 1e-6


def test_softmax_leaves_out_clusters_without_members_and_does_not_overflow():
    probability = density.softmax(np.array([np.nan, 900.0, 900.0, -900.0]), 0.1)
    assert np.isnan(probability[0])
    assert probability[1:].tolist() == [0.5, 0.5, 0]


CENTROIDS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, 0.6, 0.8]], np.float32)


def test_d_inter_worked_by_hand():
    live = np.ones(5, bool)
    assert density.d_inter(CENTROIDS, live, 2).tolist() == pytest.approx([0.7, 0.3, 0.6, 0.3, 0.3], abs=1e-7)
    assert density.d_inter(CENTROIDS, live, 20).tolist() == pytest.approx([0.85, 0.65, 0.8, 0.53, 0.53], abs=1e-7)


def test_d_inter_sees_live_centroids_only():
    live = np.array([True, False, True, True, False])
    assert density.d_inter(CENTROIDS, live, 1).tolist() == pytest.approx(
        [0.4, np.nan, 1, 0.4, np.nan], nan_ok=True, abs=1e-7
    )
    assert density.d_inter(CENTROIDS, np.arange(5) == 3, 20)[3] == 0
    assert np.isnan(density.d_inter(CENTROIDS, np.zeros(5, bool), 20)).all()


def test_d_inter_leaves_out_itself_by_id_so_coinciding_centroids_are_at_distance_zero():
    twins = CENTROIDS[[0, 0, 1]]
    assert density.d_inter(twins, np.ones(3, bool), 1).tolist() == [0, 0, 1]
    assert density.d_inter(twins, np.ones(3, bool), 2).tolist() == [0.5, 0.5, 1]


def test_d_inter_of_coinciding_centroids_never_rounds_below_zero():
    centroid = np.random.default_rng(7).normal(size=(40, 9)).astype(np.float32)
    distance = density.d_inter(np.concatenate([centroid, centroid]), np.ones(80, bool), 1)
    assert ((distance >= 0) & (distance < 1e-15)).all()


def test_d_inter_in_blocks_is_the_mean_of_the_sorted_row():
    rng = np.random.default_rng(4)
    centroid = rng.normal(size=(3000, 6)).astype(np.float32)  # more than a block of rows, and not of unit norm
    assert density.CELLS // 3000 < 3000
    unit = centroid.astype(np.float64) / np.linalg.norm(centroid.astype(np.float64), axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    np.fill_diagonal(distance, np.inf)
    expected = np.sort(distance, axis=1)[:, :20].mean(axis=1)
    assert np.allclose(density.d_inter(centroid, np.ones(3000, bool), 20), expected, rtol=0, atol=1e-12)
