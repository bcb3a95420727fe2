"""density as a step: complexity, quotas and picks worked out again from the evidence, for any partition."""

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import vectors
from pipeline.arrow import fixed
from pipeline.cluster import DISTANCE_UNIT
from pipeline.parts import given as told
from pipeline.quota import exact_cut, ranked
from pipeline.select.density import CLUSTERS, Density, DrawnBounds, LastDrawn, Share
from pipeline.stage import Made
from tests import steps
from tests.steps import Told


def blobs(rows, clusters=5, dims=8, seed=0):
    """float16 (rows, dims): clusters of different spread, and copies that tie."""
    rng = np.random.default_rng(seed)
    which = rng.integers(clusters, size=rows)
    vec_ND = rng.normal(size=(clusters, dims))[which] + (0.05 + 0.2 * which[:, None]) * rng.normal(size=(rows, dims))
    vec_ND[1::7] = vec_ND[0]
    return vectors.unit16(vec_ND)[0]


def step_of(vec_ND, ends=(), group_units=1, problem=()):
    rows = [
        {"uid": (1000 - n).to_bytes(16, "big")} | ({"problem": "bad_metadata"} if n in problem else {})
        for n in range(len(vec_ND))
    ]
    cuts = list(zip([0, *ends], [*ends, len(vec_ND)], strict=True))
    return steps.step_of(
        steps.memory_run(),
        [steps.samples_of(*rows[a:b]) for a, b in cuts],
        evidence={"clip": [steps.evidence_of(vec_ND[a:b]) for a, b in cuts]},
        group_units=group_units,
        name="01-density",
    )


def clusters_of(outcome):
    table = pq.read_table(io.BytesIO(outcome.files["clusters.parquet"]))
    assert table.schema == CLUSTERS
    return {
        name: np.array([np.nan if v is None else v for v in table.column(name).to_pylist()])
        for name in table.column_names
    }


def assigned(step, outcome):
    table = steps.table_of(step, outcome.assign)
    return table.column("cluster").to_numpy(), table.column("distance").to_numpy()


RULES = [
    Density("clip", clusters=5, keep=0.4, iterations=5),
    Density("clip", clusters=5, keep=0.4, iterations=5, pick="easy", temperature=0.01),
    Density("clip", clusters=5, keep=0.4, iterations=5, pick="random", of="pool"),
    Density("clip", clusters=9, keep=7, iterations=5, neighbours=2, floor=0),
    Density("clip", clusters=4, keep=50, iterations=5, floor=9, temperature=1),
    Density("clip", clusters=30, keep=10, iterations=5, floor=3),
    Density("clip", clusters=1, keep=0.5, iterations=5),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("partition", [((), 1), ((20, 21, 21, 60), 2)])
def test_a_step_worked_out_again_from_its_evidence(rule, partition):
    vec_ND, problem = blobs(90), [0, 50]
    step = step_of(vec_ND, *partition, problem=problem)
    alive = [row for row in range(90) if row not in problem]
    outcome = rule.apply(step)
    cluster_M, distance_M = assigned(step, outcome)
    stats = clusters_of(outcome)
    k = rule.clusters
    assert stats["cluster"].tolist() == list(range(k))
    size_K = np.bincount(cluster_M, minlength=k)
    assert stats["size"].tolist() == size_K.tolist()
    live = size_K > 0
    intra = np.bincount(cluster_M, weights=distance_M.astype(np.float64), minlength=k)[live] / size_K[live]
    np.testing.assert_allclose(stats["d_intra"][live], intra, rtol=1e-5, atol=1e-11)
    centroid_KD = np.load(io.BytesIO(outcome.files["centroids.npy"]), allow_pickle=False)
    unit_KD = centroid_KD / np.linalg.norm(centroid_KD.astype(np.float64), axis=1, keepdims=True)
    others = min(rule.neighbours, int(live.sum()) - 1)
    inter = [
        np.sort([1 - a @ b for j, b in enumerate(unit_KD[live]) if i != j])[:others].mean() if others else 0
        for i, a in enumerate(unit_KD[live])
    ]
    np.testing.assert_allclose(stats["d_inter"][live], inter, atol=1e-6)
    complexity = stats["d_intra"][live] * stats["d_inter"][live]
    np.testing.assert_array_equal(stats["complexity"][live], complexity)
    weight = np.exp(complexity / rule.temperature)
    np.testing.assert_allclose(stats["probability"][live], weight / weight.sum(), rtol=1e-9)
    base = 90 if rule.of == "pool" else 88
    total = min(rule.keep if isinstance(rule.keep, int) else math.floor(round(rule.keep * base, 9)), 88)
    np.testing.assert_allclose(stats["target"][live], stats["probability"][live] * total)
    for name in ("d_intra", "d_inter", "complexity", "probability", "target"):
        assert np.isnan(stats[name][~live]).all()
    quota_K = stats["quota"].astype(int)
    assert quota_K.sum() == total
    floor = rule.floor if np.minimum(rule.floor, size_K).sum() <= total else 0
    assert (np.minimum(floor, size_K) <= quota_K).all() and (quota_K <= size_K).all()

    value = {
        "hard": lambda m: -distance_M[m],
        "easy": lambda m: distance_M[m],
        "random": lambda m: int(vectors.draw(0, "01-density", [f"{1000 - alive[m]:032x}"])[0]),
    }[rule.pick]
    expected, bound = set(), {}
    for cluster in range(k):
        order = sorted(np.flatnonzero(cluster_M == cluster), key=lambda m: (value(m), 1000 - alive[m]))
        expected |= {alive[m] for m in order[: quota_K[cluster]]}
        bound[cluster] = float(distance_M[order[quota_K[cluster] - 1]]) if quota_K[cluster] else None
    assert steps.kept(step, outcome) == sorted(expected)
    said = steps.verdicts(step, outcome)
    for m, row in enumerate(alive):
        dropped = ("over_quota", float(distance_M[m]), bound[cluster_M[m]])
        assert said[row] == ((None, None, None) if row in expected else dropped)


def test_the_partition_changes_nothing():
    found = []
    for ends, group_units in [((), 1), ((30, 31), 1), ((5, 30, 60, 61), 3)]:
        step = step_of(blobs(90), ends, group_units)
        outcome = Density("clip", clusters=6, keep=0.3, iterations=5).apply(step)
        found.append((steps.kept(step, outcome), *(outcome.files[name] for name in sorted(outcome.files))))
    assert all(f == found[0] for f in found)


def test_no_budget_keeps_nothing_and_names_no_bound():
    step = step_of(blobs(9))
    outcome = Density("clip", clusters=2, keep=0.1, iterations=1).apply(step)
    assert steps.kept(step, outcome) == []
    assert {(reason, bound) for reason, _, bound in steps.verdicts(step, outcome)} == {("over_quota", None)}
    assert clusters_of(outcome)["quota"].tolist() == [0, 0]


def test_more_clusters_than_survivors_keep_as_many_as_asked_for():
    step = step_of(blobs(6), problem=[3])
    outcome = Density("clip", clusters=50, keep=3, iterations=2).apply(step)
    assert len(steps.kept(step, outcome)) == 3
    assert len(clusters_of(outcome)["size"]) == 5


def test_without_survivors_there_is_one_empty_cluster():
    step = step_of(blobs(3), problem=[0, 1, 2])
    outcome = Density("clip", clusters=4, keep=2).apply(step)
    table = pq.read_table(io.BytesIO(outcome.files["clusters.parquet"]))
    row = dict.fromkeys(CLUSTERS.names) | {"cluster": 0, "size": 0, "quota": 0}
    assert table.to_pylist() == [row]
    assert table.schema == CLUSTERS
    assert outcome.assign.num_rows == 0


def test_changed_quotas_use_the_clusters_that_are_there():
    step = step_of(blobs(60), (30,))
    Density("clip", clusters=4, keep=0.5, iterations=3).apply(step)
    step.run.times.clear()
    Density("clip", clusters=4, keep=0.2, iterations=3, temperature=0.5).apply(step)
    assert not {e["stage"] for e in step.run.times} & {"cluster_draw", "cluster_train", "cluster_sum", "cluster_assign"}


def test_the_last_drawn_of_equal_rows_is_the_last_by_uid_that_the_quota_takes():
    run = steps.memory_run()
    samples = steps.stored(run, [steps.uids(5, 3, 9)])
    places = told([{"first_unit": 0}])
    rows = steps.stored(run, [ranked(np.full(3, 7, np.uint64), np.ones(3, bool), np.zeros(3, np.int32))])
    assigned = pa.table({"at": [0, 1, 2], "cluster": [0, 0, 0], "distance": np.array([0.5, 0.25, 0.75], np.float32)})
    for quota, bound in [(1, 0.25), (2, 0.5), (3, 0.75)]:
        cut, left = exact_cut(run, rows, samples, places, told([{"quota": [quota]}]), 64)
        found = [run.rows(dataset.parts[0]) for dataset in (rows, cut, left)]
        told_rows = Told(assigned), *(run.rows(dataset.parts[0]) for dataset in (samples, places))
        last = LastDrawn().last(*found, *told_rows).tables["last"]
        bounds = DrawnBounds(1).bounds(Told(last)).tables["bounds"]
        assert bounds.column("distance").to_pylist() == [bound]


def test_the_published_case_through_the_stage():
    """d_intra 0.1, 0.1, 0.03, 0.3 around centroids that are all at distance 1 from each other."""
    size = [100, 100, 100, 20]
    units = [round(mean * n / DISTANCE_UNIT) for mean, n in zip([0.1, 0.1, 0.03, 0.3], size, strict=True)]
    sizes = pa.table(
        {"cluster": range(4), "size": size, "high": [u >> 20 for u in units], "low": [u % 2**20 for u in units]}
    )
    centroids = pa.table({"vector": fixed(np.eye(4, dtype=np.float32))})
    made = Share(20, 0.1, 1).share(Told(sizes), Told(centroids), Told(given={"total": 120}))
    assert isinstance(made, Made)
    table = made.tables["clusters"]
    assert table.column("quota").to_pylist() == [36, 35, 29, 20]
    assert table.column("probability").to_pylist() == pytest.approx([0.101156816, 0.101156816, 0.050232988, 0.7474534])
    assert made.facts["floor"] == 1 and made.facts["capped"] == 1
    assert made.facts["complexity_max"] == pytest.approx(0.3)
