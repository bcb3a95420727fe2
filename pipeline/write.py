"""What a run hands on: filtered tars, parquet files and the DataComp subset, of the kept rows in pool order.

In: samples, their final state and scores. Out: files of the run directory. Kept byte ranges are copied as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrow import hex_column, unfixed
from pipeline.decide import parquet_file
from pipeline.errors import SchemaError
from pipeline.formats.metadata import MetadataError, parse_json, unify
from pipeline.formats.tar import END, member_header, padding
from pipeline.machine import Machine
from pipeline.parts import Dataset
from pipeline.pool import FORMATS
from pipeline.run import Run
from pipeline.schema import SAMPLES
from pipeline.stage import Files, Function, Made, Rows, Sink
from pipeline.state import alive
from pipeline.vectors import uid_words

GAP_BYTES, RUN_BYTES = 1 << 14, 1 << 26
"""Ranges of a tar that lie closer than this are read as one, of this length at most."""

SUBSET = np.dtype("u8,u8")
SUBSET_BUCKET_ROWS = 1 << 22


@dataclass(frozen=True)
class Span:
    """The kept rows of one output shard: consecutive in pool order, from one unit or several.

    Attributes:
        first_unit, last_unit: ordinals in the pool, inclusive.
        skip: kept rows of these units that the shard before took.
        take: kept rows of this shard.
    """

    first_unit: int
    last_unit: int
    skip: int
    take: int


def spans(kept_by_unit: Sequence[int], rows: int) -> list[Span]:
    """Cut the kept rows of a pool into output shards of `rows`, the last one shorter; at least one, be it empty.

    Args:
        kept_by_unit: kept rows of each unit, in pool order.
        rows: of one output shard, at least 1.
    """
    ends = np.cumsum(np.asarray(kept_by_unit, np.int64))
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        return [Span(0, 0, 0, 0)]
    found = []
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        before = int(ends[first - 1]) if first else 0
        found.append(Span(first, last, start - before, stop - start))
    return found


@dataclass(frozen=True)
class Kept:
    """The rows that a task writes, of one unit.

    Attributes:
        at: position of the unit among the task's units.
        rows: int64, positions in the unit.
        first: position of the unit's first row among all rows of the task's units.
    """

    at: int
    rows: np.ndarray
    first: int


def kept_rows(lengths: Sequence[int], state: Rows, place: dict[str, Any]) -> Iterator[Kept]:
    """Which rows of which unit a task writes.

    Args:
        lengths: rows of each of the task's units.
        state: of the groups that hold them.
        place: `state_first`, the position of the first unit's first row in these groups; `skip` and `take` (Span).

    Raises:
        SchemaError: fewer rows are kept than the task was told to take.
    """
    first, last = place["state_first"], place["state_first"] + sum(lengths)
    alive_N = alive(state.table(["dropped_by"]))[first:last]
    mine = np.flatnonzero(alive_N)[place["skip"] : place["skip"] + place["take"]]
    if len(mine) != place["take"]:
        raise SchemaError(f"write: {len(mine)} kept rows where {place['take']} are due")
    ends = np.cumsum([0, *lengths])
    for at, begin in enumerate(ends[:-1]):
        rows = mine[(mine >= begin) & (mine < ends[at + 1])]
        if len(rows):
            yield Kept(at, rows - begin, int(begin))


def kept_table(
    samples: Sequence[pa.Table],
    columns: Sequence[pa.Table],
    keys: Sequence[str],
    scores: dict[str, np.ndarray],
    own: dict[str, pa.Array],
) -> pa.Table:
    """Kept rows as users read them: key, uid, caption and scores, then all metadata of the pool.

    Args:
        samples: kept rows of schema.SAMPLES, by unit.
        columns: the same rows of the pool's metadata.
        keys: the key of each row in what is written.
        scores: model -> float32 (N,), NaN where it has none.
        own: further columns; the pool's own of the same name give way.
    """
    samples = samples or [SAMPLES.empty_table()]
    table = {
        **own,
        "key": pa.array(keys, pa.string()),
        "uid": pa.concat_arrays([hex_column(s.column("uid")) for s in samples]),
        "caption": pa.concat_arrays([c for s in samples for c in s.column("caption").chunks]),
    }
    for model, score in scores.items():
        table[f"score_{model}"] = pa.array(score, pa.float32(), from_pandas=True)
    metadata = unify(columns) if columns else pa.table({})
    for name in metadata.column_names:
        table.setdefault(name, metadata.column(name))
    return pa.table(table)


def _scores(models: Sequence[str], scored: Sequence[Rows], kept: Sequence[Kept]) -> dict[str, np.ndarray]:
    found = {}
    for model, rows in zip(models, scored, strict=True):
        pieces = [p.column("score").to_numpy(zero_copy_only=False) for p in rows.pieces(["score"])]
        found[model] = np.concatenate([pieces[k.at][k.rows] for k in kept] or [np.empty(0, np.float32)])
    return found


def _taken(rows: Rows, kept: Sequence[Kept]) -> list[pa.Table]:
    wanted = {k.at: k.rows for k in kept}
    return [p.take(pa.array(wanted[at])) for at, p in enumerate(rows.pieces()) if at in wanted]


@dataclass(frozen=True)
class WriteTar:
    """One output tar with its sidecar parquet and _stats.json, in img2dataset's layout.

    Attributes:
        models: whose scores the sidecar holds; their scores follow the state.
        annotate: add a `pairsieve` object to each .json member.
    """

    models: tuple[str, ...]
    annotate: bool

    name: ClassVar[str] = "write_tar"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.write

    def write(
        self, files: Sequence[Files], place: Rows, samples: Rows, columns: Rows, state: Rows, *more: Rows
    ) -> Made:
        """Copy the members of the kept rows; headers are our own, with mtime 0."""
        at = place.given
        kept = list(kept_rows(samples.lengths, state, at))
        taken = _taken(samples, kept)
        scored, assign = more[: len(self.models)], more[len(self.models) :]
        scores = _scores(self.models, scored, kept)
        keys = unique_keys(
            [_prefixed(t.column("key").to_pylist(), at["prefixes"][k.at]) for t, k in zip(taken, kept, strict=True)],
            [at["stems"][k.at] for k in kept],
        )
        table = kept_table(taken, _taken(columns, kept), [key for group in keys for key in group], scores, {})
        notes = (
            [None] * table.num_rows if not self.annotate else _notes(table, self.models, _clusters(assign, kept, at))
        )

        def tar(out: Sink) -> None:
            first = 0
            for unit, rows, names in zip(kept, taken, keys, strict=True):
                copy_members(files[unit.at], rows, names, notes[first : first + len(names)], out)
                first += len(names)
            out.write(END)

        stem = f"filtered/{at['number']:08d}"
        counts = {"count": table.num_rows, "successes": table.num_rows, "failed_to_download": 0, "failed_to_resize": 0}
        stats = json.dumps({**counts, "status_dict": {"success": table.num_rows}}, indent=4).encode()
        return Made(
            {},
            exports={
                f"{stem}.tar": tar,
                f"{stem}.parquet": parquet_file(table),
                f"{stem}_stats.json": lambda out: out.write(stats),
            },
        )


def _prefixed(keys: Sequence[str], prefix: str) -> list[str]:
    folders = [key.rpartition("/") for key in keys]
    return [f"{folder}{slash}{prefix}{base}" for folder, slash, base in folders]


def unique_keys(keys: Sequence[Sequence[str]], stems: Sequence[str]) -> list[list[str]]:
    """Keys of one output tar; one that the tar already has gets its own unit's stem in front.

    Args:
        keys: of the kept rows, by unit.
        stems: file name of each unit's shard, without its ending.
    """
    seen: set[str] = set()
    out: list[list[str]] = []
    for group, stem in zip(keys, stems, strict=True):
        out.append([])
        for key in group:
            while key in seen:
                [key] = _prefixed([key], f"{stem}_")
            seen.add(key)
            out[-1].append(key)
    return out


def copy_members(
    files: Files, samples: pa.Table, keys: Sequence[str], notes: Sequence[dict[str, Any] | None], out: Sink
) -> None:
    """Write the members of some rows of one unit, byte for byte, under their new keys.

    Args:
        files: of the unit.
        samples: rows of schema.SAMPLES, in tar order.
        keys: the key of each in the output.
        notes: what is added to the .json of each; None leaves it as it is.
        out: the tar being written.
    """
    members = samples.column("members").combine_chunks()
    row_M = np.repeat(np.arange(len(samples)), members.value_lengths())
    name, offset, length = members.flatten().flatten()
    old = samples.column("key").to_pylist()
    starts, stops = offset.to_pylist(), pc.add(offset, length).to_pylist()
    suffixes = [(row, full[len(old[row]) :]) for row, full in zip(row_M.tolist(), name.to_pylist(), strict=True)]
    for run, block in blocks(files, starts, stops):
        pieces: list[bytes | memoryview] = []
        for at in run:
            row, suffix = suffixes[at]
            body: bytes | memoryview = block[starts[at] - starts[run[0]] : stops[at] - starts[run[0]]]
            note = notes[row]
            if note is not None and suffix.lower() == ".json":
                body = _annotated(bytes(body), note)
            pieces += (member_header(keys[row] + suffix, len(body)), body, padding(len(body)))
        out.write(b"".join(pieces))


def blocks(files: Files, starts: Sequence[int], stops: Sequence[int]) -> Iterator[tuple[range, memoryview]]:
    """The bytes of ranges of a tar; neighbours that lie close together are read at once.

    Args:
        files: of the unit.
        starts, stops: of each range.

    Yields:
        Positions of neighbours, and the bytes from the first one's start to the last one's stop.

    Raises:
        OSError: the tar has fewer bytes than when it was listed.
    """
    runs: list[range] = []
    for at, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if runs and 0 <= start - stops[at - 1] <= GAP_BYTES and stop - starts[runs[-1].start] <= RUN_BYTES:
            runs[-1] = range(runs[-1].start, at + 1)
        else:
            runs.append(range(at, at + 1))
    stored = files.read("tar", [(starts[run[0]], stops[run[-1]]) for run in runs])
    for run, block in zip(runs, stored, strict=True):
        due = stops[run[-1]] - starts[run[0]]
        if len(block) != due:
            raise OSError(f"{len(block)} of {due} bytes at {starts[run[0]]}: the tar is not as it was read")
        yield run, memoryview(block)


def member_bytes(files: Files, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of each range, read as `blocks` does."""
    starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
    for run, block in blocks(files, starts, stops):
        for at in run:
            yield bytes(block[starts[at] - starts[run[0]] : stops[at] - starts[run[0]]])


def _annotated(body: bytes, note: dict[str, Any]) -> bytes:
    try:
        fields = parse_json(body)
    except MetadataError:
        return body
    return json.dumps({**fields, "pairsieve": note}, indent=4, ensure_ascii=False).encode()


def _notes(table: pa.Table, models: Sequence[str], clusters: Sequence[int | None]) -> list[dict[str, Any] | None]:
    scores = {model: table.column(f"score_{model}").to_pylist() for model in models}
    return [
        {"uid": uid, "scores": {m: scores[m][i] for m in models}, "cluster": cluster}
        for i, (uid, cluster) in enumerate(zip(table.column("uid").to_pylist(), clusters, strict=True))
    ]


def _clusters(assign: Sequence[Rows], kept: Sequence[Kept], place: dict[str, Any]) -> list[int | None]:
    """The cluster of each kept row in the last clustering step; None where the recipe has none."""
    if not assign:
        return [None] * sum(len(k.rows) for k in kept)
    of: dict[int, int] = {}
    first = 0
    for piece, rows in zip(assign[0].pieces(["at", "cluster"]), place["group_rows"], strict=True):
        at_M = piece.column("at").to_numpy().astype(np.int64) + first - place["state_first"]
        of.update(zip(at_M.tolist(), piece.column("cluster").to_pylist(), strict=True))
        first += rows
    return [of.get(int(k.first + row)) for k in kept for row in k.rows]


@dataclass(frozen=True)
class WriteParquet:
    """One parquet file of kept rows: caption, metadata, scores, and image bytes where asked for.

    Attributes:
        models: whose scores it holds; their scores follow the state.
        images: format of the pool whose image bytes are put in; None leaves them out.
    """

    models: tuple[str, ...]
    images: str | None

    name: ClassVar[str] = "write_parquet"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.write

    def write(
        self, files: Sequence[Files], place: Rows, samples: Rows, columns: Rows, state: Rows, *more: Rows
    ) -> Made:
        at = place.given
        kept = list(kept_rows(samples.lengths, state, at))
        taken = _taken(samples, kept)
        keys = [key for rows in taken for key in rows.column("key").to_pylist()]
        own = {"shard": pa.array([at["shards"][k.at] for k in kept for _ in k.rows], pa.string())}
        if self.images:
            layout = FORMATS[self.images]
            stored = [b for rows, k in zip(taken, kept, strict=True) for b in layout.images(files[k.at], rows)]
            own["image"] = pa.array(stored, pa.large_binary())
        table = kept_table(taken, _taken(columns, kept), keys, _scores(self.models, more, kept), own)
        return Made({}, exports={f"parquet/{at['number']:08d}.parquet": parquet_file(table, bloom=["uid"])})


@dataclass(frozen=True)
class ScatterUids:
    """Kept uids of a group, sent to buckets in the order of their value."""

    count: int

    name: ClassVar[str] = "subset_scatter"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("uids",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.scatter

    def scatter(self, samples: Rows, state: Rows) -> Made:
        uids = samples.table(["uid"]).column("uid").filter(pa.array(alive(state.table(["dropped_by"]))))
        high_M = unfixed(uids, ">u8")[:, 0] >> np.uint64(48)
        to_M = (high_M.astype(np.int64) * self.count >> 16).astype(np.int32)
        return Made({"uids": pa.table({"to": pa.array(to_M), "uid": uids})}, buckets=self.count)


@dataclass(frozen=True)
class SortUids:
    """Distinct uids of a bucket, in order."""

    name: ClassVar[str] = "subset_sort"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("uids",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.sort

    def sort(self, rows: Rows) -> Made:
        table = rows.table()
        if not table.num_rows:
            return Made({"uids": pa.table({"uid": pa.array([], pa.binary(16))})}, {"uids": 0})
        uid = table.column("uid").combine_chunks()
        high_M, low_M = uid_words(unfixed(uid, np.uint8))
        order_M = np.lexsort((low_M, high_M))
        word_M2 = np.stack([high_M, low_M], axis=1)[order_M]
        first_M = np.append(True, (np.diff(word_M2, axis=0) != 0).any(axis=1))
        uids = uid.take(pa.array(order_M[first_M]))
        return Made({"uids": pa.table({"uid": uids})}, {"uids": len(uids)})


@dataclass(frozen=True)
class WriteSubset:
    """DataComp's subset.npy: kept uids, sorted, each once."""

    name: ClassVar[str] = "write_subset"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.write

    def write(self, uids: Rows) -> Made:
        total = sum(uids.lengths)

        def subset(out: Sink) -> None:
            header = {"descr": np.lib.format.dtype_to_descr(SUBSET), "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(out, header)
            for piece in uids.pieces():
                out.write(unfixed(piece.column("uid"), ">u8").astype("<u8").tobytes())

        return Made({}, exports={"subset.npy": subset})


def write_subset(run: Run, samples: Dataset, state: Dataset) -> dict[str, dict[str, Any]]:
    """subset.npy of the run directory: sorted by way of buckets, so that no process holds all uids."""
    kept = sum(f["alive"] for f in state.facts())
    count = max(1, -(-kept // SUBSET_BUCKET_ROWS))
    scattered = run.map(ScatterUids(count), samples, state)["uids"].shuffled(count)
    uids = run.map(SortUids(), scattered)["uids"]
    return run.export(WriteSubset(), uids.grouped(count))
