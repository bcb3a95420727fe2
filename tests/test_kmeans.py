"""Spherical k-means: by hand, against float64 by the definition, and the degenerate samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import kmeans, products, vectors


def unit_rows(seed, n, dims, distinct=None):
    """float16 unit rows, drawn from `distinct` different ones."""
    rng = np.random.default_rng(seed)
    rows = vectors.unit16(rng.normal(size=(distinct or n, dims)))[0]
    return rows[rng.integers(0, len(rows), n)] if distinct else rows


def cosines64(vec_ND, centroid_KD):
    dot_NK = vec_ND.astype(np.float64) @ centroid_KD.astype(np.float64).T
    return dot_NK / (vectors.norms(vec_ND)[:, None] * vectors.norms(centroid_KD))


def lloyd(vec_ND, k, iterations, seed):
    """Plain float64 spherical k-means with k-means++; mean of 1 - cosine at the end."""
    rng = np.random.default_rng(seed)
    vec_ND = vec_ND.astype(np.float64)
    vec_ND /= np.linalg.norm(vec_ND, axis=1, keepdims=True)
    chosen = [int(rng.integers(len(vec_ND)))]
    near_N = vec_ND @ vec_ND[chosen[0]]
    while len(chosen) < k:
        distance_N = np.maximum(1 - near_N, 0)
        chosen.append(int(rng.choice(len(vec_ND), p=distance_N / distance_N.sum())))
        near_N = np.maximum(near_N, vec_ND @ vec_ND[chosen[-1]])
    centroid_KD = vec_ND[chosen]
    for _ in range(iterations):
        cluster_N = (vec_ND @ centroid_KD.T).argmax(axis=1)
        sum_KD = np.stack([vec_ND[cluster_N == c].sum(axis=0) for c in range(k)])
        centroid_KD = sum_KD / np.linalg.norm(sum_KD, axis=1, keepdims=True)
    return float(1 - (vec_ND @ centroid_KD.T).max(axis=1).mean())


def test_nearest_worked_by_hand():
    vec_ND = np.array([[1, 0], [0.75, 0.5], [-1, 0]], np.float16)
    centroid_KD = np.array([[0, 1], [1, 0]], np.float32)
    cluster_N, distance_N = kmeans.nearest(vec_ND, centroid_KD)
    assert (cluster_N.tolist(), cluster_N.dtype) == ([1, 1, 0], np.int32)
    assert distance_N.tolist() == [0, np.float32(1 - 0.75 / np.sqrt(0.8125)), 1]
    assert distance_N.dtype == np.float32


def test_equally_near_centroids_give_the_lower_cluster():
    vec_ND = np.array([[0.5, 0.5], [1, 0]], np.float16)
    centroid_KD = np.array([[-1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    assert kmeans.nearest(vec_ND, centroid_KD)[0].tolist() == [1, 2]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("clusters", [3, 40])
def test_a_centroid_nearer_by_less_than_float32_can_see_wins(clusters, bf16):
    """The cosines differ by 3e-8 or less, below what a float32 product of 256 terms resolves."""
    vec_ND = unit_rows(0, 64, 256)
    base = kmeans.on_grid(vec_ND[:1] / vectors.norms(vec_ND[:1])[:, None])
    steps = np.random.default_rng(1).integers(-2, 3, (clusters, 256)) / kmeans.GRID
    centroid_KD = (base + steps).astype(np.float32)
    cos_NK = cosines64(vec_ND, centroid_KD)
    assert np.ptp(cos_NK, axis=1).max() < 1e-5
    assert kmeans.nearest(vec_ND, centroid_KD, bf16=bf16)[0].tolist() == cos_NK.argmax(axis=1).tolist()


@pytest.mark.parametrize("spread", [0.02, 0.3, 3])
def test_bfloat16_changes_no_assignment_of_rows_around_one_direction(spread):
    """At 0.02 all centroids are near-tied for bfloat16, at 0.3 some, at 3 few."""
    rng = np.random.default_rng(7)
    vec_ND, some_KD = (
        vectors.unit16(rng.normal(size=(1, 64)) + spread * rng.normal(size=(rows, 64)))[0] for rows in (700, 50)
    )
    centroid_KD = kmeans.on_grid(some_KD)
    cluster_N, distance_N = kmeans.nearest(vec_ND, centroid_KD, bf16=True)
    assert cluster_N.tolist() == cosines64(vec_ND, centroid_KD).argmax(axis=1).tolist()
    assert np.array_equal(distance_N, kmeans.nearest(vec_ND, centroid_KD, bf16=False)[1])
    assert np.array_equal(cluster_N, kmeans.clusters_of(vec_ND, centroid_KD, bf16=True))


@given(
    st.integers(0, 99), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 50), st.booleans()
)
def test_nearest_is_the_first_largest_float64_cosine_for_any_block_of_rows(seed, n, k, dims, block_rows, bf16):
    vec_ND = unit_rows(seed, n, dims, distinct=max(1, n // 2))
    centroid_KD = kmeans.on_grid(unit_rows(seed + 1, k, dims, distinct=max(1, k // 2)))
    cos_NK = cosines64(vec_ND, centroid_KD)
    cluster_N, distance_N = kmeans.nearest(vec_ND, centroid_KD, block_rows, bf16)
    assert cluster_N.tolist() == cos_NK.argmax(axis=1).tolist()
    assert np.array_equal(kmeans.clusters_of(vec_ND, centroid_KD, block_rows, bf16), cluster_N)
    assert distance_N.tolist() == np.maximum(1 - cos_NK.max(axis=1), 0).astype(np.float32).tolist()


def test_the_length_of_rows_and_centroids_does_not_matter():
    vec_ND = np.array([[0.5, 0.25]], np.float16)
    centroid_KD = np.array([[0.25, 0.125], [0, 8]], np.float32)
    cluster_N, distance_N = kmeans.nearest(vec_ND, centroid_KD)
    assert (cluster_N.tolist(), distance_N.tolist()) == ([0], [pytest.approx(0, abs=1e-15)])


@pytest.mark.goal("R11")
def test_a_row_without_a_direction_is_refused():
    vec_ND = np.array([[1, 0], [0, 0]], np.float16)
    with pytest.raises(ValueError, match="row 1 has no direction and so no nearest centroid"):
        kmeans.nearest(vec_ND, np.eye(2, dtype=np.float32))


def test_no_rows_give_no_clusters():
    cluster_N, distance_N = kmeans.nearest(np.zeros((0, 3), np.float16), np.eye(3, dtype=np.float32))
    assert cluster_N.shape == distance_N.shape == (0,)
    sum_KD, size_K = kmeans.partial_sums(np.zeros((0, 3), np.float16), cluster_N, 2)
    assert not sum_KD.any() and not size_K.any()


def test_partial_sums_and_recentre_worked_by_hand():
    vec_ND = np.array([[1, 0], [0, 1], [0.75, 0.5], [-1, 0], [1, 0]], np.float16)
    sum_KD, size_K = kmeans.partial_sums(vec_ND, np.array([2, 2, 2, 0, 0], np.int32), 4)
    assert sum_KD.tolist() == [[0, 0], [0, 0], [1.75, 1.5], [0, 0]]
    assert (size_K.tolist(), size_K.dtype, sum_KD.dtype) == ([2, 0, 3, 0], np.int64, np.float64)
    old_KD = np.array([[1, 0], [0, 1], [1, 0], [0, -1]], np.float32)
    centroid_KD = kmeans.recentre(sum_KD, size_K, old_KD)
    assert centroid_KD[[0, 1, 3]].tolist() == old_KD[[0, 1, 3]].tolist()
    assert np.allclose(centroid_KD[2], np.array([7, 6]) / np.sqrt(85), atol=2**-25, rtol=0)
    assert centroid_KD.dtype == np.float32


@pytest.mark.goal("R11")
def test_partial_sums_of_any_partition_in_any_order_add_up_to_the_same_bits(record_property):
    rng = np.random.default_rng(3)
    vec_ND = unit_rows(3, 2 * kmeans.SUM_ROWS + 7, 12)
    cluster_N = rng.integers(0, 9, len(vec_ND)).astype(np.int32)
    sum_KD, size_K = kmeans.partial_sums(vec_ND, cluster_N, 9)
    assert sum_KD.tolist() == [vec_ND[cluster_N == c].astype(np.float64).sum(axis=0).tolist() for c in range(9)]
    for parts in (1, 3, 7):
        rows = np.array_split(rng.permutation(len(vec_ND)), parts)
        partial = [kmeans.partial_sums(vec_ND[part], cluster_N[part], 9) for part in rows]
        assert np.array_equal(sum(sums for sums, _ in partial), sum_KD)
        assert np.array_equal(sum(sizes for _, sizes in partial), size_K)
    record_property("figure", f"{len(vec_ND):,} rows in 1, 3 and 7 parts, shuffled: float64 sums differ by 0")


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 40))
def test_centroids_are_unit_rows_on_the_grid(seed, k, dims):
    sum_KD = np.random.default_rng(seed).normal(size=(k, dims)) * 10.0 ** np.arange(k)[:, None]
    centroid_KD = kmeans.recentre(sum_KD, np.ones(k, np.int64), np.zeros((k, dims), np.float32))
    assert np.array_equal(np.rint(centroid_KD.astype(np.float64) * 2**24), centroid_KD.astype(np.float64) * 2**24)
    assert np.allclose(vectors.norms(centroid_KD), 1, atol=1e-6)
    assert np.allclose(centroid_KD, sum_KD / np.linalg.norm(sum_KD, axis=1, keepdims=True), atol=2**-25, rtol=0)


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(5)
    middle_KD = rng.normal(size=(12, 24))
    return vectors.unit16(np.repeat(middle_KD, 150, axis=0) + 0.6 * rng.normal(size=(1800, 24)))[0]


def test_training_is_as_good_as_float64_lloyd_and_repeats_itself(blobs):
    centroid_KD, objective_I = kmeans.train(blobs, 12, 20, seed=1, threads=1)
    again_KD, again_I = kmeans.train(blobs, 12, 20, seed=1, threads=2)
    assert (centroid_KD.tobytes(), objective_I.tobytes()) == (again_KD.tobytes(), again_I.tobytes())
    assert (centroid_KD.dtype, objective_I.dtype, len(objective_I)) == (np.float32, np.float64, 4)
    reached = kmeans.nearest(blobs, centroid_KD)[1].mean()
    assert objective_I[-1] == pytest.approx(reached, rel=1e-3)
    assert objective_I[0] > objective_I[-1]
    assert not np.array_equal(centroid_KD, kmeans.train(blobs, 12, 20, seed=2, threads=1)[0])
    # Where few clusters stand apart, the first centroids decide: of ours and of Lloyd's the best of three.
    ours = min(kmeans.nearest(blobs, kmeans.train(blobs, 12, 20, seed, 1)[0])[1].mean() for seed in range(3))
    assert ours <= 1.01 * min(lloyd(blobs, 12, 20, seed) for seed in range(3))


@pytest.mark.goal("R12")
@pytest.mark.parametrize("rows", [5_000, pytest.param(100_000, marks=[pytest.mark.campaign, pytest.mark.slow])])
def test_the_objective_is_within_a_hundredth_of_float64_lloyd_where_clusters_overlap(rows, record_property):
    dims, k = 64, rows // 1000 + 20
    rng = np.random.default_rng(6)
    middle_KD = rng.normal(size=(3 * k, dims))
    vec_ND = vectors.unit16(middle_KD[rng.integers(3 * k, size=rows)] + rng.normal(size=(rows, dims)))[0]
    centroid_KD, _ = kmeans.train(vec_ND, k, 20, seed=1, threads=1)
    reached = kmeans.nearest(vec_ND, centroid_KD)[1].astype(np.float64).mean()
    ratio = reached / min(lloyd(vec_ND, k, 20, seed) for seed in range(3))
    record_property("figure", f"{rows:,} x {dims}, k = {k}: {ratio:.4f} of the best of 3 float64 Lloyds")
    assert ratio <= 1.01


def test_a_sample_that_bfloat16_pays_for_is_trained_to_the_same_bits_by_any_number_of_threads():
    vec_ND = unit_rows(9, 8300, 512, distinct=6000)
    assert vec_ND.size * 2040 > products.BF16_WORK
    found = [kmeans.train(vec_ND, 2040, 2, seed=0, threads=threads) for threads in (1, 3)]
    assert found[0][0].tobytes() == found[1][0].tobytes() and found[0][1].tolist() == found[1][1].tolist()


@pytest.mark.parametrize("bf16", [False, True])
def test_rows_that_moved_are_counted_where_they_are_and_no_longer_where_they_were(bf16):
    vec_ND = unit_rows(2, 2 * kmeans.SUM_ROWS + 60, 8)
    first_KD, second_KD = (kmeans.on_grid(vec_ND[some]) for some in (slice(0, 5), slice(5, 10)))
    cluster_N = np.full(len(vec_ND), -1, np.int32)
    sums = [kmeans._step(vec_ND, cluster_N, centroid_KD, bf16) for centroid_KD in (first_KD, second_KD)]
    assert np.array_equal(cluster_N, kmeans.clusters_of(vec_ND, second_KD))
    expected_KD, expected_K = kmeans.partial_sums(vec_ND, cluster_N, 5)
    assert np.array_equal(sums[0][0] + sums[1][0], expected_KD) and np.array_equal(sums[0][1] + sums[1][1], expected_K)


def test_the_first_steps_are_on_a_quarter_of_many_rows_on_half_of_fewer_and_on_all_of_few():
    assert [kmeans.stride(rows, 4) for rows in (4000, 3999, 64, 63, 1)] == [4, 2, 2, 1, 1]


def test_a_fifth_of_the_iterations_and_one_at_least_are_over_all_rows():
    assert [kmeans.over_all(iterations) for iterations in (1, 2, 6, 7, 8, 10, 20)] == [1, 1, 1, 1, 2, 2, 4]


def test_every_row_of_the_sample_is_used():
    """FAISS alone would draw 256 rows per centroid, and is given eight here."""
    vec_ND = unit_rows(8, 3000, 4)
    mean = vec_ND.astype(np.float64).sum(axis=0)
    centroid_KD, _ = kmeans.train(vec_ND, 1, 2, seed=0, threads=1)
    assert np.allclose(centroid_KD[0], mean / np.linalg.norm(mean), atol=2**-25, rtol=0)


def test_the_last_fifth_of_the_iterations_are_exact_lloyd_steps_over_all_rows(blobs):
    start_KD = kmeans.train(blobs, 12, 7, seed=1, threads=1)[0]
    centroid_KD, objective_I = kmeans.train(blobs, 12, 8, seed=1, threads=1)
    assert len(objective_I) == 2
    cluster_N, distance_N = kmeans.nearest(blobs, start_KD)
    assert objective_I[1] == pytest.approx(distance_N.mean(), rel=1e-4)
    expected_KD = kmeans.recentre(*kmeans.partial_sums(blobs, cluster_N, 12), start_KD)
    assert np.array_equal(centroid_KD, expected_KD)


def test_empty_clusters_get_halves_of_the_largest():
    centroid_KD = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], np.float32)
    split_KD = kmeans.split(centroid_KD, np.array([0, 7, 5, 0]))
    moved = np.array([[0.6 * (1 - 2**-10), 0.8 * (1 + 2**-10)], [0.6 * (1 + 2**-10), 0.8 * (1 - 2**-10)]])
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    assert np.allclose(split_KD[[1, 0]], moved, atol=2**-24, rtol=0)
    assert split_KD[[2, 3]].tolist() == [[0, 1], [0, 1]]  # 7 rows became 4 and 3, so that 5 are the most
    assert split_KD[1, 0] < 0.6 < split_KD[0, 0]
    assert np.array_equal(kmeans.split(centroid_KD, np.array([0, 1, 1, 0])), centroid_KD)
    assert np.array_equal(kmeans.split(centroid_KD, np.array([2, 1, 1, 5])), centroid_KD)


def test_clusters_that_lose_all_rows_are_used_again():
    """Of 40 rows 30 are one: most of the first centroids coincide, yet each other row can have one of its own."""
    vec_ND = np.concatenate([unit_rows(3, 10, 8), np.repeat(unit_rows(4, 1, 8), 30, axis=0)])
    centroid_KD, _ = kmeans.train(vec_ND, 1500, 6, seed=0, threads=1)
    assert kmeans.nearest(vec_ND, centroid_KD)[1].max() < 1e-3


def test_one_iteration_moves_the_first_centroids_by_every_row():
    vec_ND = np.array([[1, 0], [0, 1], [0, 1]], np.float16)
    centroid_KD, objective_I = kmeans.train(vec_ND, 1, 1, seed=0, threads=1)
    assert np.allclose(centroid_KD, np.array([[1, 2]]) / 5**0.5, atol=2**-25, rtol=0)
    assert objective_I.tolist() in ([pytest.approx(1 / 3)], [pytest.approx(2 / 3)])


@pytest.mark.parametrize(
    ("n", "distinct", "k"), [(20, 20, 20), (20, 20, 1), (40, 5, 16), (30, 1, 4), (3, 3, 8), (1, 1, 1), (8, 2, 8)]
)
def test_degenerate_samples_give_k_unit_centroids_and_no_warning(n, distinct, k, capfd):
    vec_ND = unit_rows(n, n, 6, distinct)
    centroid_KD, objective_I = kmeans.train(vec_ND, k, 8, seed=0, threads=1)
    assert centroid_KD.shape == (k, 6)
    assert np.allclose(vectors.norms(centroid_KD), 1, atol=1e-6)
    assert objective_I.shape == (2,) and np.isfinite(objective_I).all()
    cluster_N, distance_N = kmeans.nearest(vec_ND, centroid_KD)
    assert cluster_N.min() >= 0
    if k >= distinct:
        assert distance_N.max() < 1e-3
    assert capfd.readouterr() == ("", "")


def test_opposite_rows_leave_a_unit_centroid():
    centroid_KD, _ = kmeans.train(np.array([[1, 0], [-1, 0], [1, 0], [-1, 0]], np.float16), 1, 3, seed=0, threads=1)
    assert np.allclose(vectors.norms(centroid_KD), 1, atol=1e-6)


def test_training_leaves_faiss_threads_as_they_were(blobs):
    import faiss

    before = faiss.omp_get_max_threads()
    kmeans.train(blobs[:50], 2, 1, seed=0, threads=before + 1)
    assert faiss.omp_get_max_threads() == before


def test_an_empty_sample_is_refused():
    with pytest.raises(ValueError, match="k-means needs at least one row"):
        kmeans.train(np.zeros((0, 3), np.float16), 2, 1, seed=0, threads=1)


@pytest.mark.parametrize("seed", [2**31, 2**40 + 1, -1])
def test_any_whole_number_is_a_seed(seed):
    vec_MD = unit_rows(3, 40, 8)
    one, other = (kmeans.train(vec_MD, 20, 1, s, 1)[0] for s in (seed, seed + 7))
    assert not np.array_equal(one, other)
