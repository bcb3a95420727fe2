"""A run: a store of committed parts, an executor and a machine; and the verb `map` that finds or makes a dataset.

`fit` is `map` over all parts as one (Dataset.grouped), `shuffle` is Dataset.shuffled: no verb of their own is needed.

Commit protocol (reliability.md 1i). A part is keyed by what was asked: its stage, its parameters and the digests
of what it reads. A worker builds the files of a part whole, publishes each under a name that holds its digest, creates
the receipt once. The manifest of the dataset comes last. Readers read only what a receipt names, so a crash at any
point leaves either a committed part or nothing that is ever looked at. Resume is a set difference of receipts.

Every record (receipt, manifest, memo) carries a digest of itself. A damaged one counts as none: what it stood for is
made again, and comes out the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import socket
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.costs import Spent, Took, verdict
from pipeline.errors import RunError, SchemaError, UserError
from pipeline.executor import Executor, Failure
from pipeline.machine import Machine, keep_freed_memory
from pipeline.parts import (
    ID_BYTES,
    PACKED,
    Committed,
    Dataset,
    File,
    Listed,
    Part,
    StoredRows,
    Texts,
    canonical,
    digest,
    part_path,
    to_parquet,
    to_shuffle,
)
from pipeline.stage import Function, Made, Sink, Stage, Unit
from pipeline.storage import Root, UnitFiles, scheme_of

log = logging.getLogger(__name__)

T = TypeVar("T")

SEGMENT_PARTS = 4096

TIMES_S = 30.0
"""Seconds after which what a stage took so far is kept."""

MANIFESTS, SEGMENTS, LOOSE = "manifests", "segments", "receipts"
"""Folders of a store, each with a folder for each stage; as parts.PARTS."""

LISTED, FAILED = "listed", "failed"
"""Folders of a store: memos of what was read, and for each stage with failures their record."""

RECEIPTS = pa.schema([("key", pa.string()), ("receipt", pa.string())])
RECEIPT_BATCH = 4096
"""Receipts that are text at the same time, where a manifest is written or read."""

Receipt = dict[str, Any]
"""key; stage; files: output -> {path, sha256, bytes, rows, buckets}; exports: path in the run directory ->
{sha256, bytes}; facts; content: role -> sha256 of the unit's files, for a first read. In a manifest also name, of the
unit or group: equal units share a receipt, and which of them came first is chance."""


class Receipts:
    """Receipts by key, deflated against the first of them: some 200 bytes each, where a Receipt takes 2,500."""

    def __init__(self) -> None:
        self._first = b""
        self._held: dict[str, bytes] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def __getitem__(self, key: str) -> Receipt:
        return cast(Receipt, json.loads(self.record(key).rpartition(b"\n")[0]))

    def record(self, key: str) -> bytes:
        """A receipt as it is stored."""
        return zlib.decompressobj(zdict=self._first).decompress(self._held[key])

    def add(self, receipt: Receipt) -> None:
        """Hold one more; the last of a key counts."""
        record = sealed(receipt)
        self._first = self._first or record
        deflate = zlib.compressobj(zdict=self._first)
        self._held[receipt["key"]] = deflate.compress(record) + deflate.flush()

    def drop(self, key: str) -> None:
        """Hold one less."""
        del self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)


def sealed(value: Any) -> bytes:
    """A record: canonical JSON, and a line with its digest."""
    text = canonical(value)
    return text + b"\n" + _sha256(text).encode()


def unsealed(data: bytes) -> Any:
    """The value of a record.

    Raises:
        ValueError: its digest is another one.
    """
    text, _, seal = data.rpartition(b"\n")
    if _sha256(text).encode() != seal:
        raise ValueError("a damaged record")
    return json.loads(text)


def read_record(store: Root, path: str) -> Any:
    """The value of a record, or None where there is none or a damaged one."""
    try:
        return unsealed(store.read(path))
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("%s is damaged; what it stands for is made again", path)
        return None


def stage_key(stage: Stage) -> str:
    """Stands for a stage and all its parameters.

    Raises:
        TypeError: a parameter cannot be written as JSON.
    """
    return digest({"stage": stage.name, "version": stage.version, "parameters": _plain(stage)})


def _plain(value: Any) -> Any:
    """Nested dataclasses as plain values, each with its class's name: two rules may have the same fields.

    A field marked as a place (metadata {"place": True}) says where something lies whose digest is another field.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        places = {f.name for f in dataclasses.fields(value) if f.metadata.get("place")}
        known = {name: field is not None if name in places else _plain(field) for name, field in fields.items()}
        return {"": type(value).__name__, **known}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


@dataclass(frozen=True)
class Task:
    """One part to make, or several of one unit by stages that share their work.

    Attributes:
        stages: the stages whose part is missing.
        keys: the key of each part; None where it follows from the content of the unit's files (a first read).
        units: the shards to read, for stages that read the pool: one, or for an export any number.
        inputs: one part of each input dataset.
        listing: memo of what the unit's files hold (their listing -> their digests); for a first read.
        after: for a first read: stages whose parts of the same unit are made while its files are at hand.
        many: whether the stage takes a list of Files.
    """

    name: str
    stages: tuple[Stage, ...]
    keys: tuple[str | None, ...]
    units: tuple[Unit, ...]
    inputs: tuple[Part, ...]
    listing: str | None = None
    after: tuple[Stage, ...] = ()
    many: bool = False


@dataclass(frozen=True)
class Done:
    """What came of a task: its receipts, and what it took, which differs each time and enters no record.

    Attributes:
        receipts: one for each stage of the task.
        took: workers' time.
        further: of the parts that a first read made along with its own (Task.after).
    """

    receipts: list[Receipt]
    took: Took
    further: list[Receipt]


@dataclass(frozen=True)
class Ask:
    """A question about a worker rather than a part to make."""

    question: Callable[[Machine], Any]


@dataclass(frozen=True)
class PartWorker:
    """Makes and commits parts, in any process on any host."""

    store: str
    directory: str
    machine: Machine

    def open(self) -> Any:
        keep_freed_memory()
        return _Bench(self).do


class _Bench:
    """What a worker process keeps between tasks: the store, and the functions of the stages it built last."""

    KEEP = 4

    def __init__(self, worker: PartWorker) -> None:
        self.machine = worker.machine
        self.store = Root(worker.store, worker.machine.storage_options)
        self.directory = Root(worker.directory, worker.machine.storage_options)
        self.built: dict[str, Any] = {}
        self.phases: defaultdict[str, float] = defaultdict(float)

    def do(self, task: Task | Ask) -> Any:
        if isinstance(task, Ask):
            return task.question(self.machine)
        started = time.perf_counter()
        self.phases.clear()
        receipts, further = self._receipts(task)
        took = Took(f"{socket.gethostname()} {os.getpid()}", time.perf_counter() - started, dict(self.phases))
        return Done(receipts, took, further)

    def _receipts(self, task: Task) -> tuple[list[Receipt], list[Receipt]]:
        started = time.perf_counter()
        with ExitStack() as stack:
            hashing = task.listing is not None
            files = [stack.enter_context(UnitFiles(unit, self.machine, hashing)) for unit in task.units]
            if task.listing is None:
                return self._make(task, task.keys, files), []
            content = {role: files[0].open(role).sha256 for role in sorted(task.units[0].sources)}
            keys = tuple(digest([stage_key(stage), content]) for stage in task.stages)
            known = [read_receipt(self.store, stage, key) for stage, key in zip(task.stages, keys, strict=True)]
            receipts = [r for r in known if r] if all(known) else self._make(task, keys, files, content)
            further: list[Receipt] = []
            if task.after:
                self.phases["read"] += time.perf_counter() - started
                further = self._go_on(task, receipts[0], files)
            self.store.write(_listed(task.listing), sealed({task.listing: keys[0]}))
            return receipts, further

    def _go_on(self, task: Task, read: Receipt, files: Sequence[UnitFiles]) -> list[Receipt]:
        """Make the parts that `map_together` would ask for next, so that a remote shard is fetched once."""
        parts = tuple(_part(task.name, read, output, _facts(read)) for output in read_before(task.after))
        ids, pixels = [part.id for part in parts], _pixels(parts[0])
        keys = [part_key(stage_key(stage), ids, pixels) for stage in task.after]
        todo = [at for at, key in enumerate(keys) if read_receipt(self.store, task.after[at], key) is None]
        if not todo:
            return []
        mine = replace(task, stages=tuple(task.after[at] for at in todo), inputs=parts)
        return self._make(mine, [keys[at] for at in todo], files)

    def _make(
        self,
        task: Task,
        keys: Sequence[str | None],
        files: Sequence[UnitFiles],
        content: dict[str, str] | None = None,
    ) -> list[Receipt]:
        rows = [StoredRows(self.store, part) for part in task.inputs]
        made = self._function(task.stages)(*([files] if task.many else files), *rows)
        results = made if isinstance(made, list) else [made]
        for result in results:
            for phase, seconds in result.seconds.items():
                self.phases[phase] += seconds
        started = time.perf_counter()
        receipts = [
            commit(self.store, self.directory, stage, cast(str, key), task.name, result, content, self.machine.scratch)
            for stage, key, result in zip(task.stages, keys, results, strict=True)
        ]
        if self.phases:
            self.phases["write"] += time.perf_counter() - started
        return receipts

    def _function(self, stages: tuple[Stage, ...]) -> Function:
        key = digest([stage_key(stage) for stage in stages])
        if key not in self.built:
            while len(self.built) >= self.KEEP:
                del self.built[next(iter(self.built))]
            together = getattr(stages[0], "together", None)
            self.built[key] = together(stages, self.machine) if together else stages[0].build(self.machine)
        return cast(Function, self.built[key])


def read_before(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Which outputs of a first read the stages that follow it take."""
    return ("samples", "columns") if getattr(stages[0], "spare", ()) else ("samples",)


def part_key(stage: str, ids: Sequence[str], pixels: Any = None) -> str:
    """Stands for one part: its stage and all that it reads.

    Args:
        stage: its `stage_key`.
        ids: of the part of each input dataset.
        pixels: for stages that read the pool: what identifies the unit's files (`_pixels`).
    """
    return digest([stage, [*ids] if pixels is None else [*ids, pixels]])


def _listed(listing: str) -> str:
    return f"{LISTED}/{listing[:2]}/{listing}.json"


def _receipt_path(stage: str, key: str) -> str:
    return f"{LOOSE}/{stage}/{key[:2]}/{key}.json"


def read_receipt(store: Root, stage: Stage, key: str) -> Receipt | None:
    """The receipt of one part, or None where it is not committed, or no longer loose."""
    return cast("Receipt | None", read_record(store, _receipt_path(stage.name, key)))


def commit(
    store: Root,
    directory: Root,
    stage: Stage,
    key: str,
    name: str,
    made: Made,
    content: dict[str, str] | None,
    scratch: str | None = None,
) -> Receipt:
    """Publish the files of a part, then its receipt; the first receipt of a key wins.

    Raises:
        SchemaError: the stage returned other tables than it declares.
        RunError: an exact stage gave other bytes than another attempt did.
    """
    if set(made.tables) != set(stage.outputs):
        raise SchemaError(f"{stage.name}: made {sorted(made.tables)}, declares {sorted(stage.outputs)}")
    files = {}
    for output, table in sorted(made.tables.items()):
        files[output] = publish(store, partial(part_path, stage.name, output, key), table, made.buckets, scratch)
    exports = {path: export(directory, path, write) for path, write in sorted(made.exports.items())}
    receipt: Receipt = {
        "key": key,
        "stage": stage.name,
        "files": files,
        "exports": exports,
        "facts": made.facts,
        "content": content,
    }
    where = _receipt_path(stage.name, key)
    if store.create(where, sealed(receipt)):
        return receipt
    first = read_receipt(store, stage, key)
    if first is None:  # torn by a store that does not create whole files, or damaged since
        store.write(where, sealed(receipt))
        return receipt
    for output, file in files.items():
        if first["files"][output]["sha256"] != file["sha256"]:
            if stage.exact:
                raise RunError(f"{stage.name}: two attempts at {name} gave different bytes, though the stage is exact")
            store.delete(file["path"])
    if stage.exact and first["exports"] != exports:
        raise RunError(f"{stage.name}: two attempts at {name} wrote different bytes, though the stage is exact")
    return first


def publish(
    store: Root,
    named: Callable[[str], str],
    rows: pa.Table | Iterable[pa.Table],
    buckets: int | None,
    scratch: str | None = None,
) -> dict[str, Any]:
    """Write one file of a part under the name that its digest gives it; what a receipt says of it."""
    if buckets is None:
        assert isinstance(rows, pa.Table)
        data = to_parquet(rows, internal=True)
        sha256, length, count = _sha256(data), len(data), rows.num_rows
        store.write(named(sha256), data)
    else:  # the vectors of hundreds of units: never all in memory
        with store.writing(named) as file:
            count = to_shuffle(rows, buckets, file, scratch)
        sha256, length = file.sha256, file.bytes
    return {"path": named(sha256), "sha256": sha256, "bytes": length, "rows": count, "buckets": buckets or 0}


def export(directory: Root, path: str, write: Callable[[Sink], object]) -> dict[str, Any]:
    """Publish one file of the run directory; its digest and length."""
    with directory.writing(lambda _: path) as file:
        write(file)
    return {"sha256": file.sha256, "bytes": file.bytes}


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


class Progress(Protocol):
    """Told how far a stage is; shows it or not."""

    def start(self, stage: str, done: int, total: int) -> None: ...

    def advance(self, rows: int) -> None: ...

    def remark(self, text: str) -> None:
        """What bounds the stage, as far as that is known."""

    def stop(self) -> None: ...


class Quiet:
    """Shows nothing."""

    def start(self, stage: str, done: int, total: int) -> None:
        return

    def advance(self, rows: int) -> None:
        return

    def remark(self, text: str) -> None:
        return

    def stop(self) -> None:
        return


@dataclass
class Run:
    """Where datasets are kept and who makes them.

    Attributes:
        store: root of the store; runs that share it share their parts.
        directory: the run directory, for exports.
        executor: does the tasks.
        machine: how fast.
        progress: told about each stage.
        times: one entry for each stage that had something to do, so far: name, parts made, rows, seconds; of its
            workers: how many, the hours of cores and of GPUs that they held, and of embedding the seconds by phase;
            and parts of `further` stages that were made at once.
        keep_times: keeps `times` for a start after this one; called at the end of a stage and every `times_s`.
        datasets: key of every dataset that was asked for, by stage name, in order; the run's record of what it used.
        numerics_class: of the embeddings, once they were asked for.
        segment_parts: loose receipts of one stage that are compacted into one object.
    """

    store: Root
    directory: Root
    executor: Executor
    machine: Machine
    progress: Progress = field(default_factory=Quiet)
    times: list[dict[str, Any]] = field(default_factory=list)
    keep_times: Callable[[], None] = lambda: None
    times_s: float = TIMES_S
    datasets: list[tuple[str, str]] = field(default_factory=list)
    numerics_class: dict[str, str] = field(default_factory=dict)
    segment_parts: int = SEGMENT_PARTS
    manifests: dict[str, str] = field(default_factory=dict)
    """Path -> sha256, of every dataset that was asked for."""
    whole: dict[str, str] = field(default_factory=dict)
    """Path -> sha256 of the manifests that are known to be there and whole."""
    stored_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Stage -> manifest -> bytes of the files that it names."""

    def numerics(self, question: Callable[[Machine], T]) -> T:
        """What a worker with a GPU, if there is one, computes forward passes with; kept for the run's record."""
        ((_, answer),) = self.executor.each(self._worker, [Ask(question)], gpu=True)
        if isinstance(answer, Failure):
            raise UserError(answer.cause) if answer.user else RunError(f"numerics: {answer.cause}")
        self.numerics_class = dataclasses.asdict(answer)
        return cast(T, answer)

    @property
    def _worker(self) -> PartWorker:
        return PartWorker(self.store.url, self.directory.url, self.machine)

    def map(
        self, stage: Stage, *inputs: Dataset, units: Sequence[Unit] | None = None, gpu: bool = False
    ) -> dict[str, Dataset]:
        """Find or make one part for each part of the inputs (or for each unit).

        Args:
            stage: what to compute.
            inputs: datasets of equal length; part i of each goes into part i of the result.
            units: the shards that the stage reads, in the same order.
            gpu: whether a worker with a GPU is wanted.

        Returns:
            Output name -> dataset.

        Raises:
            UserError: a worker met a mistake of the user's.
            RunError: parts that could not be made, each named with its cause; all others are committed.
        """
        return self.map_together([stage], *inputs, units=units, gpu=gpu)[0]

    def map_together(
        self, stages: Sequence[Stage], *inputs: Dataset, units: Sequence[Unit] | None = None, gpu: bool = False
    ) -> list[dict[str, Dataset]]:
        """`map` for several stages over the same parts; a unit that several of them miss is read once for all."""
        keys = [list(self._keys(s, inputs, units is not None)) for s in stages]
        if units is not None and len(units) != len(keys[0]):
            raise ValueError(f"{len(units)} units, {len(keys[0])} parts")
        names = [u.shard for u in units] if units is not None else [p.name for p in inputs[0].parts]
        finished = [self._finished(stage, mine, names) for stage, mine in zip(stages, keys, strict=True)]
        lacking = [at for at, datasets in enumerate(finished) if datasets is None]
        found = Receipts()
        for at in lacking:
            self._find(stages[at], keys[at], names, found)

        def tasks() -> Iterator[Task]:
            for i, name in enumerate(names):
                missing = [at for at in lacking if keys[at][i] not in found]
                if missing:
                    yield Task(
                        name,
                        tuple(stages[at] for at in missing),
                        tuple(keys[at][i] for at in missing),
                        (units[i],) if units else (),
                        tuple(d.parts[i] for d in inputs),
                    )

        missing = sum(any(keys[at][i] not in found for at in lacking) for i in range(len(names)))
        if missing:
            title = stages[0].name if len(stages) == 1 else f"{stages[0].name} x{len(stages)}"
            for _, receipts in self._do(title, tasks(), len(names) - missing, len(names), gpu):
                for receipt in receipts:
                    found.add(receipt)
        return [
            self._finish(stage, mine, found, names) if datasets is None else datasets
            for stage, mine, datasets in zip(stages, keys, finished, strict=True)
        ]

    def read(self, stage: Stage, units: Sequence[Unit], after: Sequence[Stage] = ()) -> dict[str, Dataset]:
        """`map` over the pool's files themselves, whose content is known only once they have been read.

        A part is keyed by the content of the unit's files. What a listing (URL, length, etag) was found to hold is
        remembered, so that a second run reads nothing, and a moved pool is hashed once and then recognised.

        Args:
            stage: lists the samples of a unit.
            units: the shards.
            after: stages that will be mapped over the result and the same units. Their parts are made at once while a
                remote shard is at hand; local ones are cheaper to open twice.
        """
        parameters = stage_key(stage)
        listings = [
            digest([parameters, {role: [s.url, s.bytes, s.etag] for role, s in u.sources.items()}]) for u in units
        ]
        keys: list[str | None] = self._listed(listings)
        known = Receipts()
        shards = [u.shard for u in units]
        if all(keys) and (datasets := self._finished(stage, cast("list[str]", keys), shards)):
            return datasets
        self._find(stage, [k for k in keys if k], [s for s, k in zip(shards, keys, strict=True) if k], known)
        todo = [i for i, k in enumerate(keys) if k is None or k not in known]
        remote = any(scheme_of(s.url) not in ("file", "local") for u in units[:1] for s in u.sources.values())
        then = tuple(after) if remote else ()
        tasks = (Task(units[i].shard, (stage,), (None,), (units[i],), (), listings[i], then) for i in todo)
        if todo:
            loose: dict[str, str] = {}
            for position, done in self._do(stage.name, tasks, len(units) - len(todo), len(units), bool(then)):
                loose[listings[todo[position]]] = keys[todo[position]] = done[0]["key"]
                known.add(done[0])
                if len(loose) >= self.segment_parts:
                    self._compact_listed(loose)
                    loose = {}
            if loose:
                self._compact_listed(loose)
        return self._finish(stage, [cast(str, k) for k in keys], known, shards)

    def export(
        self, stage: Stage, *inputs: Dataset, units: Sequence[Sequence[Unit]] | None = None
    ) -> dict[str, dict[str, Any]]:
        """`map` for stages that write files of the run directory; a file that is gone or has another length is redone.

        Args:
            stage: its Made has `exports`, and no tables.
            inputs: as for `map`.
            units: the shards that each task reads from.

        Returns:
            path below the run directory -> {sha256, bytes}.

        Raises:
            As `map`.
        """
        keys = list(self._keys(stage, inputs, False))
        names = [p.name for p in inputs[0].parts]
        found = Receipts()
        self._find(stage, keys, names, found)
        known = {key: found[key]["exports"] for key in found}
        folders = {path.partition("/")[0] for exports in known.values() for path in exports if "/" in path}
        there = {path: count for folder in folders for path, count in self.directory.list(folder).items()}
        for key, exports in known.items():
            if any((there.get(p) or self.directory.bytes(p)) != f["bytes"] for p, f in exports.items()):
                found.drop(key)
        todo = [i for i, key in enumerate(keys) if key not in found]

        def tasks() -> Iterator[Task]:
            for i in todo:
                mine = tuple(units[i]) if units else ()
                yield Task(
                    names[i], (stage,), (keys[i],), mine, tuple(d.parts[i] for d in inputs), many=units is not None
                )

        if todo:
            for _, (receipt,) in self._do(stage.name, tasks(), len(names) - len(todo), len(names), False):
                found.add(receipt)
        self._finish(stage, keys, found, names)
        return {path: file for key in keys for path, file in found[key]["exports"].items()}

    def rows(self, part: Part) -> StoredRows:
        """Read a small part on the driver, such as the result of a fit."""
        return StoredRows(self.store, part)

    def _keys(self, stage: Stage, inputs: Sequence[Dataset], reads_pool: bool) -> Iterator[str]:
        parameters = stage_key(stage)
        for at, ids in enumerate(zip(*(d.ids() for d in inputs), strict=True)):
            yield part_key(parameters, ids, _pixels(inputs[0].parts[at]) if reads_pool else None)

    def _find(self, stage: Stage, keys: Sequence[str], names: Sequence[str], found: Receipts) -> None:
        """Add the receipts of those keys that are committed: in a manifest of theirs, compacted, or loose."""
        missing = set(keys).difference(found)
        if not missing:
            return
        mine = _manifest(stage, keys, names)
        for folder in (f"{MANIFESTS}/{stage.name}", f"{SEGMENTS}/{stage.name}"):
            for path in sorted(self.store.list(folder), key=lambda path: path != mine):
                if not missing:
                    return
                for receipt in _unpacked(path, self.store.read(path)):
                    if receipt["key"] in missing:
                        found.add(receipt)
                        missing.remove(receipt["key"])
        for path in self.store.list(f"{LOOSE}/{stage.name}"):
            key = path.rpartition("/")[2].removesuffix(".json")
            if key in missing and (receipt := read_record(self.store, path)):
                found.add(receipt)

    def _finished(self, stage: Stage, keys: Sequence[str], names: Sequence[str]) -> dict[str, Dataset] | None:
        """The datasets of a finished stage as its manifest tells them; None without a manifest that is whole."""
        path = _manifest(stage, keys, names)
        try:
            data = self.store.read(path)
        except FileNotFoundError:
            return None

        def asked() -> Iterator[Receipt]:
            for key, receipt in zip(keys, in_order(data), strict=True):
                if receipt["key"] != key:
                    raise ValueError(f"holds {receipt['key']} for {key}")
                yield receipt

        try:
            files = files_of(stage.name, stage.outputs, asked(), len(keys))
        except ValueError as error:
            log.warning("%s: %s; what it stands for is made again", path, error)
            return None
        self.whole[path] = _sha256(data)
        return self._datasets(stage, path, files, names)

    def _listed(self, listings: Sequence[str]) -> list[str | None]:
        """The key of each unit's part, as far as memos of what its files hold are there: compacted, or loose."""
        mine, loose = set(listings), {_listed(listing) for listing in listings}
        known: dict[str, str] = {}
        for path in self.store.list(LISTED):
            if path.count("/") == 1 or path in loose:
                memos = read_record(self.store, path)
                known |= {k: v for k, v in memos.items() if k in mine} if isinstance(memos, dict) else {}
        return [known.get(listing) for listing in listings]

    def _compact_listed(self, memos: dict[str, str]) -> None:
        data = sealed(memos)
        self.store.write(f"{LISTED}/{_sha256(data)[:32]}.json", data)
        for listing in memos:
            self.store.delete(_listed(listing))

    def _do(
        self, title: str, tasks: Iterator[Task], done: int, total: int, gpu: bool
    ) -> Iterator[tuple[int, list[Receipt]]]:
        """Have tasks done; each result as it comes; at the end one error that names all that failed."""
        log.info("%s: %d done, %d to do", title, done, total - done)
        self.progress.start(title, done, total)
        started = kept = time.monotonic()
        parts, rows, spent = 0, 0, Spent()
        further = Counter[str]()
        entry: dict[str, Any] = {}
        self.times.append(entry)

        def count() -> None:
            seconds = round(time.monotonic() - started, 3)
            entry.update({"stage": title, "parts": parts, "rows": rows, "seconds": seconds, **self._held(spent, gpu)})
            if further:
                entry["further"] = dict(further)

        def keep() -> None:
            count()
            self.keep_times()

        count()
        names: list[str] = []
        loose: dict[str, dict[str, bytes]] = {}

        def named() -> Iterator[Task]:
            for task in tasks:
                names.append(task.name)
                yield task

        failed: list[tuple[str, Failure]] = []
        try:
            for position, result in self.executor.each(self._worker, named(), gpu=gpu):
                if isinstance(result, Failure):
                    failed.append((names[position], result))
                    continue
                parts += 1
                made = sum(max((f["rows"] for f in r["files"].values()), default=0) for r in result.receipts)
                rows += made
                further.update({receipt["stage"] for receipt in result.further})
                spent.add(result.took)
                if "decode" in spent.phases:
                    self.progress.remark(self._verdict(spent))
                self.progress.advance(made)
                for receipt in (*result.receipts, *result.further):
                    stage = receipt["stage"]
                    loose.setdefault(stage, {})[receipt["key"]] = sealed(receipt)
                    if len(loose[stage]) >= self.segment_parts:
                        self._compact(stage, loose.pop(stage))
                if time.monotonic() - kept >= self.times_s:
                    keep()
                    kept = time.monotonic()
                yield position, result.receipts
        except KeyboardInterrupt:
            keep()
            raise
        finally:
            self.progress.stop()
        keep()
        log.info("%s: %d parts, %d rows in %.1f s", title, parts, rows, entry["seconds"])
        if failed:
            record = [{"name": name, "cause": failure.cause} for name, failure in failed]
            self.store.write(_failed(title.partition(" ")[0]), canonical(record))
            raise _failure(title, failed)

    def _held(self, spent: Spent, gpu: bool) -> dict[str, Any]:
        """What workers held for a stage: each its threads and, where it embedded, its decoders; and its GPU."""
        cores = self.machine.threads + (self.machine.decoders if spent.phases else 0)
        gpus = int(gpu and self.numerics_class.get("device") == "cuda")
        held = {"core_hours": spent.seconds * cores / 3600, "gpu_hours": spent.seconds * gpus / 3600}
        phases = {phase: round(seconds, 3) for phase, seconds in spent.phases.items()}
        found = {"workers": len(spent.workers), **held}
        if "decode" in phases:
            return found | {"phases": phases, "bound": self._verdict(spent)}
        return found

    def _verdict(self, spent: Spent) -> str:
        return verdict(spent.phases, len(spent.workers), self.machine.decoders)

    def _compact(self, stage: str, records: dict[str, bytes]) -> None:
        data = _pack(list(records), records.values())
        self.store.write(f"{SEGMENTS}/{stage}/{_sha256(data)[:32]}.parquet", data)
        for key in records:
            self.store.delete(_receipt_path(stage, key))

    def _finish(self, stage: Stage, keys: Sequence[str], found: Receipts, names: Sequence[str]) -> dict[str, Dataset]:
        path = _manifest(stage, keys, names)
        if path not in self.whole:
            data = _pack(keys, (sealed({**found[key], "name": name}) for key, name in zip(keys, names, strict=True)))
            self.store.write(path, data)
            self.whole[path] = _sha256(data)
            del data
        files = files_of(stage.name, stage.outputs, (found[key] for key in keys), len(keys))
        return self._datasets(stage, path, files, names)

    def _datasets(
        self, stage: Stage, path: str, files: dict[str, Committed], names: Sequence[str]
    ) -> dict[str, Dataset]:
        """What a finished stage gives, noted in the run's record."""
        self.manifests[path] = self.whole[path]
        self.store.delete(_failed(stage.name))
        self.stored_bytes.setdefault(stage.name, {})[path] = sum(f.bytes for every in files.values() for f in every)
        key = path.rpartition("/")[2].removesuffix(".parquet")
        self.datasets.append((stage.name, key))
        return {output: Dataset(stage.name, key, Listed(names, files[output])) for output in stage.outputs}


def _failed(stage: str) -> str:
    """Where the units are named that a stage could not make, until a rerun makes them."""
    return f"{FAILED}/{stage}.json"


def _manifest(stage: Stage, keys: Sequence[str], names: Sequence[str]) -> str:
    asked = hashlib.sha256(stage_key(stage).encode())
    for key, name in zip(keys, names, strict=True):  # not as one text, which would be as long as all names
        asked.update(f"{key} {name}\0".encode("utf-8", "surrogatepass"))
    return f"{MANIFESTS}/{stage.name}/{asked.hexdigest()[: 2 * ID_BYTES]}.parquet"


def _pack(keys: Sequence[str], records: Iterable[bytes]) -> memoryview:
    """The record of each key as one object, with few of them as text at a time."""
    out, left = io.BytesIO(), iter(records)
    with pq.ParquetWriter(out, RECEIPTS, compression="zstd", use_dictionary=False, write_statistics=False) as file:
        for first in range(0, len(keys), RECEIPT_BATCH):
            some = keys[first : first + RECEIPT_BATCH]
            file.write_table(pa.table([some, [record.decode() for record in islice(left, len(some))]], schema=RECEIPTS))
    return out.getbuffer()


def _unpacked(path: str, data: bytes) -> Iterator[Receipt]:
    """The receipts of a manifest or a segment, up to the first that is damaged."""
    try:
        yield from in_order(data)
    except ValueError as error:
        log.warning("%s: %s; what it stands for is made again", path, error)


def in_order(data: bytes) -> Iterator[Receipt]:
    """The receipts that a manifest or a segment holds; those of a manifest in the order of the dataset's parts.

    Raises:
        ValueError: they are damaged.
    """
    try:
        for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(RECEIPT_BATCH, columns=["receipt"]):
            for record in batch.column("receipt").to_pylist():
                yield unsealed(record.encode())
    except (pa.ArrowException, OSError, AttributeError, KeyError) as error:
        raise ValueError(f"not a list of receipts: {' '.join(str(error).split())}") from None


def files_of(stage: str, outputs: Sequence[str], receipts: Iterable[Receipt], count: int) -> dict[str, Committed]:
    """The files of each output of a stage, in the order of the receipts.

    Raises:
        ValueError: there are not `count` of them.
    """
    facts = Texts()
    packed = {output: bytearray(count * PACKED.size) for output in outputs}  # at once: one that grows takes more
    for at, receipt in zip(range(count), receipts, strict=True):
        facts.append(_facts(receipt))
        for output, rows in packed.items():
            f = receipt["files"][output]
            key, sha256 = bytes.fromhex(receipt["key"]), bytes.fromhex(f["sha256"])
            PACKED.pack_into(rows, at * PACKED.size, key, sha256, f["bytes"], f["rows"], f["buckets"])
    return {output: Committed(stage, output, rows, facts) for output, rows in packed.items()}


def _facts(receipt: Receipt) -> str:
    content = {"content": receipt["content"]} if receipt["content"] else {}
    return canonical(receipt["facts"] | content).decode()


def _part(name: str, receipt: Receipt, output: str, facts: str) -> Part:
    f = receipt["files"][output]
    return Part(name, (File(f["path"], f["sha256"], f["bytes"], f["rows"], facts, f["buckets"]),))


def _pixels(part: Part) -> Any:
    """What identifies the files behind a part of samples, less the sidecar: it holds no pixels and no vectors."""
    content = json.loads(part.files[0].facts).get("content") or {}
    return {role: sha256 for role, sha256 in content.items() if role != "sidecar"}


def _failure(title: str, failed: list[tuple[str, Failure]]) -> Exception:
    first = next((f for _, f in failed if f.user), None)
    if first:
        return UserError(first.cause)
    lines = [
        f"{title}: {len(failed)} of its parts could not be made; the others are committed, a rerun tries only these"
    ]
    lines += [f"  {name}: {failure.cause}" for name, failure in failed[:20]]
    return RunError("\n".join(lines + ([f"  and {len(failed) - 20} more"] if len(failed) > 20 else [])))
