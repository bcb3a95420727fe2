"""Density-based pruning: clusters and their sizes in, how many samples each cluster keeps out."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from pipeline.arrow import hexes
from pipeline.cluster import MOST_PER_CLUSTER, Clustering, centroids_of, health, nobody, sums_of
from pipeline.exact import last_value_bits
from pipeline.machine import Machine
from pipeline.parts import given, to_parquet
from pipeline.quota import Ranks, cut_of, exact_cut, key_table, keys_of, ranked, taken
from pipeline.stage import Function, Made, Rows
from pipeline.state import alive, drop
from pipeline.step import RULE, Base, Keep, Outcome, Step
from pipeline.vectors import Bools, Float32s, Float64s, draw, from_ordered_bits, norms, ordered_bits

CELLS = 2**22  # cosines held at a time: 32 MiB
REMAINDER_BITS = 30  # 1e-9 of a sample
BIN_BITS = 12
NEWTON_STEPS = 16


def d_inter(centroid_KD: Float32s, live_K: Bools, neighbours: int) -> Float64s:
    """Mean distance, 1 - cosine, of each live centroid to its nearest other live centroids.

    A centroid leaves itself out by its id, so centroids that coincide are at distance 0 from each other.

    Args:
        centroid_KD: float32, shape (K, D), unit rows.
        live_K: bool, shape (K,): clusters that have members.
        neighbours: centroids in the mean, at least 1; all others where there are fewer.

    Returns:
        float64, shape (K,), in [0, 2]: NaN where a cluster is not live, 0 where only one is.

    Source: DBP, arXiv:2401.04578, section 3 (d_inter; l = 20).
    """
    mean_K = np.full(len(centroid_KD), np.nan)
    live = np.flatnonzero(live_K)
    count = min(neighbours, len(live) - 1)
    if count < 1:
        mean_K[live] = 0
        return mean_K
    vec_LD = centroid_KD[live].astype(np.float64)
    norm_L = norms(vec_LD)
    block_rows = max(1, CELLS // len(live))
    for start in range(0, len(live), block_rows):
        # Divided after the product, which is exact for centroids on the grid of `kmeans` and so in any order of sums.
        distance_BL = vec_LD[start : start + block_rows] @ vec_LD.T
        distance_BL /= norm_L[start : start + block_rows, None] * norm_L
        np.subtract(1, distance_BL, out=distance_BL)
        own_B = np.arange(len(distance_BL))
        distance_BL[own_B, start + own_B] = np.inf
        nearest_BL = np.partition(distance_BL, count - 1, axis=1)[:, :count]
        mean_K[live[start + own_B]] = np.maximum(np.sort(nearest_BL, axis=1), 0).mean(axis=1)
    return mean_K


def softmax(complexity_K: Float64s, temperature: float) -> Float64s:
    """Probability of each cluster, exp(complexity / temperature) over the sum of all.

    Args:
        complexity_K: float64, shape (K,): NaN for a cluster without members.
        temperature: above 0; the lower, the more the complex clusters get.

    Returns:
        float64, shape (K,): sums to 1 over the clusters with a complexity, NaN for the others.

    Source: DBP, arXiv:2401.04578, section 3 (temperature 0.1).
    """
    weight_K: Float64s = np.exp((complexity_K - np.nanmax(complexity_K)) / temperature)
    weight_K /= np.nansum(weight_K)
    return weight_K


def project(
    target_K: Float64s, low_K: NDArray[np.int64], high_K: NDArray[np.int64], total: int
) -> tuple[Float64s, float]:
    """The quotas nearest to the targets, by least squares, that keep the bounds and sum to `total`.

    They are clip(target + shift, low, high) for the one shift that makes the sum right: the Karush-Kuhn-Tucker
    condition of the quadratic program that the paper solves numerically.

    Args:
        target_K: float64, shape (K,), at least 0; of no account, and NaN allowed, where low and high are equal.
        low_K: int64, shape (K,), from 0 to `high_K`.
        high_K: int64, shape (K,).
        total: from the sum of `low_K` to the sum of `high_K`.

    Returns:
        float64, shape (K,): the quotas; and the shift. Both to within 2**-62 of the largest target or the sum of
        `high_K`, and to their own 53 bits.

    Raises:
        ValueError: no quotas within the bounds sum to `total`.

    Source: DBP, arXiv:2401.04578, equation 3.
    """
    quota_K, shift, bits = _projected(target_K, low_K, high_K, total)
    return np.ldexp(quota_K, -bits), math.ldexp(shift, -bits)


def _projected(
    target_K: Float64s, low_K: NDArray[np.int64], high_K: NDArray[np.int64], total: int
) -> tuple[NDArray[np.int64], int, int]:
    """`project` in whole multiples of 2**-bits of a sample, so that every sum is exact, in any order: with the bits.

    The quotas fall short of `total` by less than one multiple for each cluster inside its bounds.
    """
    least, most = int(low_K.sum()), int(high_K.sum())
    if not least <= total <= most:
        raise ValueError(f"cannot share {total} samples: the clusters take {least} at least and {most} at most")
    if np.isnan(largest := target_K.max()):
        target_K = np.where(low_K < high_K, target_K, 0.0)
        largest = target_K.max()
    bits = 62 - max(most, int(largest)).bit_length()  # a target and a bound together stay below 2**63
    # In one block: malloc keeps it for the next call, where fresh pages for each row take longer than all the sums.
    aim_K, bottom_K, top_K, shifted_K = np.empty((4, len(target_K)), np.int64)
    scaled_K = np.multiply(target_K, 2.0**bits, out=shifted_K.view(np.float64))
    aim_K[:] = np.rint(scaled_K, out=scaled_K)
    np.left_shift(low_K, bits, out=bottom_K)
    np.left_shift(high_K, bits, out=top_K)

    # The sum of the quotas grows with the shift, in straight lines: Newton's method, inside a bracket, halved instead
    # where a step leaves it or there were many. Four steps are common, and each is some passes over the clusters.
    below, above = int(bottom_K.min()) - int(aim_K.max()), int(top_K.max()) - int(aim_K.min()) + 1
    shift, want, quota_K = 0, total << bits, np.empty_like(aim_K)
    for steps in itertools.count(1):
        np.add(aim_K, shift, out=shifted_K)
        np.maximum(shifted_K, bottom_K, out=quota_K)
        np.minimum(quota_K, top_K, out=quota_K)
        left = want - int(quota_K.sum())
        inside = int(np.count_nonzero(quota_K == shifted_K))
        if 0 <= left < max(inside, 1):
            break
        below, above = (shift, above) if left > 0 else (below, shift)
        shift = shift + left // inside if inside and steps < NEWTON_STEPS else below
        if not below < shift < above:
            shift = (below + above) // 2
    return quota_K, shift, bits


def allocate(target_K: Float64s, low_K: NDArray[np.int64], high_K: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Whole quotas that sum to `total`: the projection, rounded by largest remainder, ties to the lowest cluster.

    The same on every processor, for all sums are of integers.

    Args:
        target_K: float64, shape (K,), as for `project`.
        low_K: int64, shape (K,), from 0 to `high_K`.
        high_K: int64, shape (K,), of a sum below 2**48.
        total: from the sum of `low_K` to the sum of `high_K`.

    Returns:
        int64, shape (K,): within the bounds.

    Raises:
        ValueError: no quotas within the bounds sum to `total`.
    """
    real_K, _, bits = _projected(target_K, low_K, high_K, total)
    # Compared in steps, so that equal remainders tie whatever their last bits are, and a whole number that rounding
    # put just below itself is whole again.
    if bits > REMAINDER_BITS:
        real_K += 1 << (bits - REMAINDER_BITS - 1)
        real_K >>= bits - REMAINDER_BITS
        bits = REMAINDER_BITS
    quota_K = real_K >> bits
    if more := total - int(quota_K.sum()):
        remainder_K = real_K & ((1 << bits) - 1)
        least = nth_largest(remainder_K, bits, more)
        real_K += (1 << bits) - least
        np.right_shift(real_K, bits, out=quota_K)  # one more from `least` on
        tied = np.flatnonzero(remainder_K == least)
        quota_K[tied[len(tied) - (int(quota_K.sum()) - total) :]] -= 1
    return quota_K


def nth_largest(value_K: NDArray[np.int64], bits: int, n: int) -> int:
    """The n-th largest value; a histogram and the sort of one bin, a fifth of the time of a partition.

    Args:
        value_K: int64, shape (K,), in [0, 2**bits).
        bits: at least BIN_BITS.
        n: from 1 to K.
    """
    bin_K = value_K >> (bits - BIN_BITS)
    at_least = np.bincount(bin_K, minlength=1 << BIN_BITS)[::-1].cumsum()[::-1]
    bin_of_it = int(np.count_nonzero(at_least >= n)) - 1
    beside = np.sort(value_K[bin_K == bin_of_it])
    return int(beside[at_least[bin_of_it] - n])


@pydantic_dataclass(frozen=True, config=RULE)
class Density:
    """Cluster the survivors anew, share the budget by complexity, keep so many of each cluster.

    Attributes:
        space: vectors to cluster: MODEL (image) or MODEL.text.
        clusters: K; at most as many as there are survivors.
        keep: the budget.
        neighbours: centroids in the mean of d_inter.
        temperature: of the softmax over complexities; the lower, the more the complex clusters get.
        of: what a fraction `keep` is of.
        pick: hard keeps the rows farthest from their centroid, easy the nearest, random by hash.
        floor: rows that each cluster keeps at least, where it has them; 0 if the budget does not reach for it.
        sample_per_cluster, iterations, passes: as Clustering has them.
    """

    space: str
    clusters: Annotated[int, Field(ge=1)]
    keep: Keep
    neighbours: Annotated[int, Field(ge=1)] = 20
    temperature: Annotated[float | int, Field(gt=0)] = 0.1
    of: Base = "survivors"
    pick: Literal["hard", "easy", "random"] = "hard"
    floor: Annotated[int, Field(ge=0)] = 1
    sample_per_cluster: Annotated[int, Field(ge=1, le=MOST_PER_CLUSTER)] = 10_000
    iterations: Annotated[int, Field(ge=1)] = 20
    passes: Annotated[int, Field(ge=0)] = 2

    def uses_columns(self) -> dict[str, pa.DataType]:
        return {}

    def apply(self, step: Step) -> Outcome:
        if not step.survivors:
            passed = nobody(step)
            empty = pa.table([[0], [0], *[[None]] * 5, [0]], schema=CLUSTERS)
            return replace(passed, files={**passed.files, "clusters.parquet": to_parquet(empty)})
        clustering = Clustering(self.clusters, self.sample_per_cluster, self.iterations, self.passes)
        found = clustering.fit(step, self.space)
        share = Share(self.neighbours, float(self.temperature), self.floor)
        total = given([{"total": step.budget(self.keep, self.of)}])
        table = step.run.map(share, found.sizes.grouped(len(found.sizes)), found.centroids, total)["clusters"]
        rank = Rank(self.pick, step.seed, step.name)
        rows = step.run.map(rank, found.assigned, step.samples)["ranked"]
        cut, left = exact_cut(step.run, rows, step.samples, step.places, table, 64 if self.pick == "random" else 32)
        many = len(rows)
        cuts, known = cut.spread(many), (left, found.assigned, step.samples, step.places)
        if self.pick == "random":
            last = step.run.map(LastDrawn(), rows, cuts, *known)["last"]
            bounds = step.run.map(DrawnBounds(found.k), last.grouped(many))["bounds"]
        else:
            bounds = step.run.map(Bounds(self.pick), cut)["bounds"]
        done = step.run.map(Prune(step.number), step.state, rows, cuts, bounds.spread(many), *known)
        clusters = step.run.rows(table.parts[0]).table()
        files = {"centroids.npy": found.centroid_file(step), "clusters.parquet": to_parquet(clusters)}
        figures = health(clusters.column("size").to_numpy(), found.objective) | next(table.facts())
        return Outcome(done["state"], done["dropped"], found.assigned, files, figures)


CLUSTERS = pa.schema(
    [
        ("cluster", pa.int32()),
        ("size", pa.int64()),
        ("d_intra", pa.float64()),
        ("d_inter", pa.float64()),
        ("complexity", pa.float64()),
        ("probability", pa.float64()),
        ("target", pa.float64()),
        ("quota", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Share:
    """How many rows each cluster keeps."""

    neighbours: int
    temperature: float
    floor: int

    name: ClassVar[str] = "density_share"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("clusters",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.share

    def share(self, sizes: Rows, centroids: Rows, total: Rows) -> Made:
        centroid_KD = centroids_of(centroids)
        size_K, distance_K = sums_of(sizes, len(centroid_KD))
        live_K, budget = size_K > 0, int(total.given["total"])
        intra_K = np.divide(distance_K, size_K, out=np.full(len(size_K), np.nan), where=live_K)
        inter_K = d_inter(centroid_KD, live_K, self.neighbours)
        complexity_K = intra_K * inter_K
        probability_K = softmax(complexity_K, self.temperature)
        target_K = probability_K * budget
        low_K = np.minimum(self.floor, size_K)
        floor = self.floor if int(low_K.sum()) <= budget else 0
        quota_K = allocate(target_K, np.minimum(floor, size_K), size_K, budget)
        columns = (np.arange(len(size_K)), size_K, intra_K, inter_K, complexity_K, probability_K, target_K, quota_K)
        arrays = [pa.array(c, f.type, from_pandas=True) for c, f in zip(columns, CLUSTERS, strict=True)]
        facts = {
            "floor": floor,
            "capped": int((live_K & (quota_K == size_K)).sum()),
            "complexity_min": float(np.nanmin(complexity_K)),
            "complexity_median": float(np.nanmedian(complexity_K)),
            "complexity_max": float(np.nanmax(complexity_K)),
        }
        return Made({"clusters": pa.table(arrays, schema=CLUSTERS)}, facts)


@dataclass(frozen=True)
class Rank:
    """Every survivor of a group, in the order in which its cluster keeps rows."""

    pick: str
    seed: int
    step: str

    name: ClassVar[str] = "density_rank"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("ranked",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.rank

    def rank(self, assigned: Rows, samples: Rows) -> Made:
        at_M, cluster_M, distance_M = clustered(assigned)
        if self.pick == "random":
            uid = samples.table(["uid"]).column("uid").take(pa.array(at_M))
            bits_M = draw(self.seed, self.step, [h or "" for h in hexes(uid)])
        else:
            bits_M = ordered_bits(distance_M) if self.pick == "easy" else ~ordered_bits(distance_M)
        rows = sum(samples.lengths)
        in_N, bits_N, group_N = np.zeros(rows, bool), np.zeros(rows, bits_M.dtype), np.zeros(rows, np.int32)
        in_N[at_M], bits_N[at_M], group_N[at_M] = True, bits_M, cluster_M
        return Made({"ranked": ranked(bits_N, in_N, group_N)})


def clustered(assigned: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each survivor of a group: position, int32 cluster, float32 distance."""
    table = assigned.table()
    at_M, cluster_M, distance_M = (table.column(name).to_numpy() for name in ("at", "cluster", "distance"))
    return at_M, cluster_M, distance_M


@dataclass(frozen=True)
class Bounds:
    """The distance of the last row that each cluster keeps, by which they are ranked; null where it keeps none."""

    pick: str

    name: ClassVar[str] = "density_bounds"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("bounds",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.bounds

    def bounds(self, cut: Rows) -> Made:
        bits_K, known_K = last_value_bits(cut_of(cut))
        distance_K = from_ordered_bits(bits_K if self.pick == "easy" else ~bits_K).astype(np.float64)
        return Made({"bounds": pa.table({"distance": pa.array(distance_K, mask=~known_K)})})


@dataclass(frozen=True)
class LastDrawn:
    """Of a group, the rows that may be the last that their cluster keeps of a draw: those of its last hash."""

    name: ClassVar[str] = "density_last"
    version: ClassVar[int] = 3
    outputs: ClassVar[tuple[str, ...]] = ("last",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.last

    def last(self, rows: Rows, cut: Rows, left: Rows, assigned: Rows, samples: Rows, place: Rows) -> Made:
        found = cut_of(cut)
        ranks = Ranks.of(rows.table())
        keep_N = taken(found, ranks, left, samples, place)
        last = ranks.last(found)
        kept = ranks.take(last[keep_N[ranks.at[last]]])
        at_M, _, distance_M = clustered(assigned)
        distance = pa.array(distance_M[np.searchsorted(at_M, kept.at)])
        return Made({"last": key_table(kept.group, kept.keys(samples, place)).append_column("distance", distance)})


@dataclass(frozen=True)
class DrawnBounds:
    """The distance of the last row that each cluster keeps of a draw; null where it keeps none."""

    k: int

    name: ClassVar[str] = "density_drawn_bounds"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("bounds",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.bounds

    def bounds(self, last: Rows) -> Made:
        merged = None
        for piece in last.pieces():
            merged = last_of_each(piece if merged is None else pa.concat_tables([merged, piece]))
        bound_K = np.full(self.k, np.nan)
        if merged is not None:
            bound_K[merged.column("group").to_numpy()] = merged.column("distance").to_numpy()
        return Made({"bounds": pa.table({"distance": pa.array(bound_K, from_pandas=True)})})


def last_of_each(rows: pa.Table) -> pa.Table:
    """The row of the highest key in each group of a `quota.key_table`, by group."""
    group_M, keys = keys_of(rows)
    order_M = np.lexsort((*keys.words[::-1], group_M))
    ends = np.flatnonzero(np.diff(group_M[order_M], append=-1))
    return rows.take(pa.array(order_M[ends]))


@dataclass(frozen=True)
class Prune:
    """Drop what is over its cluster's quota."""

    number: int

    name: ClassVar[str] = "density_prune"
    version: ClassVar[int] = 3
    outputs: ClassVar[tuple[str, ...]] = ("state", "dropped")
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.prune

    def prune(
        self,
        state: Rows,
        rows: Rows,
        cut: Rows,
        bounds: Rows,
        left: Rows,
        assigned: Rows,
        samples: Rows,
        place: Rows,
    ) -> Made:
        before = state.table()
        at_M, cluster_M, distance_M = clustered(assigned)
        bound_K = bounds.table().column("distance").to_numpy(zero_copy_only=False)
        value_N, bound_N = np.full(before.num_rows, np.nan), np.full(before.num_rows, np.nan)
        value_N[at_M], bound_N[at_M] = distance_M, bound_K[cluster_M]
        drop_N = alive(before) & ~taken(cut_of(cut), Ranks.of(rows.table()), left, samples, place)
        value, bound = (pa.array(v[drop_N], pa.float64(), from_pandas=True) for v in (value_N, bound_N))
        return drop(before, self.number, drop_N, samples.lengths, "over_quota", value, bound)
