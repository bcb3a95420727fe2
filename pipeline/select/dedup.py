"""Semantic duplicates: the rows of a cluster, best first, in; each row's nearest earlier row out."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from pipeline.arrow import hexes, unfixed
from pipeline.cluster import ASSIGNED, MOST_PER_CLUSTER, Clustering, Clusters, health, nobody, sums_of
from pipeline.errors import SchemaError
from pipeline.machine import Machine
from pipeline.parts import Dataset
from pipeline.schema import UID
from pipeline.stage import Function, Made, Rows
from pipeline.state import drop, made
from pipeline.step import RULE, Outcome, Step, places_in
from pipeline.vectors import (
    Float16s,
    Float32s,
    all_cosines,
    draw,
    first_largest,
    norms,
    ordered_bits,
    row_cosine,
    uid_words,
)

BUCKET_ROWS = 1 << 20
"""Rows that one task compares, unless a single cluster has more: 1 GB of vectors at 512 dims."""

COMPARED = pa.schema([*ASSIGNED, ("max_cosine", pa.float32()), ("duplicate_of", UID)])
DENSE = 8  # near-tied pairs per row, above which one float64 product of the block is cheaper than pairs


class VecRows(Protocol):
    """float16 (N, D) stored unit rows, of which blocks are read: an array, a map of a file, or `Reordered`."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> Float16s: ...


class _Block(NamedTuple):
    """Some rows of a cluster."""

    row: NDArray[np.int64]  # (B,), ascending: their places in the cluster
    vec: Float16s  # (B, D), as stored
    unit: Float32s  # (B, D)


def repeats(vec_ND: VecRows, block_rows: int = 1024) -> tuple[Float32s, NDArray[np.int64]]:
    """For each row, the largest cosine to any earlier row, kept or not, and the earliest row that has it.

    A float32 product finds the rows that can be nearest; those are compared as `vectors.row_cosine` does. The answer
    does not depend on `block_rows`; memory is a few blocks, so the rows may be a map of a file larger than memory.

    Args:
        vec_ND: float16, shape (N, D), stored unit rows, best first: row 0 never repeats.
        block_rows: rows compared at a time, at least 1; changes speed and memory only.

    Returns:
        float32, shape (N,): the cosine, in [-1, 1], -1 for row 0; and int64, shape (N,): the row's place, -1 for row 0.

    Source: SemDeDup, arXiv:2303.09540, section 3 (maximum over the strict upper triangle of the cosine matrix).
    """
    # Rows with the same bytes are compared once: a later copy's best is its first copy, at cosine 1.
    first_N = _first_copies(vec_ND, block_rows)
    distinct_U = np.flatnonzero(first_N == np.arange(len(vec_ND)))
    cos_N = np.full(len(vec_ND), -1, np.float32)
    best_N = np.full(len(vec_ND), -1, np.int64)
    for start in range(0, len(distinct_U), block_rows):
        rows = _block(vec_ND, distinct_U[start : start + block_rows])
        cos_B, best_B = _nothing(len(rows.row))
        for begin in range(0, start + 1, block_rows):
            columns = rows if begin == start else _block(vec_ND, distinct_U[begin : begin + block_rows])
            _nearer(rows, columns, cos_B, best_B)
        cos_N[rows.row], best_N[rows.row] = cos_B, best_B
    cos_N[best_N < 0] = -1

    copy_C = np.flatnonzero(first_N < np.arange(len(vec_ND)))
    original_C = first_N[copy_C]
    best_N[copy_C] = np.where(cos_N[original_C] == 1, best_N[original_C], original_C)
    cos_N[copy_C] = 1
    return cos_N, best_N


def greedy(vec_ND: VecRows, min_cos: float, block_rows: int = 1024) -> tuple[Float32s, NDArray[np.int64]]:
    """As `repeats`, but compared with earlier kept rows only; a row is kept unless its cosine is above `min_cos`.

    Args:
        vec_ND: float16, shape (N, D), stored unit rows, best first: row 0 is kept.
        min_cos: in [-1, 1]: a row is dropped when its largest cosine, as float64, is above.
        block_rows: rows compared at a time, at least 1; changes speed and memory only.

    Returns:
        float32, shape (N,): the largest cosine to an earlier kept row, -1 for row 0; and int64, shape (N,): the
        earliest kept row that has it, -1 for row 0.
    """
    cos_N = np.full(len(vec_ND), -1, np.float32)
    best_N = np.full(len(vec_ND), -1, np.int64)
    kept = np.zeros(0, np.int64)
    for start in range(0, len(vec_ND), block_rows):
        rows = _block(vec_ND, np.arange(start, min(start + block_rows, len(vec_ND))))
        cos_B, best_B = _nothing(len(rows.row))
        for begin in range(0, len(kept), block_rows):
            _nearer(rows, _block(vec_ND, kept[begin : begin + block_rows]), cos_B, best_B)
        cos_BB = all_cosines(rows.vec, rows.vec)
        kept_B = np.zeros(len(rows.row), np.bool_)
        for here in range(len(rows.row)):
            kept_B[here] = float(cos_B[here]) <= min_cos
            if kept_B[here]:
                later = slice(here + 1, None)
                nearer = cos_BB[here, later] > cos_B[later]
                best_B[later][nearer] = start + here
                np.maximum(cos_B[later], cos_BB[here, later], out=cos_B[later])
        cos_N[rows.row], best_N[rows.row] = cos_B, best_B
        kept = np.concatenate([kept, rows.row[kept_B]])
    cos_N[best_N < 0] = -1
    return cos_N, best_N


def bucketise(size_K: NDArray[np.int64], max_rows: int) -> NDArray[np.int32]:
    """Put neighbouring clusters into buckets of at most `max_rows` rows; a larger cluster has a bucket of its own.

    Args:
        size_K: int64, shape (K,): rows of each cluster.
        max_rows: at least 1.

    Returns:
        int32, shape (K,): bucket of each cluster, from 0, without gaps, not descending.
    """
    bucket_K = np.zeros(len(size_K), np.int32)
    bucket, rows = 0, 0
    for cluster, size in enumerate(size_K.tolist()):
        if rows and size and rows + size > max_rows:
            bucket, rows = bucket + 1, 0
        bucket_K[cluster] = bucket
        rows += size
    return bucket_K


def _block(vec_ND: VecRows, row_B: NDArray[np.int64]) -> _Block:
    vec_BD = np.asarray(vec_ND[row_B])
    return _Block(row_B, vec_BD, (vec_BD / norms(vec_BD)[:, None]).astype(np.float32))


def _nothing(rows: int) -> tuple[Float32s, NDArray[np.int64]]:
    """No earlier row yet: below any cosine, so that a cosine of -1 counts."""
    return np.full(rows, -2, np.float32), np.full(rows, -1, np.int64)


def _first_copies(vec_ND: VecRows, block_rows: int) -> NDArray[np.int64]:
    """Place of the first row with the same bytes, by digest so that no rows are held: int64, shape (N,)."""
    first_N = np.empty(len(vec_ND), np.int64)
    seen: dict[bytes, int] = {}
    for start in range(0, len(vec_ND), block_rows):
        for place, vec_D in enumerate(np.ascontiguousarray(vec_ND[start : start + block_rows]), start):
            first_N[place] = seen.setdefault(hashlib.blake2b(vec_D.data, digest_size=16).digest(), place)
    return first_N


def _nearer(rows: _Block, columns: _Block, cos_B: Float32s, best_B: NDArray[np.int64]) -> None:
    """Update each row's largest cosine, and the earliest row that has it, in place, by the earlier rows of `columns`.

    Blocks of columns must come in order: an equal cosine further on is not nearer.
    """
    slack = np.float32((rows.unit.shape[1] + 8) * 2.0**-24)  # the most that a float32 dot of unit rows can be off
    cos_BC = rows.unit @ columns.unit.T
    later = columns.row >= rows.row[0]
    if later.any():
        cos_BC[:, later] = np.where(columns.row[later] < rows.row[:, None], cos_BC[:, later], -4)
    top_B = cos_BC.max(axis=1)
    near = np.flatnonzero((top_B >= cos_B - slack) & (top_B > -3))
    enough = np.maximum(cos_B, top_B - slack)[near] - slack
    if not len(near):
        return
    can_RC = cos_BC[near] >= enough[:, None]
    place_P = np.flatnonzero(can_RC)
    if len(place_P) > DENSE * len(near):
        exact_RC = np.where(can_RC, all_cosines(rows.vec[near], columns.vec), -4)
        column = exact_RC.argmax(axis=1)
        value = exact_RC[np.arange(len(near)), column]
    else:
        row_P, column_P = divmod(place_P, len(columns.row))
        exact_P = row_cosine(rows.vec[near][row_P], columns.vec[column_P])
        first = first_largest(exact_P, row_P)
        column, value = column_P[first], exact_P[first]
    better = value > cos_B[near]
    cos_B[near[better]] = value[better]
    best_B[near[better]] = columns.row[column[better]]


@pydantic_dataclass(frozen=True, config=RULE)
class Dedup:
    """Inside each cluster, drop a row whose cosine to an earlier row is above 1 - epsilon.

    Attributes:
        space: vectors to compare: MODEL (image) or MODEL.text.
        epsilon: cosine distance; the larger, the more is dropped.
        clusters: auto = one for each 8,000 survivors, at most 65,536.
        keep: which of two repeats is the earlier: hard = farther from the centroid, easy = nearer, random = by hash.
        rule: official compares with every earlier row, greedy with kept ones only.
        sample_per_cluster, iterations, passes: as Clustering has them.
    """

    space: str
    epsilon: Annotated[float | int, Field(ge=0, le=2)]
    clusters: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    keep: Literal["hard", "easy", "random"] = "hard"
    rule: Literal["official", "greedy"] = "official"
    sample_per_cluster: Annotated[int, Field(ge=1, le=MOST_PER_CLUSTER)] = 10_000
    iterations: Annotated[int, Field(ge=1)] = 20
    passes: Annotated[int, Field(ge=0)] = 0

    def uses_columns(self) -> dict[str, pa.DataType]:
        return {}

    def count(self, survivors: int) -> int:
        """K for so many survivors."""
        return self.clusters if self.clusters != "auto" else min(65_536, -(-survivors // 8000))

    def apply(self, step: Step) -> Outcome:
        if not step.survivors:
            return nobody(step)
        found = Clustering(self.count(step.survivors), self.sample_per_cluster, self.iterations, self.passes).fit(
            step, self.space
        )
        compared = self.compare(step, found)
        groups = len(step.state)
        repeat = DropRepeats(step.number, self._min_cos)
        done = step.run.map(repeat, step.state, found.assigned, compared, step.samples)
        sizes = sums_of(step.run.rows(found.sizes.grouped(groups).parts[0]), found.k)[0]
        files = {"centroids.npy": found.centroid_file(step)}
        return Outcome(done["state"], done["compared"], files, health(sizes, found.objective))

    def compare(self, step: Step, found: Clusters, bucket_rows: int = BUCKET_ROWS) -> Dataset:
        """Each survivor's nearest earlier row in its cluster; one part for each group, rows in any order.

        Args:
            step: whose survivors.
            found: their clusters.
            bucket_rows: as BUCKET_ROWS; never changes the result.
        """
        evidence, side = step.space(self.space)
        groups = len(step.state)
        buckets = step.run.map(Buckets(found.k, bucket_rows), found.sizes.grouped(groups))["buckets"]
        count = next(buckets.facts())["buckets"]
        scatter = Scatter(side, count)
        rows = (evidence, step.samples, found.assigned, step.places, buckets.spread(groups))
        scattered = step.run.map(scatter, *rows)["rows"].shuffled(count)
        within = Within(self.keep, step.seed, step.name, groups, self._min_cos if self.rule == "greedy" else None)
        return step.run.map(within, scattered)["compared"].shuffled(groups)

    @property
    def _min_cos(self) -> float:
        return 1 - float(self.epsilon)


@dataclass(frozen=True)
class Buckets:
    """Which clusters are compared by the same task."""

    k: int
    rows: int

    name: ClassVar[str] = "dedup_buckets"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("buckets",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.buckets

    def buckets(self, sizes: Rows) -> Made:
        bucket_K = bucketise(sums_of(sizes, self.k)[0], self.rows)
        return Made({"buckets": pa.table({"bucket": pa.array(bucket_K)})}, {"buckets": int(bucket_K[-1]) + 1})


@dataclass(frozen=True)
class Scatter:
    """A group's survivors with their vectors, sent to the bucket of their cluster."""

    side: str
    count: int

    name: ClassVar[str] = "dedup_scatter"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("rows",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.scatter

    def scatter(self, evidence: Rows, samples: Rows, assigned: Rows, place: Rows, buckets: Rows) -> Made:
        table = assigned.table()
        at_M = table.column("at").to_numpy()
        bucket_K = buckets.table().column("bucket").to_numpy()
        unit_N, row_N = places_in(samples, place)
        vectors, first = [], 0
        for piece in evidence.pieces([self.side]):
            mine = at_M[(at_M >= first) & (at_M < first + piece.num_rows)] - first
            vectors += piece.column(self.side).take(pa.array(mine)).chunks
            first += piece.num_rows
        columns = {
            "to": pa.array(bucket_K[table.column("cluster").to_numpy()]),
            "group": pa.array(np.full(len(at_M), place.given["group"], np.int32)),
            "at": table.column("at"),
            "cluster": table.column("cluster"),
            "distance": table.column("distance"),
            "uid": samples.table(["uid"]).column("uid").combine_chunks().take(table.column("at")),
            "unit": pa.array(unit_N[at_M]),
            "row": pa.array(row_N[at_M]),
            "vector": pa.chunked_array(vectors, evidence_type(vectors)),
        }
        return Made({"rows": pa.table(columns)}, buckets=self.count)


def evidence_type(chunks: list[pa.Array]) -> pa.DataType:
    """The type of vector chunks; that of one dimension where there are none."""
    return chunks[0].type if chunks else pa.binary(2)


@dataclass(frozen=True)
class Within:
    """Each row's nearest earlier row of its cluster, for the clusters of one bucket.

    Attributes:
        keep: order inside a cluster: hard, easy or random.
        seed, step: of the hash that orders at random.
        groups: destinations: each row's answer goes back to its group.
        min_cos: for the greedy rule; None for the official one, whose answer holds for every epsilon.
    """

    keep: str
    seed: int
    step: str
    groups: int
    min_cos: float | None

    name: ClassVar[str] = "dedup_within"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("compared",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        def within(rows: Rows) -> Made:
            with tempfile.TemporaryDirectory(dir=machine.scratch) as folder:
                return self.within(rows, Path(folder) / "vectors")

        return within

    def within(self, rows: Rows, spill: Path) -> Made:
        """Compare the rows of each cluster; vectors wait in a file, so that a cluster may be larger than memory."""
        table, vec_ND = _spilled(rows, spill)
        cluster_N, value_N = table.column("cluster").to_numpy(), self._order(table)
        high_N, low_N = uid_words(unfixed(table.column("uid"), np.uint8))
        unit_N, row_N = table.column("unit").to_numpy(), table.column("row").to_numpy()
        order_N = np.lexsort((row_N, unit_N, low_N, high_N, value_N, cluster_N))
        starts = np.flatnonzero(np.diff(cluster_N[order_N], prepend=-1))
        cos_N = np.empty(len(order_N), np.float32)
        twin_N = np.full(len(order_N), -1, np.int64)
        for first, last in pairwise([*starts.tolist(), len(order_N)]):
            mine = order_N[first:last]
            sorted_vec = Reordered(vec_ND, mine)
            cos, best = repeats(sorted_vec) if self.min_cos is None else greedy(sorted_vec, self.min_cos)
            cos_N[mine] = cos
            twin_N[mine] = np.where(best >= 0, mine[best], -1)
        twin = pa.array(twin_N, mask=twin_N < 0)
        columns = {
            "to": table.column("group"),
            "at": table.column("at"),
            "cluster": table.column("cluster"),
            "distance": table.column("distance"),
            "max_cosine": pa.array(cos_N),
            "duplicate_of": table.column("uid").combine_chunks().take(twin),
        }
        return Made({"compared": pa.table(columns)}, buckets=self.groups)

    def _order(self, table: pa.Table) -> np.ndarray:
        if self.keep == "random":
            return draw(self.seed, self.step, [h or "" for h in hexes(table.column("uid"))])
        bits_N = ordered_bits(table.column("distance").to_numpy())
        return bits_N if self.keep == "easy" else ~bits_N


class Reordered:
    """Rows of an array (or of a map of a file) in another order, read when asked for."""

    def __init__(self, vec_ND: VecRows, order_N: NDArray[np.int64]) -> None:
        self._vec_ND = vec_ND
        self._order_N = order_N

    def __len__(self) -> int:
        return len(self._order_N)

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> Float16s:
        return self._vec_ND[self._order_N[rows]]


def _spilled(rows: Rows, spill: Path) -> tuple[pa.Table, Float16s]:
    """The small columns of a bucket in memory, its vectors as a map of a file."""
    small, dims, count = [], 0, 0
    with open(spill, "wb") as file:
        for piece in rows.pieces():
            vec_ND = unfixed(piece.column("vector"), np.float16)
            file.write(vec_ND.tobytes())
            dims, count = vec_ND.shape[1], count + len(vec_ND)
            small.append(piece.drop_columns(["vector"]))
    return pa.concat_tables(small), np.memmap(spill, np.float16, "r", shape=(count, dims))


@dataclass(frozen=True)
class DropRepeats:
    """Drop the rows of a group whose nearest earlier row is nearer than epsilon."""

    number: int
    min_cos: float

    name: ClassVar[str] = "dedup_drop"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("state", "compared")
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.drop

    def drop(self, state: Rows, assigned: Rows, compared: Rows, samples: Rows) -> Made:
        before, entered = state.table(), assigned.table(["at"])
        answers = compared.table()
        if answers.num_rows != entered.num_rows:
            raise SchemaError(f"{entered.num_rows} rows were sent to be compared, {answers.num_rows} came back")
        if not answers.num_rows:
            answers = COMPARED.empty_table()
        answers = answers.sort_by("at")
        at_M, cos_M = answers.column("at").to_numpy(), answers.column("max_cosine").to_numpy()
        n = before.num_rows
        back_N = np.full(n, -1, np.int64)
        back_N[at_M] = np.arange(len(at_M))
        drop_N = np.zeros(n, bool)
        drop_N[at_M] = cos_M.astype(np.float64) > self.min_cos
        back = pa.array(back_N, mask=back_N < 0)
        value = answers.column("max_cosine").combine_chunks().cast(pa.float64()).take(back)
        twin = answers.column("duplicate_of").combine_chunks().take(back)
        bound = pa.scalar(self.min_cos, pa.float64())
        done = made(before, drop(before, self.number, drop_N, "duplicate", value, bound, twin), samples.lengths)
        return Made({**done.tables, "compared": answers}, done.facts)
