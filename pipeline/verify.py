"""Proof that a run directory holds what it should: outputs = pool x decisions, by checksum.

In: a run directory, its store, and the pool that its recipe names. Out: every difference, as a value. One part, shard
or batch of rows at a time; of subset.npy alone all uids are held.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice, pairwise, zip_longest
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrow import hex_column
from pipeline.curate import formats_of
from pipeline.decide import READ
from pipeline.errors import UserError
from pipeline.formats.tar import walk
from pipeline.machine import Machine
from pipeline.parts import DamagedPart
from pipeline.pool import list_units
from pipeline.record import Record, Unreadable, as_read, batches, load_record, parts_of, receipts_of, rows_of
from pipeline.stage import Unit
from pipeline.storage import Root, UnitFiles, sha256_of
from pipeline.write import SUBSET, member_bytes

CHECKSUMS = "checksums.sha256"
UNLISTED = ("times.json", CHECKSUMS)
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@dataclass(frozen=True)
class Difference:
    """Something that is not as it should be.

    Attributes:
        file: path below the run directory; `store/...` for one of the store, wherever that is.
        what: is wrong with it.
        sample: SHARD KEY, where it concerns one.
    """

    file: str
    what: str
    sample: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.sample}: {self.what}" if self.sample else f"{self.file}: {self.what}"


def verify(directory: Root, store: Root, machine: Machine) -> Iterator[Difference]:
    """Compare the files of a finished run with its checksums, its decisions, its pool and its store.

    Raises:
        UserError: the folder holds no finished run, or its pool cannot be listed.
        OSError: storage failed.
    """
    try:
        record = load_record(directory)
    except Unreadable as error:
        yield Difference(error.path, error.why)
        return
    for check in (
        partial(against_checksums, directory, store, record),
        partial(stored, store, record),
        partial(accounted, directory, record),
        partial(decided_as_read, directory, store, record),
        partial(outputs, directory, store, record, machine),
    ):
        try:
            yield from check()
        except Unreadable as error:
            yield Difference(error.path, error.why)
        except DamagedPart as error:
            yield Difference("store", str(error))


def against_checksums(directory: Root, store: Root, record: Record) -> Iterator[Difference]:
    """Every file is listed, and has the bytes that it was written with."""
    there = [p for p in directory.list() if not p.startswith("store/") and p not in UNLISTED]
    try:
        lines = directory.read(CHECKSUMS).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        yield Difference(CHECKSUMS, "missing: the run is not finished")
        return
    listed: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if match is None:
            yield Difference(CHECKSUMS, f"line {number} is malformed")
        else:
            listed[match[2]] = match[1]
    for path in sorted(set(there) - set(listed)):
        yield Difference(path, "not listed in the checksums")
    for path in sorted(listed):
        try:
            with directory.open(path) as file:
                found = sha256_of(file)
        except FileNotFoundError:
            yield Difference(path, "missing")
            continue
        if found != listed[path]:
            yield Difference(path, "its bytes are not those of its checksum")
    for manifest in record.manifests:
        for receipt in receipts_of(store, manifest):
            for path, made in receipt["exports"].items():
                if listed.get(path) != made["sha256"]:
                    yield Difference(path, "its checksum is not that of the file that the run wrote")


def stored(store: Root, record: Record) -> Iterator[Difference]:
    """Every part that the run refers to is in the store, whole."""
    seen: set[str] = set()
    for manifest, sha256 in record.about.get("manifests", {}).items():
        is_there = store.bytes(manifest) is not None  # below, a missing one is named
        if is_there and hashlib.sha256(store.read(manifest)).hexdigest() != sha256:
            yield Difference(f"store/{manifest}", "its bytes are not those that the run recorded")
    for manifest in record.manifests:
        for receipt in receipts_of(store, manifest):
            for made in receipt["files"].values():
                path = made["path"]
                if path in seen:
                    continue
                seen.add(path)
                try:
                    with store.open(path) as file:
                        found = sha256_of(file)
                except FileNotFoundError:
                    yield Difference(f"store/{path}", "missing")
                    continue
                if found != made["sha256"]:
                    yield Difference(f"store/{path}", "its bytes are not those of its receipt")


EMPTY_IF_KEPT = ("problem", "step", "reason", "value", "threshold", "duplicate_of")


def accounted(directory: Root, record: Record) -> Iterator[Difference]:
    """Every row is kept or has a reason, and the counts are those of run.json."""
    rows, kept, dropped = 0, 0, Counter[str]()
    for path in parts_of(directory, "decisions"):
        for table in batches(directory, path, ["shard", "key", "kept", *EMPTY_IF_KEPT]):
            keep = table.column("kept").combine_chunks()
            steps = table.column("step")
            blank = {name: pc.is_null(table.column(name)) for name in EMPTY_IF_KEPT}
            for name in EMPTY_IF_KEPT:
                yield from _rows(path, table, pc.and_(keep, pc.invert(blank[name])), f"kept, but has a {name}")
            for name in ("step", "reason"):
                yield from _rows(path, table, pc.and_(pc.invert(keep), blank[name]), f"dropped without a {name}")
            unread = pc.fill_null(pc.equal(steps, READ), False)
            wrong = pc.equal(unread, blank["problem"])
            yield from _rows(path, table, wrong, f"a problem, or the step {READ}, without the other")
            rows += table.num_rows
            kept += pc.sum(keep).as_py() or 0
            dropped.update({v["values"]: v["counts"] for v in steps.drop_null().value_counts().to_pylist()})
    expected = {step: entered - left for step, entered, left in record.funnel}
    if (rows, kept) != (record.funnel[0][1], record.funnel[-1][2]):
        said = f"{record.funnel[0][1]} rows, {record.funnel[-1][2]} kept"
        yield Difference("decisions", f"{rows} rows, {kept} kept, but run.json says {said}")
    for step in sorted(set(expected) | set(dropped)):
        if dropped[step] != expected.get(step, 0):
            yield Difference("decisions", f"{step} dropped {dropped[step]}, run.json says {expected.get(step, 0)}")


def decided_as_read(directory: Root, store: Root, record: Record) -> Iterator[Difference]:
    """The decisions have one row for each sample that reading the pool listed, in its order."""
    for _, decided, samples in shards_of(directory, store, record):
        same = pc.and_(
            pc.equal(decided.column("uid"), hex_column(samples.column("uid"))),
            pc.equal(decided.column("key"), samples.column("key")),
        )
        yield from _rows("decisions", decided, pc.invert(same), "uid or key are not those that were read")


def outputs(directory: Root, store: Root, record: Record, machine: Machine) -> Iterator[Difference]:
    """What is written is exactly the kept rows."""
    try:
        units = list_units(record.recipe.pool, machine.storage_options)
        formats = formats_of(record.recipe, units)
    except UserError as error:
        yield Difference("pool", str(error))
        return
    if "webdataset" in formats:
        yield from tars(directory, store, record, machine, {unit.shard: unit for unit in units})
    if "parquet" in formats:
        yield from tables(directory, store, record)
    if "subset" in formats:
        yield from subset(directory)


class Pair(NamedTuple):
    """A kept row: where it is from, and the members that the pool has of it (schema.MEMBER)."""

    shard: str
    key: str
    uid: str
    members: list[dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.shard} {self.key}"


def kept_pairs(directory: Root, store: Root, record: Record) -> Iterator[Pair]:
    """Every kept row, in pool order."""
    for shard, decided, samples in shards_of(directory, store, record):
        kept = decided.column("kept").combine_chunks()
        found = [decided.column("key"), decided.column("uid"), samples.column("members")]
        for key, uid, members in zip(*(column.filter(kept).to_pylist() for column in found), strict=True):
            yield Pair(shard, key, uid, members or [])


def shards_of(directory: Root, store: Root, record: Record) -> Iterator[tuple[str, pa.Table, pa.Table]]:
    """Each shard that has rows: its name, their decisions, and the samples that were read.

    Raises:
        Unreadable: the decisions have more or fewer rows than were read.
    """
    parts = (part for part in as_read(store, record).samples if part.files[0].rows)
    for decided in _by_shard(directory):
        shard, part = decided.column("shard")[0].as_py(), next(parts, None)
        read = part.files[0].rows if part else 0
        if part is None or decided.num_rows != read:
            raise Unreadable("decisions", f"{decided.num_rows} rows of {shard}, but {read} were read")
        yield shard, decided, rows_of(store, part, ["uid", "key", "members"])
    if part := next(parts, None):
        raise Unreadable("decisions", f"no row of {part.name}, which was read")


def _by_shard(directory: Root) -> Iterator[pa.Table]:
    """The decisions of each shard."""
    waiting: list[pa.Table] = []
    for path in parts_of(directory, "decisions"):
        for table in batches(directory, path, ["uid", "shard", "key", "kept"]):
            shard_N = table.column("shard").to_numpy()
            starts = [0, *(np.flatnonzero(shard_N[1:] != shard_N[:-1]) + 1).tolist(), len(shard_N)]
            for first, last in pairwise(starts):
                if waiting and waiting[0].column("shard")[0].as_py() != shard_N[first]:
                    yield pa.concat_tables(waiting)
                    waiting = []
                waiting.append(table.slice(first, last - first))
    if waiting:
        yield pa.concat_tables(waiting)


def tars(
    directory: Root, store: Root, record: Record, machine: Machine, units: dict[str, Unit]
) -> Iterator[Difference]:
    """The tars hold the members of the kept rows, byte for byte and in pool order, each with its sidecar."""
    pairs = kept_pairs(directory, store, record)
    for number, path in enumerate(parts_of(directory, "filtered", ".tar")):
        if path != f"filtered/{number:08d}.tar":
            yield Difference(path, f"breaks the numbering: {number:08d}.tar is due")
        sidecar = path.removesuffix(".tar") + ".parquet"
        named = [
            (key, uid)
            for table in batches(directory, sidecar, ["key", "uid"])
            for key, uid in zip(table.column("key").to_pylist(), table.column("uid").to_pylist(), strict=True)
        ]
        mine = list(islice(pairs, len(named)))
        if len(mine) < len(named):
            yield Difference(sidecar, f"{len(named)} rows, but only {len(mine)} kept rows are left")
        for (key, uid), pair in zip(named, mine, strict=False):
            if uid != pair.uid or not _renamed(pair.key, key):
                yield Difference(sidecar, f"has {key} {uid} in its place", str(pair))
        keys = [key for key, _ in named]
        with directory.open(path) as file:
            yield from one_tar(
                path, file, directory.bytes(path) or 0, keys, mine, record.recipe.write.annotate, units, machine
            )
    left = sum(1 for _ in pairs)
    if left:
        yield Difference("filtered", f"{left} kept rows are in no tar")


def _renamed(key: str, written: str) -> bool:
    """Whether a key may be written so: as it is, or with a number or a shard's stem in front."""
    old, new = PurePosixPath(key), PurePosixPath(written)
    return old.parent == new.parent and (old.name == new.name or new.name.endswith(f"_{old.name}"))


def one_tar(
    path: str,
    file: BinaryIO,
    size: int,
    keys: Sequence[str],
    pairs: Sequence[Pair],
    annotated: bool,
    units: dict[str, Unit],
    machine: Machine,
) -> Iterator[Difference]:
    """One tar holds the members of some kept rows and nothing else.

    Args:
        path: of the tar, for messages.
        file: the tar.
        size: its length.
        keys: what the rows are called in it.
        pairs: the rows.
        annotated: whether .json members were changed on purpose; their bytes are not compared.
        units: shard -> its files in the pool.
        machine: for the pool's storage.
    """
    listing = walk(file, size)
    for fault in listing.faults:
        if pairs or fault.reason != "empty":
            yield Difference(path, f"{fault.reason} at byte {fault.offset}: {fault.detail}")
    found = iter(listing.members)
    for shard, group in groupby(zip(keys, pairs, strict=False), lambda row: row[1].shard):
        due = [(key + member["name"][len(pair.key) :], member, pair) for key, pair in group for member in pair.members]
        there = list(islice(found, len(due)))
        for (name, _, pair), member in zip_longest(due, there):
            if member is None or member.name != name:
                yield Difference(path, f"holds {member.name if member else 'nothing'} where {name} is due", str(pair))
                return
        if shard not in units:
            yield Difference("pool", f"{shard} is no longer there")
            continue
        try:
            with UnitFiles(units[shard], machine) as files:
                stored = member_bytes(files, [(m["offset"], m["offset"] + m["bytes"]) for _, m, _ in due])
                for (name, _, pair), member, body in zip(due, there, stored, strict=True):
                    if annotated and name.lower().endswith(".json"):
                        continue
                    file.seek(member.offset)
                    if file.read(member.bytes) != body:
                        yield Difference(path, f"{name} does not have the bytes that the pool has", str(pair))
        except OSError as error:
            yield Difference("pool", f"{shard}: {error}")
    for member in found:
        yield Difference(path, f"{member.name} is of no kept row")


def tables(directory: Root, store: Root, record: Record) -> Iterator[Difference]:
    """The parquet files have one row for each kept row, in pool order."""
    pairs = kept_pairs(directory, store, record)
    for path in parts_of(directory, "parquet"):
        for table in batches(directory, path, ["shard", "key", "uid"]):
            rows = zip(*(table.column(name).to_pylist() for name in ("shard", "key", "uid")), strict=True)
            for row in rows:
                pair = next(pairs, None)
                if pair is None or row != pair[:3]:
                    yield Difference(path, f"has {' '.join(row)} in its place", str(pair) if pair else None)
    left = sum(1 for _ in pairs)
    if left:
        yield Difference("parquet", f"{left} kept rows are not in it")


def subset(directory: Root) -> Iterator[Difference]:
    """subset.npy has the uid of every kept row, once, in order."""
    path = "subset.npy"
    try:
        with directory.open(path) as file:
            listed_S = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        yield Difference(path, "missing")
        return
    except ValueError as error:
        yield Difference(path, f"not an array: {error}")
        return
    if listed_S.dtype != SUBSET:
        yield Difference(path, f"of type {listed_S.dtype}, not u8,u8")
        return
    word_S = _ordered(np.stack([listed_S["f0"], listed_S["f1"]], axis=1))
    if not (word_S[1:] > word_S[:-1]).all():
        yield Difference(path, "not in order, each uid once")
        return
    seen_S = np.zeros(len(word_S), bool)
    for part in parts_of(directory, "decisions"):
        for table in batches(directory, part, ["uid", "shard", "key", "kept"]):
            kept = table.filter(table.column("kept"))
            word_N = _ordered(
                np.array([_words(uid) for uid in kept.column("uid").to_pylist()], np.uint64).reshape(-1, 2)
            )
            at_N = np.searchsorted(word_S, word_N)
            there_N = at_N < len(word_S)
            there_N[there_N] = word_S[at_N[there_N]] == word_N[there_N]
            seen_S[at_N[there_N]] = True
            yield from _rows(path, kept, pa.array(~there_N), "kept, but its uid is not listed")
    for word in word_S[~seen_S]:
        uid = word.hex().ljust(32, "0")  # numpy takes zeros off the end
        yield Difference(path, f"{uid} is listed, but is not of a kept row")


def _words(uid: str) -> tuple[int, int]:
    return int(uid[:16], 16), int(uid[16:], 16)


def _ordered(word_N2: np.ndarray) -> np.ndarray:
    """Pairs of uint64 as S16, whose order as bytes is theirs as numbers: (N, 2) -> (N,)."""
    return np.ascontiguousarray(word_N2.astype(">u8")).view("S16").reshape(-1)


def _rows(path: str, table: pa.Table, wrong: pa.Array | pa.ChunkedArray, what: str) -> Iterator[Difference]:
    """A difference for each row that is wrong."""
    found = table.filter(wrong)
    for shard, key in zip(found.column("shard").to_pylist(), found.column("key").to_pylist(), strict=True):
        yield Difference(path, what, f"{shard} {key}")
