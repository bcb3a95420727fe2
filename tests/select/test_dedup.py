"""Duplicate kernels: the published worked cases, brute force in float64, and what both rules promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import vectors
from pipeline.select import dedup


def rows_at(*degrees):
    radians = np.radians(np.array(degrees, float))
    return vectors.unit16(np.stack([np.cos(radians), np.sin(radians)], axis=1))[0]


def brute_force(vec_ND, min_cos=None):
    """By the definition, row by row; with `min_cos` only kept rows are compared with."""
    cos_NN = vectors.all_cosines(vec_ND, vec_ND)
    cos, best, kept = [], [], []
    for i in range(len(vec_ND)):
        earlier = [j for j in range(i) if min_cos is None or kept[j]]
        cos.append(max((float(cos_NN[i, j]) for j in earlier), default=-1.0))
        best.append(next((j for j in earlier if cos_NN[i, j] == np.float32(cos[-1])), -1))
        kept.append(min_cos is None or cos[-1] <= min_cos)
    return cos, best


def kept_of(cos_N, epsilon):
    return np.flatnonzero(cos_N.astype(np.float64) <= 1 - epsilon).tolist()


@st.composite
def clusters(draw):
    """Rows with many copies, opposites, and neighbours that differ in the last bit of one value."""
    dims = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    base = vectors.unit16(rng.normal(size=(draw(st.integers(1, 5)), dims)))[0]
    vec_ND = base[rng.integers(0, len(base), draw(st.integers(1, 40)))]
    some = rng.random(len(vec_ND)) < draw(st.sampled_from([0, 0.5, 1]))
    vec_ND[some, 0] = np.nextafter(vec_ND[some, 0], np.float16(rng.choice([-1, 1])))
    vec_ND[rng.random(len(vec_ND)) < draw(st.sampled_from([0, 0.3]))] *= -1
    return vec_ND


def test_the_published_rows_worked_by_hand():
    vec_ND, _ = vectors.unit16(np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [1, 2, 3], [1, 2, 3]], float))
    cos_N, best_N = dedup.repeats(vec_ND)
    assert (cos_N.dtype, best_N.dtype) == (np.float32, np.int64)
    assert cos_N.tolist() == pytest.approx([-1, 0.9746318, 0.998191, 0.9996186, 1, 1], abs=3e-4)
    assert cos_N[[0, 4, 5]].tolist() == [-1, 1, 1]
    assert best_N.tolist() == [-1, 0, 1, 2, 0, 0]


def test_a_chain_worked_by_hand():
    chain = rows_at(0, 10, 20, 30, 90, 95)
    cos_N, best_N = dedup.repeats(chain)
    assert cos_N.tolist() == pytest.approx([-1, 0.9848078, 0.9848078, 0.9848077, 0.5, 0.9961947], abs=5e-4)
    assert best_N.tolist() == [-1, 0, 1, 2, 3, 4]
    assert kept_of(cos_N, 0.001) == [0, 1, 2, 3, 4, 5]
    for epsilon in (0.016, 0.02, 0.07, 0.3):
        assert kept_of(cos_N, epsilon) == [0, 4]
    assert [5 - row for row in kept_of(dedup.repeats(chain[::-1])[0], 0.02)] == [5, 3]
    assert kept_of(dedup.greedy(chain, 0.98)[0], 0.02) == [0, 2, 4]
    assert kept_of(dedup.greedy(chain, 0.93)[0], 0.07) == [0, 3, 4]
    assert dedup.greedy(chain, 0.98)[1].tolist() == [-1, 0, 0, 2, 2, 4]


def test_a_cosine_exactly_at_the_threshold_keeps_the_row():
    vec_ND = np.array([[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [0.5, -0.5, -0.5, 0.5]], np.float16)
    cos_N, _ = dedup.repeats(vec_ND)
    assert cos_N.tolist() == [-1, 0.5, 0.5]
    assert kept_of(cos_N, 0.5) == [0, 1, 2]
    assert kept_of(cos_N, np.nextafter(0.5, 1)) == [0]
    assert dedup.greedy(vec_ND, 0.5)[1].tolist() == [-1, 0, 0]
    assert dedup.greedy(vec_ND[[0, 1, 1]], 0.5)[1].tolist() == [-1, 0, 1]
    assert dedup.greedy(vec_ND[[0, 1, 1]], np.nextafter(0.5, 0))[1].tolist() == [-1, 0, 0]


def test_opposite_rows_have_each_other_at_cosine_minus_one():
    vec_ND = np.array([[1, 0], [-1, 0]], np.float16)
    for cos_N, best_N in (dedup.repeats(vec_ND), dedup.greedy(vec_ND, 0.5)):
        assert (cos_N.tolist(), best_N.tolist()) == ([-1, -1], [-1, 0])


def test_the_length_of_the_rows_does_not_matter():
    vec_ND = np.array([[0.5, 0], [0.25, 0.25], [0.75, 0.125]], np.float16)
    cos_N, best_N = dedup.repeats(vec_ND)
    assert cos_N.tolist() == [-1, np.float32(0.5**0.5), np.float32(6 / 37**0.5)]
    assert best_N.tolist() == [-1, 0, 0]


@given(clusters(), st.integers(1, 13), st.integers(1, 30), st.booleans())
def test_repeats_equals_brute_force_for_any_block_of_rows(vec_ND, block_rows, held_rows, bf16):
    cos_N, best_N = dedup.repeats(vec_ND, block_rows, held_rows, bf16)
    assert (cos_N.tolist(), best_N.tolist()) == brute_force(vec_ND)


@given(clusters(), st.sampled_from([-1.0, 0.2, 0.9, 0.9999999, 1.0]), st.integers(1, 13), st.booleans())
def test_greedy_equals_brute_force_for_any_block_of_rows(vec_ND, min_cos, block_rows, bf16):
    cos_N, best_N = dedup.greedy(vec_ND, min_cos, block_rows, bf16)
    assert (cos_N.tolist(), best_N.tolist()) == brute_force(vec_ND, min_cos)


@given(clusters(), st.floats(0, 1), st.floats(0, 1))
def test_a_looser_epsilon_drops_no_fewer_and_greedy_no_more(vec_ND, one, other):
    cos_N, _ = dedup.repeats(vec_ND)
    tight, loose = sorted([one, other])
    assert set(kept_of(cos_N, loose)) <= set(kept_of(cos_N, tight))
    greedy_cos_N, best_N = dedup.greedy(vec_ND, 1 - loose)
    kept = set(kept_of(greedy_cos_N, loose))
    assert set(kept_of(cos_N, loose)) <= kept
    assert all(int(best_N[row]) in kept for row in range(len(vec_ND)) if row not in kept)


@pytest.mark.parametrize("dims", [16, 300])
def test_neighbours_that_float32_cannot_tell_apart_are_compared_exactly(dims):
    """All rows are one row with a few last bits flipped: every pair is near-tied."""
    rng = np.random.default_rng(dims)
    row_D = vectors.unit16(rng.normal(size=(1, dims)))[0]
    vec_ND = np.where(rng.random((150, dims)) < 0.1, np.nextafter(row_D, np.float16(2)), row_D)
    for block_rows in (7, 64, 2048):
        cos_N, best_N = dedup.repeats(vec_ND, block_rows)
        assert (cos_N.tolist(), best_N.tolist()) == brute_force(vec_ND)
        cos_N, best_N = dedup.greedy(vec_ND, 0.9999999, block_rows)
        assert (cos_N.tolist(), best_N.tolist()) == brute_force(vec_ND, 0.9999999)


@pytest.mark.parametrize("spread", [0.02, 0.3, 3])
def test_bfloat16_changes_no_answer_for_rows_around_one_direction(spread):
    """At 0.02 all rows are near-tied for bfloat16, at 0.3 some, at 3 few; a tenth are copies with last bits changed."""
    rng = np.random.default_rng(11)
    vec_ND = vectors.unit16(rng.normal(size=(1, 48)) + spread * rng.normal(size=(400, 48)))[0]
    vec_ND[350:390] = np.nextafter(vec_ND[:40], np.float16(1))
    for held_rows in (32, 128, 8192):
        cos_N, best_N = dedup.repeats(vec_ND, 32, held_rows, bf16=True)
        assert (cos_N.tolist(), best_N.tolist()) == brute_force(vec_ND)


def test_a_cluster_of_one_image_and_a_few_others_is_as_brute_force_says():
    rng = np.random.default_rng(2)
    vec_ND = vectors.unit16(rng.normal(size=(500, 32)))[0]
    vec_ND[rng.random(500) < 0.9] = vec_ND[0]
    assert dedup.repeats(vec_ND, 64)[1].tolist() == brute_force(vec_ND)[1]


def test_rows_may_be_a_map_of_a_file(tmp_path):
    vec_ND = vectors.unit16(np.random.default_rng(6).normal(size=(70, 8)))[0]
    np.save(tmp_path / "rows.npy", vec_ND)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert dedup.repeats(mapped, 16)[1].tolist() == dedup.repeats(vec_ND)[1].tolist()
    assert dedup.greedy(mapped, 0.3, 16)[1].tolist() == dedup.greedy(vec_ND, 0.3)[1].tolist()


def test_no_rows_and_one_row():
    for n in (0, 1):
        for cos_N, best_N in (dedup.repeats(rows_at(0)[:n]), dedup.greedy(rows_at(0)[:n], 0.5)):
            assert (cos_N.tolist(), best_N.tolist()) == ([-1] * n, [-1] * n)


def test_buckets_worked_by_hand():
    bucket_K = dedup.bucketise(np.array([3, 4, 0, 3, 20, 0, 1, 9, 10]), 10)
    # Pairs: 34, 400, 82 and 100; the most come first.
    assert (bucket_K.tolist(), bucket_K.dtype) == ([3, 3, 3, 3, 0, 0, 2, 2, 1], np.int32)
    assert dedup.bucketise(np.zeros(0, np.int64), 10).tolist() == []


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 40))
def test_no_bucket_is_too_large_unless_one_cluster_is_and_none_is_left_out(sizes, max_rows):
    bucket_K = dedup.bucketise(np.array(sizes, np.int64), max_rows)
    assert set(bucket_K.tolist()) == set(range(max(bucket_K, default=-1) + 1))
    if sizes:
        assert len(set(bucket_K.tolist())) == 1 + np.count_nonzero(np.diff(bucket_K)), "neighbours stay together"
    pairs = []
    for bucket in range(max(bucket_K, default=-1) + 1):
        held = [size for size, b in zip(sizes, bucket_K, strict=True) if b == bucket and size]
        assert sum(held) <= max_rows or len(held) == 1
        pairs.append(sum(size**2 for size in held))
    assert pairs == sorted(pairs, reverse=True)


def test_rows_of_one_hash_that_differ_are_no_copies():
    # Two words that differ by such multiples of each other's factor that the sums are the same modulo 2^64.
    one, other = (int(f) | 1 for f in np.random.default_rng(0).integers(2**64, size=2, dtype=np.uint64))
    rng = np.random.default_rng(1)
    while True:
        low, high, step = (int(w) for w in rng.integers(2**64, size=3, dtype=np.uint64))
        words = [[low, high], [(low + step * other) % 2**64, (high - step * one) % 2**64]]
        vec_ND = np.array(words, np.uint64).view(np.float16)
        if (np.abs(vec_ND) < 2).all():  # and not NaN
            break
    assert dedup._first_copies(vec_ND, 4).tolist() == [0, 1]
    assert dedup._first_copies(np.concatenate([vec_ND, vec_ND]), 4).tolist()[:3] == [0, 1, 0]
