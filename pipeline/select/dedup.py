"""Semantic duplicates: the rows of a cluster, best first, in; each row's nearest earlier row out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
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
from pipeline.products import Operand, candidates, dots, operand, pays, told_apart
from pipeline.schema import UID
from pipeline.stage import Function, Made, Rows
from pipeline.state import drop
from pipeline.step import RULE, Outcome, Step, places_in
from pipeline.vectors import (
    Float16s,
    Float32s,
    Float64s,
    all_cosines,
    draw,
    first_largest,
    norms,
    ordered_bits,
    uid_words,
)

CLUSTER_ROWS = 8000
"""Survivors for each cluster, where their number is `auto`."""

BUCKET_ROWS = 1 << 20
"""Most rows that one task compares, unless a single cluster has more: 1 GB of vectors at 512 dims."""

TASKS = 64
"""That compare, at least, where each has a cluster: what workers share."""

SCATTER_BYTES = 1 << 28
"""Of a group's vectors that a task sends to their clusters at a time, or little more."""

COMPARED = pa.schema([*ASSIGNED, ("max_cosine", pa.float32()), ("duplicate_of", UID)])
BLOCK_ROWS = 384
HELD_ROWS = 16384  # 50 MB at 512 dims, twice; each earlier row is read once for so many
DENSE = 8  # near-tied pairs per row, above which one float64 product of the block is cheaper than pairs


class VecRows(Protocol):
    """float16 (N, D) stored unit rows, of which blocks are read: an array, a map of a file, or `Reordered`."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> Float16s: ...


class _Block(NamedTuple):
    """Some rows of a cluster."""

    row: NDArray[np.int64]  # (B,), ascending: their places in the cluster
    norm: Float64s  # (B,)
    vec: Operand  # (B, D)

    def part(self, rows: slice) -> _Block:
        """Some of the rows, without a copy."""
        return _Block(self.row[rows], self.norm[rows], self.vec[rows])


def repeats(
    vec_ND: VecRows, block_rows: int = BLOCK_ROWS, held_rows: int = HELD_ROWS, bf16: bool | None = None
) -> tuple[Float32s, NDArray[np.int64]]:
    """For each row, the largest cosine to any earlier row, kept or not, and the earliest row that has it.

    A fast product finds the rows that can be nearest (`pipeline.products`); those are compared as `vectors.row_cosine`
    does. The answer does not depend on `block_rows`, `held_rows` or `bf16`; memory is two times `held_rows`, so the
    rows may be a map of a file larger than memory.

    Args:
        vec_ND: float16, shape (N, D), stored unit rows, best first: row 0 never repeats.
        block_rows: rows compared at a time, at least 1; changes speed and memory only.
        held_rows: rows compared with each block of earlier ones while it is held; as `block_rows`.
        bf16: multiply bfloat16 first; None: where the processor is faster at it and the work is large.

    Returns:
        float32, shape (N,): the cosine, in [-1, 1], -1 for row 0; and int64, shape (N,): the row's place, -1 for row 0.

    Source: SemDeDup, arXiv:2303.09540, section 3 (maximum over the strict upper triangle of the cosine matrix).
    """
    # Rows with the same bytes are compared once: a later copy's best is its first copy, at cosine 1.
    first_N = _first_copies(vec_ND, block_rows)
    distinct_U = np.flatnonzero(first_N == np.arange(len(vec_ND)))
    if bf16 is None:
        bf16 = pays(len(distinct_U) ** 2 * _dims(vec_ND) // 2)
    cos_U, best_U = _nothing(len(distinct_U))
    scratch = np.empty(block_rows * min(held_rows, len(distinct_U)), np.float32)
    for held in range(0, len(distinct_U), held_rows):
        mine = slice(held, held + held_rows)
        rows = _block(vec_ND, distinct_U[mine], bf16)
        for begin in range(0, held, held_rows):
            columns = _block(vec_ND, distinct_U[begin : begin + held_rows], bf16)
            for block in _slices(len(rows.row), block_rows):
                _nearer(rows.part(block), columns, cos_U[mine][block], best_U[mine][block], scratch)
        for block in _slices(len(rows.row), block_rows):
            earlier = rows.part(slice(block.stop))
            _nearer(rows.part(block), earlier, cos_U[mine][block], best_U[mine][block], scratch, block.start)
    cos_N = np.full(len(vec_ND), -1, np.float32)
    best_N = np.full(len(vec_ND), -1, np.int64)
    cos_N[distinct_U], best_N[distinct_U] = cos_U, best_U
    cos_N[best_N < 0] = -1

    copy_C = np.flatnonzero(first_N < np.arange(len(vec_ND)))
    original_C = first_N[copy_C]
    best_N[copy_C] = np.where(cos_N[original_C] == 1, best_N[original_C], original_C)
    cos_N[copy_C] = 1
    return cos_N, best_N


def greedy(
    vec_ND: VecRows, min_cos: float, block_rows: int = BLOCK_ROWS, bf16: bool | None = None
) -> tuple[Float32s, NDArray[np.int64]]:
    """As `repeats`, but compared with earlier kept rows only; a row is kept unless its cosine is above `min_cos`.

    Args:
        vec_ND: float16, shape (N, D), stored unit rows, best first: row 0 is kept.
        min_cos: in [-1, 1]: a row is dropped when its largest cosine, as float64, is above.
        block_rows, bf16: as `repeats` has them.

    Returns:
        float32, shape (N,): the largest cosine to an earlier kept row, -1 for row 0; and int64, shape (N,): the
        earliest kept row that has it, -1 for row 0.
    """
    if bf16 is None:
        bf16 = pays(len(vec_ND) ** 2 * _dims(vec_ND) // 2)
    cos_N, best_N = _nothing(len(vec_ND))
    kept = np.zeros(0, np.int64)
    for start in range(0, len(vec_ND), block_rows):
        rows = _block(vec_ND, np.arange(start, min(start + block_rows, len(vec_ND))), bf16)
        cos_B, best_B = cos_N[start : start + block_rows], best_N[start : start + block_rows]
        for begin in range(0, len(kept), block_rows):
            _nearer(rows, _block(vec_ND, kept[begin : begin + block_rows], bf16), cos_B, best_B)
        cos_BB = all_cosines(rows.vec.vec, rows.vec.vec)
        kept_B = np.zeros(len(rows.row), np.bool_)
        for here in range(len(rows.row)):
            kept_B[here] = float(cos_B[here]) <= min_cos
            if kept_B[here]:
                later = slice(here + 1, None)
                nearer = cos_BB[here, later] > cos_B[later]
                best_B[later][nearer] = start + here
                np.maximum(cos_B[later], cos_BB[here, later], out=cos_B[later])
        kept = np.concatenate([kept, rows.row[kept_B]])
    cos_N[best_N < 0] = -1
    return cos_N, best_N


def bucketise(size_K: NDArray[np.int64], max_rows: int) -> NDArray[np.int32]:
    """Put neighbouring clusters into buckets of at most `max_rows` rows; a larger cluster has a bucket of its own.

    The buckets with the most pairs to compare come first, so that no worker begins one when the others are done.

    Args:
        size_K: int64, shape (K,): rows of each cluster.
        max_rows: at least 1.

    Returns:
        int32, shape (K,): bucket of each cluster, from 0, without gaps.
    """
    bucket_K = np.zeros(len(size_K), np.int32)
    bucket, rows = 0, 0
    for cluster, size in enumerate(size_K.tolist()):
        if rows and size and rows + size > max_rows:
            bucket, rows = bucket + 1, 0
        bucket_K[cluster] = bucket
        rows += size
    most_first_U = np.argsort(-np.bincount(bucket_K, size_K.astype(np.float64) ** 2), kind="stable")
    return np.argsort(most_first_U).astype(np.int32)[bucket_K]


def _block(vec_ND: VecRows, row_B: NDArray[np.int64], bf16: bool) -> _Block:
    vec = operand(vec_ND[row_B], bf16)
    return _Block(row_B, norms(vec.vec), vec)


def _dims(vec_ND: VecRows) -> int:
    return int(np.asarray(vec_ND[:1]).shape[1])


def _nothing(rows: int) -> tuple[Float32s, NDArray[np.int64]]:
    """No earlier row yet: below any cosine, so that a cosine of -1 counts."""
    return np.full(rows, -2, np.float32), np.full(rows, -1, np.int64)


def _first_copies(vec_ND: VecRows, block_rows: int) -> NDArray[np.int64]:
    """Place of the first row with the same bytes: int64, shape (N,).

    By a hash of 64 bits, so that no rows are held, then by the bytes themselves. A row whose hash is also that of an
    earlier, other row is its own first copy: `repeats` compares it like any row.
    """
    hash_N = np.zeros(len(vec_ND), np.uint64)
    dims = _dims(vec_ND)
    word = np.dtype("u8" if dims % 4 == 0 else "u2")
    words = dims * 2 // word.itemsize
    factor_W = np.random.default_rng(0).integers(2**64, size=words, dtype=np.uint64) | np.uint64(1)
    for start in range(0, len(vec_ND), block_rows):
        word_BW: NDArray[np.unsignedinteger] = np.ascontiguousarray(vec_ND[start : start + block_rows]).view(word)
        hash_N[start : start + block_rows] = (word_BW * factor_W).sum(axis=1)
    _, first_H, hash_at_N = np.unique(hash_N, return_index=True, return_inverse=True)
    first_N: NDArray[np.int64] = first_H[hash_at_N]
    copy_C = np.flatnonzero(first_N < np.arange(len(vec_ND)))
    for start in range(0, len(copy_C), block_rows):
        copy_B = copy_C[start : start + block_rows]
        same_BD = np.asarray(vec_ND[copy_B]).view(np.uint16) == np.asarray(vec_ND[first_N[copy_B]]).view(np.uint16)
        other_B = copy_B[~same_BD.all(axis=1)]
        first_N[other_B] = other_B
    return first_N


def _slices(rows: int, block_rows: int) -> Iterator[slice]:
    return (slice(start, start + block_rows) for start in range(0, rows, block_rows))


def _nearer(
    rows: _Block,
    columns: _Block,
    cos_B: Float32s,
    best_B: NDArray[np.int64],
    scratch: Float32s | None = None,
    before: int | None = None,
) -> None:
    """Update each row's largest cosine, and the earliest row that has it, in place, by `columns`, all of them earlier.

    With `before`, row b by the first `before` + b columns only. Blocks of columns must come in order: an equal cosine
    further on is not nearer. `scratch` as `candidates` has it.
    """
    place_P = candidates(rows.vec, columns.vec, cos_B, before, scratch)
    if not len(place_P):
        return
    row_P, column_P = np.divmod(place_P, len(columns.row))
    begins_P = np.diff(row_P, prepend=-1) > 0
    near = row_P[begins_P]
    if len(place_P) > DENSE * len(near):
        can_BC = np.zeros((len(rows.row), len(columns.row)), np.bool_)
        can_BC.reshape(-1)[place_P] = True
        exact_BC = np.where(can_BC, all_cosines(rows.vec.vec, columns.vec.vec), -4)
        column = exact_BC.argmax(axis=1)[near]
        value = exact_BC[near, column]
    else:
        few = told_apart(rows.vec, columns.vec, row_P, column_P)
        row_F, column_F = row_P[few], column_P[few]
        exact_F = dots(rows.vec, columns.vec, row_F, column_F) / (rows.norm[row_F] * columns.norm[column_F])
        exact32_F = exact_F.astype(np.float32)
        first = first_largest(exact32_F, np.cumsum(np.diff(row_F, prepend=-1) > 0) - 1)
        column, value = column_F[first], exact32_F[first]
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
        return self.clusters if self.clusters != "auto" else min(65_536, -(-survivors // CLUSTER_ROWS))

    def apply(self, step: Step) -> Outcome:
        if not step.survivors:
            return nobody(step)
        found = Clustering(self.count(step.survivors), self.sample_per_cluster, self.iterations, self.passes).fit(
            step, self.space
        )
        bucket_rows = min(BUCKET_ROWS, max(CLUSTER_ROWS, step.survivors // TASKS))
        compared = self.compare(step, found, bucket_rows)
        groups = len(step.state)
        repeat = DropRepeats(step.number, self._min_cos)
        done = step.run.map(repeat, step.state, found.assigned, compared, step.samples)
        sizes = sums_of(step.run.rows(found.sizes.grouped(groups).parts[0]), found.k)[0]
        files = {"centroids.npy": found.centroid_file(step)}
        return Outcome(done["state"], done["dropped"], done["compared"], files, health(sizes, found.objective))

    def compare(self, step: Step, found: Clusters, bucket_rows: int) -> Dataset:
        """Each survivor's nearest earlier row in its cluster; one part for each group, rows in any order.

        Args:
            step: whose survivors.
            found: their clusters.
            bucket_rows: that one task compares; never changes the result.
        """
        groups = len(step.state)
        scattered = self.scatter(step, found, bucket_rows)
        within = Within(self.keep, step.seed, step.name, groups, self._min_cos if self.rule == "greedy" else None)
        return step.run.map(within, scattered)["compared"].shuffled(groups)

    def scatter(self, step: Step, found: Clusters, bucket_rows: int) -> Dataset:
        """The survivors by the bucket of their cluster: one part for each bucket."""
        evidence, side = step.space(self.space)
        groups = len(step.state)
        buckets = step.run.map(Buckets(found.k, bucket_rows), found.sizes.grouped(groups))["buckets"]
        count = next(buckets.facts())["buckets"]
        rows = (evidence, step.samples, found.assigned, step.places, buckets.spread(groups))
        return step.run.map(Scatter(side, count), *rows)["rows"].shuffled(count)

    @property
    def _min_cos(self) -> float:
        return 1 - float(self.epsilon)


@dataclass(frozen=True)
class Buckets:
    """Which clusters are compared by the same task."""

    k: int
    rows: int

    name: ClassVar[str] = "dedup_buckets"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("buckets",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.buckets

    def buckets(self, sizes: Rows) -> Made:
        bucket_K = bucketise(sums_of(sizes, self.k)[0], self.rows)
        return Made({"buckets": pa.table({"bucket": pa.array(bucket_K)})}, {"buckets": int(bucket_K.max()) + 1})


@dataclass(frozen=True)
class Scatter:
    """A group's survivors with their vectors, sent to the bucket of their cluster.

    Attributes:
        side: image or text.
        count: buckets.
        table_bytes: of vectors held at a time.
    """

    side: str
    count: int
    table_bytes: int = SCATTER_BYTES

    name: ClassVar[str] = "dedup_scatter"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("rows",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.scatter

    def scatter(self, evidence: Rows, samples: Rows, assigned: Rows, place: Rows, buckets: Rows) -> Made:
        return Made({"rows": self._rows(evidence, samples, assigned, place, buckets)}, buckets=self.count)

    def _rows(self, evidence: Rows, samples: Rows, assigned: Rows, place: Rows, buckets: Rows) -> Iterator[pa.Table]:
        """The rows, `table_bytes` of vectors or little more at a time."""
        table = assigned.table()
        at_M = table.column("at").to_numpy().astype(np.int64)
        bucket_K = buckets.table().column("bucket").to_numpy()
        unit_M, row_M = places_in(samples, place, at_M)
        columns = {
            "to": pa.array(bucket_K[table.column("cluster").to_numpy()]),
            "group": pa.array(np.full(len(at_M), place.given["group"], np.int32)),
            "at": table.column("at"),
            "cluster": table.column("cluster"),
            "distance": table.column("distance"),
            "uid": samples.table(["uid"]).column("uid").combine_chunks().take(pa.array(at_M)),
            "unit": pa.array(unit_M),
            "row": pa.array(row_M),
        }
        whole, held, sent, first = pa.table(columns), list[pa.ChunkedArray](), 0, 0
        for number, piece in enumerate(evidence.pieces([self.side]), 1):
            begin, end = np.searchsorted(at_M, [first, first + piece.num_rows]).tolist()
            held.append(piece.column(self.side).take(pa.array(at_M[begin:end] - first)))
            first += piece.num_rows
            if number == len(evidence.lengths) or sum(column.nbytes for column in held) >= self.table_bytes:
                vectors = pa.chunked_array([chunk for column in held for chunk in column.chunks], held[0].type)
                held.clear()
                yield whole.slice(sent, end - sent).append_column("vector", vectors)
                sent = end


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
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("state", "dropped", "compared")
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
        near_M = cos_M.astype(np.float64) > self.min_cos
        drop_N = np.zeros(before.num_rows, bool)
        drop_N[at_M] = near_M
        repeats = answers.filter(pa.array(near_M))
        value = repeats.column("max_cosine").combine_chunks().cast(pa.float64())
        twin = repeats.column("duplicate_of").combine_chunks()
        done = drop(before, self.number, drop_N, samples.lengths, "duplicate", value, self.min_cos, twin)
        return Made({**done.tables, "compared": answers}, done.facts)
