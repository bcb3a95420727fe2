"""Concepts: the same centroids for any partition, honest sizes, few rows and far too many clusters."""

import io
import itertools

import numpy as np
import pytest

from pipeline import kmeans
from pipeline.cluster import DISTANCE_UNIT, LEAST_ROWS, Clustering, centroids_of, health, nobody, sums_of
from pipeline.vectors import unit16
from tests import steps


def blobs(rows, clusters=4, dims=6, seed=0):
    """float16 (rows, dims): unit rows around some directions."""
    rng = np.random.default_rng(seed)
    centre_KD = rng.normal(size=(clusters, dims))
    return unit16(centre_KD[rng.integers(clusters, size=rows)] + 0.3 * rng.normal(size=(rows, dims)))[0]


def step_of(vec_ND, ends=None, group_units=1, problem=()):
    """A step over units that part the rows at `ends`."""
    rows = [
        {"uid": n.to_bytes(16, "big")} | ({"problem": "bad_metadata"} if n in problem else {})
        for n in range(len(vec_ND))
    ]
    ends = [0, *(ends or []), len(vec_ND)]
    cuts = list(itertools.pairwise(ends))
    return steps.step_of(
        steps.memory_run(),
        [steps.samples_of(*rows[a:b]) for a, b in cuts],
        evidence={"clip": [steps.evidence_of(vec_ND[a:b]) for a, b in cuts]},
        group_units=group_units,
        name="01-density",
    )


def fitted(step, clusters=4, passes=2, iterations=5, sample=10_000):
    return Clustering(clusters, sample, iterations, passes).fit(step, "clip")


def centroids(step, found):
    return centroids_of(step.run.rows(found.centroids.parts[0]))


def assigned(step, found):
    table = steps.table_of(step, found.assigned)
    return table.column("cluster").to_numpy(), table.column("distance").to_numpy()


PARTITIONS = [([], 1), ([20, 40], 1), ([20, 40], 3), ([9, 9, 30, 31, 50, 55], 1), ([9, 9, 30, 31, 50, 55], 2)]


@pytest.mark.goal("R11")
def test_centroids_are_the_same_bytes_for_any_partition(record_property):
    vec_ND = blobs(60)
    found = []
    for ends, group_units in PARTITIONS:
        step = step_of(vec_ND, ends, group_units)
        fit = fitted(step)
        cluster_N, distance_N = assigned(step, fit)
        found.append((fit.centroid_file(step), cluster_N.tobytes(), distance_N.tobytes()))
    assert len(set(found)) == 1
    record_property("figure", f"{len(PARTITIONS)} partitions of a pool into units and groups: the same centroids")


@pytest.mark.goal("R11")
def test_an_exact_pass_does_not_depend_on_the_order_of_parts():
    vec_ND = blobs(60, seed=3)
    start = kmeans.train(vec_ND, 4, 1, 0, 1)[0]
    cluster_N, _ = kmeans.nearest(vec_ND, start)
    expected = kmeans.recentre(*kmeans.partial_sums(vec_ND, cluster_N, 4), start)
    # one iteration on the sample, of which every row is part, then one exact pass: by hand and by the run
    for ends in ([], [13], [1, 2, 59]):
        step = step_of(vec_ND, ends)
        np.testing.assert_array_equal(centroids(step, fitted(step, passes=1, iterations=1)), expected)


def test_rows_are_assigned_to_the_nearest_final_centroid_and_the_objective_falls():
    vec_ND = blobs(200, clusters=6)
    step = step_of(vec_ND, [50, 100])
    found = fitted(step, clusters=6, passes=4)
    unit_KD = centroids(step, found).astype(np.float64)
    unit_ND = vec_ND.astype(np.float64)
    cos_NK = unit_ND @ unit_KD.T / np.linalg.norm(unit_ND, axis=1)[:, None] / np.linalg.norm(unit_KD, axis=1)
    cluster_N, distance_N = assigned(step, found)
    np.testing.assert_array_equal(cluster_N, cos_NK.argmax(axis=1))
    np.testing.assert_allclose(distance_N, 1 - cos_NK.max(axis=1), atol=1e-6)
    assert len(found.objective) == 1 + 4
    exact = found.objective[1:]
    assert all(after <= before + 1e-7 for before, after in itertools.pairwise(exact))
    assert distance_N.mean() <= exact[-1] + 1e-7


def test_sizes_and_sums_of_distances_are_exact():
    vec_ND = blobs(80, seed=5)
    step = step_of(vec_ND, [3, 40], group_units=2)
    found = fitted(step)
    cluster_N, distance_N = assigned(step, found)
    size_K, distance_K = sums_of(step.run.rows(found.sizes.grouped(2).parts[0]), found.k)
    assert size_K.tolist() == np.bincount(cluster_N, minlength=4).tolist()
    units_N = np.rint(distance_N.astype(np.float64) / DISTANCE_UNIT)
    assert distance_K.tolist() == [units_N[cluster_N == k].sum() * DISTANCE_UNIT for k in range(4)]
    np.testing.assert_allclose(distance_K, np.bincount(cluster_N, weights=distance_N.astype(np.float64)), rtol=1e-6)


@pytest.mark.goal("R11")
def test_there_are_at_most_as_many_clusters_as_survivors():
    step = step_of(blobs(5), [2], problem=[0, 3])
    found = fitted(step, clusters=100)
    assert found.k == 3
    cluster_N, distance_N = assigned(step, found)
    assert sorted(cluster_N) == [0, 1, 2]
    np.testing.assert_allclose(distance_N, 0, atol=1e-6)


@pytest.mark.goal("R11")
def test_rows_with_a_problem_are_in_no_cluster():
    for group_units, first in ((1, 10), (2, 0)):
        step = step_of(blobs(30), [10], group_units, problem=range(0, 30, 3))
        table = steps.table_of(step, fitted(step).assigned)
        expected = [r for r in range(10) if r % 3] + [r - first for r in range(10, 30) if r % 3]
        assert table.column("at").to_pylist() == expected


@pytest.mark.goal("R11")
def test_copies_leave_empty_clusters():
    vec_ND = np.repeat(blobs(2, seed=1), 10, axis=0)
    step = step_of(vec_ND, [7])
    found = fitted(step, clusters=8)
    size_K, distance_K = sums_of(step.run.rows(found.sizes.grouped(2).parts[0]), 8)
    assert sorted(size_K.tolist()) == [0, 0, 0, 0, 0, 0, 10, 10]
    assert not distance_K[size_K == 0].any()


def test_few_survivors_are_all_trained_on_whatever_the_sample():
    vec_ND = blobs(300, clusters=3)
    few, all_ = (fitted(step_of(vec_ND), clusters=3, sample=s, passes=0) for s in (1, 10_000))
    assert few.centroids.parts[0].id == all_.centroids.parts[0].id


def test_where_all_are_trained_on_it_makes_no_difference_that_the_pool_is_large(monkeypatch):
    step = step_of(blobs(300, clusters=3), [70, 200], problem=[0, *range(70, 90), 299])
    whole = fitted(step, clusters=3, passes=0)
    assert "cluster_draw" not in {e["stage"] for e in step.run.times}
    monkeypatch.setattr("pipeline.cluster.SAMPLE_ROWS", 299)
    drawn = fitted(step, clusters=3, passes=0)
    assert "cluster_draw" in {e["stage"] for e in step.run.times}
    [[of_whole], [of_drawn]] = whole.centroids.facts(), drawn.centroids.facts()
    assert of_whole == of_drawn and of_whole["sample"] == 278
    assert whole.centroid_file(step) == drawn.centroid_file(step)


def test_of_many_survivors_a_sample_by_hash_is_trained_on():
    rows = LEAST_ROWS + 1500
    vec_ND = blobs(rows, dims=2)
    found = []
    for ends in ([], [1000, 4000]):
        step = step_of(vec_ND, ends)
        fit = fitted(step, clusters=2, sample=100, passes=0)
        [facts] = fit.centroids.facts()
        assert LEAST_ROWS - 400 < facts["sample"] < LEAST_ROWS + 400
        found.append(fit.centroid_file(step))
    assert found[0] == found[1]


def test_text_vectors_are_a_space_of_their_own():
    image_ND, text_ND = blobs(20, seed=1), blobs(20, seed=2)
    step = steps.step_of(
        steps.memory_run(), [steps.uids(*range(20))], evidence={"clip": [steps.evidence_of(image_ND, text_ND)]}
    )
    by_text = Clustering(2, 100, 5, 1).fit(step, "clip.text")
    only = step_of(text_ND)
    np.testing.assert_array_equal(assigned(step, by_text)[0], assigned(only, fitted(only, 2, 1))[0])


def test_a_step_without_survivors_has_an_assignment_without_rows_and_a_state_of_its_own():
    step = step_of(blobs(3), [1], problem=[0, 1, 2])
    outcome = nobody(step)
    assert outcome.assign is not None and outcome.assign.num_rows == 0
    centroid = np.load(io.BytesIO(outcome.files["centroids.npy"]), allow_pickle=False)
    assert (centroid.shape, centroid.dtype) == ((1, 1), np.float32)
    assert [f["dropped"] for f in outcome.state.facts()] == [{}, {}]
    assert steps.state_of(step, outcome).column("reason").to_pylist() == ["earlier"] * 3


def test_health_by_hand():
    assert health(np.array([0, 1, 3, 4]), [0.5, 0.123456789]) == {
        "clusters": 4,
        "empty": 1,
        "size_min": 1,
        "size_median": 3.0,
        "size_max": 4,
        "gini": 0.25,
        "objective": [0.5, 0.123457],
    }
    assert health(np.array([2, 2]), [])["gini"] == 0
    assert health(np.zeros(2, np.int64), [])["size_max"] == 0


@pytest.mark.parametrize("threads", [2, 3])
def test_the_centroids_of_a_sample_do_not_depend_on_the_threads(threads):
    vec_ND = blobs(3000, clusters=20, dims=48)
    one, many = (kmeans.train(vec_ND, 40, 10, 0, n)[0] for n in (1, threads))
    np.testing.assert_array_equal(one, many)
