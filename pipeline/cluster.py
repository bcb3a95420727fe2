"""Concepts: survivors' vectors in, centroids and each survivor's cluster out.

k-means on a sample chosen by hash, then exact passes over all units (methods.md 1.1, reliability.md 2): sums of stored
float16 values are exact in float64, so the centroids are the same bits for any number of workers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline import kmeans
from pipeline.arrow import fixed, hexes, unfixed
from pipeline.machine import Machine
from pipeline.parts import Dataset
from pipeline.stage import Function, Made, Rows
from pipeline.state import alive, drop
from pipeline.step import Outcome, Step
from pipeline.vectors import draw

SAMPLE_ROWS = 1 << 22
"""Most vectors that k-means trains on, whatever the recipe asks for each cluster: 4.3 GB at 512 dims."""

MOST_PER_CLUSTER = 10**6
"""Rows to train on for each cluster: FAISS sums them in float32, which 10^7 of them saturate (reliability.md 2)."""

LEAST_ROWS = 1 << 12
"""Survivors up to which all are trained on: of few, a draw by hash may take none."""

ASSIGNED = [("at", pa.uint32()), ("cluster", pa.int32()), ("distance", pa.float32())]
"""Columns of an assignment: position in the group, cluster, 1 - cosine to its centroid."""

DISTANCE_UNIT = 2.0**-40
"""Distances are summed as whole multiples of this, so that the sum does not depend on its order."""


@dataclass(frozen=True)
class Clustering:
    """How a step clusters its survivors.

    Attributes:
        clusters: K; at most as many as there are survivors.
        sample_per_cluster: rows that k-means trains on for each cluster, from LEAST_ROWS to SAMPLE_ROWS in all.
        iterations: of k-means on the sample.
        passes: exact Lloyd passes over all survivors after it.
    """

    clusters: int
    sample_per_cluster: int
    iterations: int
    passes: int

    def fit(self, step: Step, space: str) -> Clusters:
        """Cluster the survivors of a step; at least one."""
        evidence, side = step.space(space)
        k = min(self.clusters, step.survivors)
        rows = max(min(k * self.sample_per_cluster, SAMPLE_ROWS), LEAST_ROWS)
        if is_drawn(rows, step.survivors, step.listed):
            by_hash = Draw(side, step.seed, step.name, min(1.0, rows / step.survivors))
            column, sample = "vector", [step.run.map(by_hash, evidence, step.samples, step.state)["drawn"]]
        else:
            column, sample = side, [evidence, step.state]
        train = Train(column, k, self.iterations, step.seed)
        trained = step.run.map(train, *(each.grouped(len(each)) for each in sample), gpu=True)["centroids"]
        centroids, objective = trained, next(trained.facts())["objective"]
        for _ in range(self.passes):
            spread = centroids.spread(len(step.state))
            sums = step.run.map(Sum(side), evidence, step.state, spread)["sums"]
            objective = [*objective, sum(f["distance"] for f in sums.facts()) / step.survivors]
            centroids = step.run.map(Recentre(), sums.grouped(len(sums)), centroids)["centroids"]
        spread = centroids.spread(len(step.state))
        assigned = step.run.map(Assign(side), evidence, step.state, spread)["assigned"]
        sizes = step.run.map(Measure(k), assigned)["sizes"]
        return Clusters(k, centroids, assigned, sizes, objective)


@dataclass(frozen=True)
class Clusters:
    """Survivors and their clusters.

    Attributes:
        k: clusters.
        centroids: one part: `vector`, float32 (K, D) unit rows.
        assigned: for each group: `at` (position in the group), `cluster`, `distance` of every survivor.
        sizes: for each group: `cluster`, `size`, and the sum of distances as `high` x 2^20 + `low` DISTANCE_UNITs.
        objective: mean distance to the nearest centroid: before each exact step on the sample, then on all survivors.
    """

    k: int
    centroids: Dataset
    assigned: Dataset
    sizes: Dataset
    objective: list[float]

    def centroid_file(self, step: Step) -> bytes:
        """centroids.npy of the run directory."""
        out = io.BytesIO()
        np.save(out, centroids_of(step.run.rows(self.centroids.parts[0])))
        return out.getvalue()


def is_drawn(rows: int, survivors: int, listed: int) -> bool:
    """Whether a sample to train on is copied; else, being all survivors, it is read where it lies.

    That is done by one task, which reads the vectors of the whole pool: they must be few.

    Args:
        rows: to train on; all, where `survivors` are fewer.
        survivors, listed: rows that enter the step, and those of the pool.
    """
    return rows < survivors or listed > SAMPLE_ROWS


def health(size_K: np.ndarray, objective: list[float]) -> dict[str, Any]:
    """Plain figures that show whether a clustering is sane.

    Args:
        size_K: int64 (K,).
        objective: mean distance by iteration.
    """
    live_L = np.sort(size_K[size_K > 0])
    n, total = len(live_L), int(live_L.sum())
    gini = float((2 * np.arange(1, n + 1) - n - 1) @ live_L / (n * total)) if total else 0.0
    return {
        "clusters": len(size_K),
        "empty": int((size_K == 0).sum()),
        "size_min": int(live_L[0]) if n else 0,
        "size_median": float(np.median(live_L)) if n else 0.0,
        "size_max": int(live_L[-1]) if n else 0,
        "gini": round(gini, 6),
        "objective": [round(v, 6) for v in objective],
    }


def centroids_of(rows: Rows) -> np.ndarray:
    """float32 (K, D) of a centroids part."""
    return unfixed(rows.table().column("vector"), np.float32)


def sums_of(sizes: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (K,) sizes and float64 (K,) sums of distances over all groups, whatever their order."""
    size_K = np.zeros(k, np.int64)
    units = [0] * k
    for piece in sizes.pieces():
        cluster, size, high, low = (piece.column(name).to_pylist() for name in ("cluster", "size", "high", "low"))
        for c, s, h, u in zip(cluster, size, high, low, strict=True):
            size_K[c] += s
            units[c] += (h << 20) + u
    return size_K, np.array([u * DISTANCE_UNIT for u in units])


def _centroids(centroid_KD: np.ndarray, facts: dict[str, Any]) -> Made:
    return Made({"centroids": pa.table({"vector": fixed(centroid_KD)})}, facts)


def _survivors(vectors: Rows, column: str, state: Rows | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each file: the positions of its survivors in the part, int64 (M,), and their stored vectors, float16 (M, D).

    Args:
        vectors: of one file after the other.
        column: of the vectors.
        state: of the same rows; None: all survive.
    """
    alive_N = alive(state.table(["dropped_by"])) if state else np.ones(sum(vectors.lengths), np.bool_)
    first = 0
    for piece in vectors.pieces([column]):
        mine, stored = np.flatnonzero(alive_N[first : first + piece.num_rows]), piece.column(column)
        yield first + mine, unfixed(stored if len(mine) == len(stored) else stored.take(pa.array(mine)), np.float16)
        first += piece.num_rows
        del piece, stored  # before the next is read


@dataclass(frozen=True)
class Draw:
    """A sample of the survivors' vectors, chosen by the hash of their uids.

    Attributes:
        side: image or text.
        seed, step: of the hash.
        fraction: of the survivors that are drawn, more or less; 1 takes all.
    """

    side: str
    seed: int
    step: str
    fraction: float

    name: ClassVar[str] = "cluster_draw"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("drawn",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.draw

    def draw(self, evidence: Rows, samples: Rows, state: Rows) -> Made:
        uids = samples.table(["uid"]).column("uid")
        below = math.floor(self.fraction * 2**64)
        drawn = []
        for at_M, vec_MD in _survivors(evidence, self.side, state):
            if self.fraction < 1:
                hash_M = draw(self.seed, self.step, [h or "" for h in hexes(uids.take(pa.array(at_M)))])
                vec_MD = vec_MD[hash_M < np.uint64(below)]
            drawn.append(fixed(vec_MD))
        return Made({"drawn": pa.table({"vector": pa.chunked_array(drawn)})})


def sampled(vectors: Rows, column: str, state: Rows | None = None) -> np.ndarray:
    """float16 (M, D) of all `_survivors`, which are most of what a worker holds that trains on them: never twice."""
    rows = sum(f["alive"] for f in state.facts) if state else sum(vectors.lengths)
    sample_MD, first = np.empty((0, 0), np.float16), 0
    for _, vec_PD in _survivors(vectors, column, state):
        if not first:
            sample_MD = np.empty((rows, vec_PD.shape[1]), np.float16)
        sample_MD[first : first + len(vec_PD)] = vec_PD
        first += len(vec_PD)
        del vec_PD  # before the next is read
    return sample_MD


@dataclass(frozen=True)
class Train:
    """Centroids of the sample.

    Attributes:
        column: of the vectors: image or text of all survivors; vector of a sample of them.
        k, iterations, seed: as kmeans.train has them.
    """

    column: str
    k: int
    iterations: int
    seed: int

    name: ClassVar[str] = "cluster_train"
    version: ClassVar[int] = 5
    outputs: ClassVar[tuple[str, ...]] = ("centroids",)
    exact: ClassVar[bool] = False  # the first centroids: FAISS's float32 sums differ between processors

    def build(self, machine: Machine) -> Function:
        def train(vectors: Rows, state: Rows | None = None) -> Made:
            sample_MD = sampled(vectors, self.column, state)
            gpu = machine.device != "cpu"
            centroid_KD, objective_I = kmeans.train(sample_MD, self.k, self.iterations, self.seed, machine.threads, gpu)
            return _centroids(centroid_KD, {"sample": len(sample_MD), "objective": objective_I.tolist()})

        return train


@dataclass(frozen=True)
class Sum:
    """Exact sums of a group's survivors by nearest centroid."""

    side: str

    name: ClassVar[str] = "cluster_sum"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("sums",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.sum

    def sum(self, evidence: Rows, state: Rows, centroids: Rows) -> Made:
        centroid_KD = centroids_of(centroids)
        sum_KD, size_K, distance = np.zeros(centroid_KD.shape), np.zeros(len(centroid_KD), np.int64), 0.0
        for _, vec_MD in _survivors(evidence, self.side, state):
            cluster_M, distance_M = kmeans.nearest(vec_MD, centroid_KD)
            partial_KD, partial_K = kmeans.partial_sums(vec_MD, cluster_M, len(centroid_KD))
            sum_KD += partial_KD
            size_K += partial_K
            distance += float(distance_M.sum(dtype=np.float64))
        return Made({"sums": pa.table({"sum": fixed(sum_KD), "size": pa.array(size_K)})}, {"distance": distance})


@dataclass(frozen=True)
class Recentre:
    """New centroids from the sums of all groups."""

    name: ClassVar[str] = "cluster_recentre"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("centroids",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.recentre

    def recentre(self, sums: Rows, centroids: Rows) -> Made:
        old_KD = centroids_of(centroids)
        sum_KD, size_K = np.zeros(old_KD.shape), np.zeros(len(old_KD), np.int64)
        for piece in sums.pieces():
            sum_KD += unfixed(piece.column("sum"), np.float64)
            size_K += piece.column("size").to_numpy()
        return _centroids(kmeans.recentre(sum_KD, size_K, old_KD), {})


@dataclass(frozen=True)
class Assign:
    """The nearest centroid of every survivor of a group."""

    side: str

    name: ClassVar[str] = "cluster_assign"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("assigned",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.assign

    def assign(self, evidence: Rows, state: Rows, centroids: Rows) -> Made:
        centroid_KD = centroids_of(centroids)
        found = [(at, *kmeans.nearest(vec, centroid_KD)) for at, vec in _survivors(evidence, self.side, state)]
        columns = [np.concatenate(parts) for parts in zip(*found, strict=True)]
        arrays = [pa.array(c, t) for c, (_, t) in zip(columns, ASSIGNED, strict=True)]
        return Made({"assigned": pa.table(arrays, schema=pa.schema(ASSIGNED))})


@dataclass(frozen=True)
class Measure:
    """Size and exact sum of distances of each cluster that has members in a group."""

    k: int

    name: ClassVar[str] = "cluster_measure"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("sizes",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.measure

    def measure(self, assigned: Rows) -> Made:
        table = assigned.table(["cluster", "distance"])
        cluster_M = table.column("cluster").to_numpy()
        units_M = np.rint(table.column("distance").to_numpy().astype(np.float64) / DISTANCE_UNIT).astype(np.int64)
        # bincount sums float64 weights; whole numbers below 2^53 are exact in it.
        high_K = np.bincount(cluster_M, weights=units_M >> 20, minlength=self.k).astype(np.int64)
        low_K = np.bincount(cluster_M, weights=units_M & (2**20 - 1), minlength=self.k).astype(np.int64)
        size_K = np.bincount(cluster_M, minlength=self.k)
        live = np.flatnonzero(size_K)
        columns = {"cluster": live.astype(np.int32), "size": size_K[live], "high": high_K[live], "low": low_K[live]}
        return Made({"sizes": pa.table({name: pa.array(values) for name, values in columns.items()})})


@dataclass(frozen=True)
class Nobody:
    """A step that no survivor enters: the state as it was, and an assignment without rows."""

    number: int

    name: ClassVar[str] = "cluster_nobody"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("assigned", "state", "dropped")
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.pass_on

    def pass_on(self, state: Rows, samples: Rows) -> Made:
        before = state.table()
        same = drop(before, self.number, np.zeros(len(before), bool), samples.lengths, "nothing")
        return Made({**same.tables, "assigned": pa.schema(ASSIGNED).empty_table()}, same.facts)


def nobody(step: Step) -> Outcome:
    """A clustering step without survivors: no rows, and one centroid that nothing is near."""
    out = io.BytesIO()
    np.save(out, np.ones((1, 1), np.float32))
    passed = step.run.map(Nobody(step.number), step.state, step.samples)
    return Outcome(passed["state"], passed["dropped"], passed["assigned"], {"centroids.npy": out.getvalue()})
