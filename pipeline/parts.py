"""Committed rows: files, parts and datasets, and how tables become bytes and come back, each checked by its digest.

A file is one committed object. A part is the files that one task reads together. A dataset is the list of its parts.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from operator import eq
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple, TypeVar, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from pipeline.errors import PairsieveError
from pipeline.stage import Sink
from pipeline.storage import Root

T = TypeVar("T")

INDEX = np.dtype([("start", "<i8"), ("bytes", "<i8"), ("sha256", "S64")])
"""One destination in the index of a shuffle file."""


class DamagedPart(PairsieveError):
    """A committed file does not hold the bytes that its receipt names."""


ID_BYTES = 16
"""Of a digest as `digest` gives it."""

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical(value: Any) -> bytes:
    """JSON of plain values that is the same in every process.

    Raises:
        TypeError: a value that JSON cannot hold (no default representation is ever used).
    """
    return _CANONICAL.encode(value).encode()


def digest(value: Any) -> str:
    """32 hex digits that stand for a plain value."""
    return hashlib.sha256(canonical(value)).hexdigest()[: 2 * ID_BYTES]


PARTS = "parts"
"""Folder of a store for the files of all parts."""

PACKED = struct.Struct("<16s32sqqi")
"""A file in `Committed`: key of its part, digest, length, rows, buckets."""


def part_path(stage: str, output: str, key: str, sha256: str) -> str:
    """Where a file of a part lies below the store's root: named after what was asked for and what came of it."""
    return f"{PARTS}/{stage}/{key[:2]}/{key}-{output}-{sha256[:16]}"


@dataclass(frozen=True, slots=True)
class File:
    """One committed object.

    Attributes:
        path: below the store's root.
        sha256: hex digest of its bytes.
        bytes: its length.
        rows: rows of the table in it.
        facts: canonical JSON of the facts that its stage found.
        bucket: the destination to read of a shuffle file with `buckets` of them; None reads a plain file.
    """

    path: str
    sha256: str
    bytes: int
    rows: int
    facts: str = "{}"
    buckets: int = 0
    bucket: int | None = None


class _OnDemand(Sequence[T]):
    """Items that are made when they are asked for; equal to any sequence of equal ones."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))


@dataclass(slots=True, eq=False)
class Texts(_OnDemand[str]):
    """Texts in one piece of memory, one after the other: 16 bytes and their UTF-8 each, where a str takes 60 more.

    Attributes:
        utf8: of all, the same text once where it repeats the one before.
        starts, ends: of each in `utf8`.
    """

    utf8: bytearray = field(default_factory=bytearray)
    starts: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))

    def append(self, text: str) -> None:
        """Hold one more."""
        if not self.ends or self[-1] != text:
            self.starts.append(len(self.utf8))
            self.utf8 += text.encode()
        else:
            self.starts.append(self.starts[-1])
        self.ends.append(len(self.utf8))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):  # a task is sent with its slice, which must not hold the rest
            return [self[i] for i in range(*at.indices(len(self)))]
        return self.utf8[self.starts[at] : self.ends[at]].decode()


@dataclass(frozen=True, slots=True, eq=False)
class Committed(_OnDemand[File]):
    """The files of one output of a stage, one for each part: 68 bytes and their facts, where a File takes 600.

    Attributes:
        stage, output: what made them.
        packed: so many PACKED.
        facts: of each file; the same for all outputs of a stage.
        bucket: of all of them (File).
    """

    stage: str
    output: str
    packed: bytes | bytearray
    facts: Sequence[str]
    bucket: int | None = None

    def __len__(self) -> int:
        return len(self.facts)

    @overload
    def __getitem__(self, at: int) -> File: ...
    @overload
    def __getitem__(self, at: slice) -> Committed: ...
    def __getitem__(self, at: int | slice) -> File | Committed:
        if isinstance(at, slice):
            first, last, step = at.indices(len(self))
            if step != 1:
                raise ValueError(f"files are packed in a row: no step of {step}")
            packed = self.packed[first * PACKED.size : last * PACKED.size]
            return replace(self, packed=packed, facts=self.facts[first:last])
        at = range(len(self))[at]
        key, sha256, length, rows, buckets = PACKED.unpack_from(self.packed, at * PACKED.size)
        path = part_path(self.stage, self.output, key.hex(), sha256.hex())
        return File(path, sha256.hex(), length, rows, self.facts[at], buckets, self.bucket)


@dataclass(frozen=True, slots=True)
class Part:
    """The files that one task reads together; `id` stands for their content, wherever they lie.

    Attributes:
        name: for messages: the unit's shard, or the first and last of a group.
        files: in order.
        given: canonical JSON of small values that the driver passes along, such as the ordinal of a unit.
    """

    name: str
    files: Sequence[File]
    given: str = "{}"

    @property
    def id(self) -> str:
        return digest([[[f.sha256, f.bucket] for f in self.files], self.given])


@dataclass(frozen=True, slots=True, eq=False)
class Listed(_OnDemand[Part]):
    """A part for each file of an output.

    Attributes:
        names: of the parts; the same list for all outputs of all stages over the same units.
        files: as many.
    """

    names: Sequence[str]
    files: Committed

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, at: int) -> Part: ...
    @overload
    def __getitem__(self, at: slice) -> Listed: ...
    def __getitem__(self, at: int | slice) -> Part | Listed:
        if isinstance(at, slice):
            return Listed(self.names[at], self.files[at])
        return Part(self.names[at], (self.files[at],))


@dataclass(frozen=True, slots=True, eq=False)
class _Derived(_OnDemand[Part]):
    """Parts that follow from others.

    Attributes:
        length: how many.
        make: the part at a position.
    """

    length: int
    make: Callable[[int], Part]

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, at: int) -> Part: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Part, ...]: ...
    def __getitem__(self, at: int | slice) -> Part | tuple[Part, ...]:
        found = range(self.length)[at]
        return self.make(found) if isinstance(found, int) else tuple(map(self.make, found))


@dataclass(frozen=True)
class Dataset:
    """The finished output of a stage, in the order of its input.

    Attributes:
        stage: name of the stage that made it.
        key: stands for what was asked: the stage's parameters and all it read.
        parts: one for each unit, or group of units; they may be made when asked for.
    """

    stage: str
    key: str
    parts: Sequence[Part] = field(repr=False)

    def __len__(self) -> int:
        return len(self.parts)

    @cached_property
    def num_rows(self) -> int:
        return sum(f.rows for p in self.parts for f in p.files)

    def ids(self) -> Iterator[str]:
        """The id of each part, in order; computed once."""
        return (self._ids[at : at + ID_BYTES].hex() for at in range(0, len(self._ids), ID_BYTES))

    @cached_property
    def _ids(self) -> bytes:
        return b"".join(bytes.fromhex(part.id) for part in self.parts)

    def facts(self) -> Iterator[dict[str, Any]]:
        """The facts of every committed file, in order."""
        for part in self.parts:
            for file in part.files:
                yield json.loads(file.facts)

    def grouped(self, parts: int) -> Dataset:
        """The same files, with so many consecutive parts read by one task."""
        return self._derived(-(-len(self.parts) // parts), lambda i: self._group(i * parts, (i + 1) * parts))

    def _group(self, first: int, last: int) -> Part:
        group = self.parts[first:last]
        return Part(f"{group[0].name}..{group[-1].name}" if len(group) > 1 else group[0].name, _files(group))

    def joined(self, ranges: Sequence[range]) -> Dataset:
        """A part for each range of parts, which may overlap: the files of all parts in it."""

        def join(at: int) -> Part:
            found = self.parts[ranges[at].start : ranges[at].stop]
            return Part(found[0].name, _files(found))

        return self._derived(len(ranges), join)

    def spread(self, parts: int) -> Dataset:
        """The one part of this dataset, read by each of so many tasks."""
        (part,) = self.parts
        return Dataset(self.stage, self.key, (part,) * parts)

    def shuffled(self, buckets: int) -> Dataset:
        """The same rows grouped by their column `to`: part i holds those that go to i, in the order of their origin.

        Nothing is moved: a part is a range of each file (reliability.md 1i, "Work inside clusters").
        """
        files = _files(self.parts)
        every = digest([f.sha256 for f in files])
        return self._derived(buckets, lambda i: Bucket(f"{self.stage}[{i}]", _in_bucket(files, i), every=every))

    def _derived(self, count: int, make: Callable[[int], Part]) -> Dataset:
        return Dataset(self.stage, self.key, _Derived(count, make))


def given(values: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> Dataset:
    """Small values as a dataset, one part each: what a stage is told about its place rather than asked for."""
    named = zip(names or ["given"] * len(values), values, strict=True)
    return Dataset("given", "", tuple(Part(name, (), canonical(value).decode()) for name, value in named))


@dataclass(frozen=True, slots=True)
class Bucket(Part):
    """One destination of a shuffle; hashing all files once is enough for all destinations."""

    every: str = ""

    @property
    def id(self) -> str:
        return digest([self.every, self.files[0].bucket if self.files else None])


def _files(parts: Sequence[Part]) -> Sequence[File]:
    return parts.files if isinstance(parts, Listed) else tuple(f for p in parts for f in p.files)


def _in_bucket(files: Sequence[File], bucket: int) -> Sequence[File]:
    if isinstance(files, Committed):
        return replace(files, bucket=bucket)
    return tuple(replace(f, bucket=bucket) for f in files)


FETCHES, FETCH_BYTES = 16, 1 << 24
"""Remote blobs of a bucket that are fetched at the same time, and what they may hold, before the last of them."""

TEXT = {"BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"}
SPLIT = {"INT32", "INT64", "FLOAT", "DOUBLE"}
"""Physical types of parquet: what has a dictionary, and what is split into streams of bytes."""


def to_parquet(table: pa.Table, bloom: Sequence[str] = (), internal: bool = False) -> bytes:
    """Parquet bytes that depend on the rows alone (for one pyarrow version).

    Wide binary columns are vectors: they do not compress, and their minimum and maximum mean nothing. Numbers have no
    dictionary: most differ from row to row, and the attempt takes ten times as long as to write them.

    Args:
        table: the rows.
        bloom: columns with a bloom filter.
        internal: for a part, which only `StoredRows` reads: numbers are split into streams of bytes, which not every
            reader knows for integers, and which LZ4 makes about as small as ZSTD does plain ones, in a third of the
            time to write and to read; and no minima and maxima.
    """
    wide = {f.name for f in table.schema if pa.types.is_fixed_size_binary(f.type) and f.type.byte_width > 32}
    leaves = _leaves(table.schema)
    split = {leaf: "BYTE_STREAM_SPLIT" for leaf, kind in leaves.items() if internal and kind in SPLIT}
    compression = {leaf: "NONE" if leaf in wide else "LZ4" if leaf in split else "ZSTD" for leaf in leaves}
    out = io.BytesIO()
    pq.write_table(
        table,
        out,
        column_encoding=split or None,
        compression=compression or "NONE",
        use_dictionary=[leaf for leaf, kind in leaves.items() if kind in TEXT and leaf not in wide],
        write_statistics=not internal and [leaf for leaf in leaves if leaf not in wide],
        row_group_size=1 << 20,
        store_schema=True,
        bloom_filter_options={name: {"ndv": max(1, table.num_rows), "fpp": 0.01} for name in bloom} or None,
    )
    return out.getvalue()


@lru_cache
def _leaves(schema: pa.Schema) -> dict[str, str]:
    """Path of every column as parquet has them, and its physical type; as costly as to write a small part."""
    out = io.BytesIO()
    pq.write_table(schema.empty_table(), out)
    parquet = pq.ParquetFile(io.BytesIO(out.getvalue())).schema
    columns = (parquet.column(i) for i in range(len(parquet)))
    return {c.path: c.physical_type for c in columns}


def to_shuffle(tables: pa.Table | Iterable[pa.Table], buckets: int, out: Sink, scratch: str | None = None) -> int:
    """Write one blob of Arrow rows for each destination, then an index of where each lies and what it hashes to.

    Memory is that of a table, twice, and of the largest blob: several tables wait in a file, sorted each.

    Args:
        tables: rows with an int32 column `to` in [0, buckets), which is not stored; as one, or one after the other.
        buckets: how many destinations there are.
        out: the file.
        scratch: folder of the file in which tables wait; None: the system's.

    Returns:
        Rows of all tables.
    """
    index = np.zeros(buckets, INDEX)
    rows = written = 0

    def blobs() -> Iterator[tuple[int, bytes]]:
        nonlocal rows
        if isinstance(tables, pa.Table):
            rows = tables.num_rows
            yield from _blobs(tables, buckets)
            return
        with TemporaryFile(dir=scratch) as waiting:
            places = defaultdict[int, list[tuple[int, int]]](list)
            for table in tables:
                rows += table.num_rows
                for bucket, blob in _blobs(table, buckets):
                    places[bucket].append((waiting.tell(), len(blob)))
                    waiting.write(blob)
            for bucket in sorted(places):
                yield bucket, b"".join(_read_at(waiting, *place) for place in places[bucket])

    for bucket, blob in blobs():
        index[bucket] = (written, len(blob), hashlib.sha256(blob).hexdigest().encode())
        out.write(blob)
        written += len(blob)
    out.write(index.tobytes())
    return rows


def _blobs(table: pa.Table, buckets: int) -> Iterator[tuple[int, bytes]]:
    """Each destination that gets rows, ascending, and a stream of those."""
    to_N = table.column("to").to_numpy()
    order_N = np.argsort(to_N, kind="stable")
    rows = table.drop_columns(["to"]).combine_chunks()
    ends = np.cumsum(np.bincount(to_N, minlength=buckets)) if len(to_N) else np.zeros(buckets, np.int64)
    first = 0
    for bucket in np.flatnonzero(np.diff(ends, prepend=0)).tolist():
        last = int(ends[bucket])
        yield bucket, _ipc(rows.take(pa.array(order_N[first:last])))
        first = last


def _read_at(file: IO[bytes], start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _ipc(table: pa.Table) -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    return out.getvalue()


class _Entry(NamedTuple):
    """One destination's blob in a shuffle file."""

    path: str
    start: int
    length: int
    sha256: str


def _together(entries: Iterable[_Entry]) -> Iterator[list[_Entry]]:
    """FETCHES at a time, or fewer of FETCH_BYTES."""
    some: list[_Entry] = []
    for entry in entries:
        some.append(entry)
        if len(some) == FETCHES or sum(e.length for e in some) >= FETCH_BYTES:
            yield some
            some = []
    if some:
        yield some


class StoredRows:
    """The committed rows of one part (stage.Rows)."""

    def __init__(self, store: Root, part: Part) -> None:
        self._store = store
        self._part = part

    @property
    def facts(self) -> Sequence[dict[str, Any]]:
        return [json.loads(f.facts) for f in self._part.files]

    @property
    def given(self) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads(self._part.given))

    @property
    def lengths(self) -> Sequence[int]:
        return [f.rows for f in self._part.files]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        pieces = list(self.pieces(columns))
        if len(pieces) == 1:
            return pieces[0]
        return pa.concat_tables(pieces) if pieces else pa.table({})

    def pieces(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        names = list(columns) if columns is not None else None
        files = self._part.files
        if not files or files[0].bucket is None:
            for file in files:
                yield self._file(file, names)  # nothing of it is held here while the next is read
            return
        for blob in self._blobs(files):
            streams = pa.BufferReader(blob)
            while streams.tell() < len(blob):
                table = pa.ipc.open_stream(streams).read_all()
                yield table.select(names) if names is not None else table

    def _blobs(self, files: Sequence[File]) -> Iterator[bytes]:
        """What each file has for its bucket, in order: of a large pool some kB in each of thousands of files.

        An object store is asked for many at a time; of local files, threads would take twice as long.
        """
        if self._store.local(""):
            yield from map(self._blob, filter(None, map(self._entry, files)))
            return
        pool = ThreadPoolExecutor(FETCHES, "fetch")
        try:
            found = (entry for entry in pool.map(self._entry, files) if entry)
            for some in _together(found):
                yield from pool.map(self._blob, some)
        finally:
            pool.shutdown(cancel_futures=True)

    def _file(self, file: File, names: list[str] | None) -> pa.Table:
        data = self._store.read(file.path)
        self._check(file.path, data, file.sha256)
        # pq.read_table goes through a dataset, which takes four times as long for a small file.
        table = pq.ParquetFile(pa.BufferReader(data)).read(names, use_threads=False)
        return table.select(names) if names is not None else table

    def _entry(self, file: File) -> _Entry | None:
        """Where its rows for the bucket are, or None where there are none."""
        assert file.bucket is not None
        at = file.bytes - (file.buckets - file.bucket) * INDEX.itemsize
        entry = np.frombuffer(self._store.read(file.path, at, at + INDEX.itemsize), INDEX)
        if len(entry) != 1 or not 0 <= entry["start"][0] <= file.bytes or not 0 <= entry["bytes"][0] <= file.bytes:
            raise DamagedPart(f"{file.path}: its index is damaged")
        start, length, sha256 = entry[0].tolist()
        found = _Entry(file.path, start, length, sha256.decode("latin-1"))
        return found if found.length or found.sha256 else None

    def _blob(self, entry: _Entry) -> bytes:
        blob = self._store.read(entry.path, entry.start, entry.start + entry.length)
        self._check(entry.path, blob, entry.sha256)
        return blob

    def _check(self, path: str, data: bytes, expected: str) -> None:
        if hashlib.sha256(data).hexdigest() != expected:
            stage = path.split("/")[1]
            raise DamagedPart(
                f"{path}: its bytes do not match the digest in its receipt; to have them made again, delete "
                f"manifests/{stage}, segments/{stage} and receipts/{stage} of the store"
            )
