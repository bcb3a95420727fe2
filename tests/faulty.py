"""An object store in memory that fails once, as told: what storage layers meet in the wild, on demand.

Objects have an etag, the MD5 of their bytes, as those of S3 have after one PUT.
"""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

READS, WRITES, LOOKS, LISTS = ("cat_file", "get_file"), ("pipe_file", "put_file"), ("info",), ("ls", "find")
OPERATIONS = (*READS, *WRITES, *LOOKS, *LISTS, "rm_file")

ERRORS: dict[str, Callable[[str], OSError]] = {
    "connection reset": lambda path: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "slow down": lambda path: OSError(errno.EBUSY, "Please reduce your request rate."),
    "internal error": lambda path: OSError(errno.EREMOTEIO, "We encountered an internal error. Please try again."),
    "denied": lambda path: PermissionError("Access Denied"),
    "not found": lambda path: FileNotFoundError(path),
}
"""Raised instead of doing the operation; texts and numbers are those that s3fs raises."""

FAULTS: dict[str, tuple[str, ...]] = {
    **{name: OPERATIONS for name in ERRORS},
    "latency": OPERATIONS,
    "short read": READS,
    "flipped bit": READS + WRITES,
    "short write": WRITES,
    "torn write": WRITES,
    "torn write, disk full": WRITES,
    "disk full": WRITES,
    "lost acknowledgement": (*WRITES, "rm_file"),
    "done twice": (*WRITES, "rm_file"),
    "stale listing": ("find",),
}
"""Fault -> operations that it can befall. A pool is what its listing (`ls`) says: no stale one can be told from it."""


@dataclass
class Plan:
    """What goes wrong: the nth call of an operation below a folder.

    Attributes:
        operation: one of OPERATIONS.
        fault: one of FAULTS.
        call: from 1.
        below: part of the paths that count; empty counts all.
        seen: calls so far, by operation: what a run asks of its storage.
        done: whether the fault has happened.
    """

    operation: str = ""
    fault: str = ""
    call: int = 0
    below: str = ""
    seen: dict[str, list[str]] = field(default_factory=dict, repr=False)
    done: bool = False

    def is_due(self, operation: str, path: str) -> bool:
        calls = self.seen.setdefault(operation, [])
        calls.append(path)
        if operation != self.operation or self.below not in path:
            return False
        due = sum(self.below in p for p in calls) == self.call
        self.done |= due
        return due


class FaultyMemory(MemoryFileSystem):  # type: ignore[misc]
    """Objects of fsspec's `memory`, through a plan."""

    plan: ClassVar[Plan] = Plan()
    etag: ClassVar[str] = ""
    """Where it is not empty, that of all objects: what a store with keys of its user's tells."""
    cachable = False
    _inner = False

    def _through(self, operation: str, path: str, call: Callable[[], Any], **how: Callable[[], Any]) -> Any:
        if self._inner:
            return call()
        self._inner = True
        try:
            if not self.plan.is_due(operation, self._strip_protocol(path)):
                return call()
            fault = self.plan.fault
            if fault in ERRORS:
                raise ERRORS[fault](path)
            if fault == "disk full":
                raise OSError(errno.ENOSPC, "No space left on device")
            if fault == "latency":
                time.sleep(0.02)
                return call()
            if fault == "done twice":
                call()
                return call()
            if fault == "lost acknowledgement":
                call()
                raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
            return how[fault.partition(" ")[0]]()
        finally:
            self._inner = False

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        def call() -> bytes:
            try:
                return bytes(self.store[self._strip_protocol(path)].getvalue()[start:end])
            except KeyError:
                raise FileNotFoundError(path) from None

        found: bytes = self._through("cat_file", path, call, short=lambda: call()[:-1], flipped=lambda: flipped(call()))
        return found

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        def put(change: Callable[[bytes], bytes]) -> None:
            Path(lpath).write_bytes(change(self.store[self._strip_protocol(rpath)].getvalue()))

        self._through(
            "get_file",
            rpath,
            lambda: put(bytes),
            short=lambda: put(lambda data: data[: len(data) // 2]),
            flipped=lambda: put(flipped),
        )

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._written("pipe_file", path, bytes(value), mode)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self._written("put_file", rpath, Path(lpath).read_bytes(), "overwrite")

    def _written(self, operation: str, path: str, data: bytes, mode: str) -> None:
        def put(stored: bytes) -> None:
            name = self._strip_protocol(path)  # fsspec's own looks at all objects first
            if mode == "create" and name in self.store:
                raise FileExistsError(path)
            MemoryFile(self, name, stored).commit()

        def tear() -> None:
            put(data[: len(data) // 2])
            if self.plan.fault.endswith("full"):
                raise OSError(errno.ENOSPC, "No space left on device")
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

        how = {"short": lambda: put(data[:-1]), "torn": tear, "flipped": lambda: put(flipped(data))}
        self._through(operation, path, lambda: put(data), **how)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        def call() -> dict[str, Any]:
            name = self._strip_protocol(path)
            if name in self.store:  # fsspec's own looks at all objects first
                file = self.store[name]
                return {"name": name, "size": file.size, "type": "file", "created": file.created}
            found: dict[str, Any] = super(FaultyMemory, self).info(path)
            return found

        return self._tagged(self._through("info", path, call))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        found = self._through("ls", path, lambda: super(FaultyMemory, self).ls(path, detail=detail))
        return [self._tagged(entry) for entry in found] if detail else found

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        def call() -> Any:
            return super(FaultyMemory, self).find(path, maxdepth, withdirs, detail)

        def stale() -> Any:
            found = call()
            newest = max(found, key=lambda name: self.store[name].created, default=None)
            return {name: entry for name, entry in found.items() if name != newest}

        return self._through("find", path, call, stale=stale)

    def rm_file(self, path: str) -> None:
        def call() -> None:
            if self.exists(path):  # as S3, where deleting nothing is no error
                super(FaultyMemory, self).rm_file(path)

        self._through("rm_file", path, call)

    def _tagged(self, entry: dict[str, Any]) -> dict[str, Any]:
        if entry["type"] != "file":
            return entry
        etag = self.etag or hashlib.md5(self.store[entry["name"]].getvalue()).hexdigest()
        return entry | {"ETag": f'"{etag}"'}


def flipped(data: bytes) -> bytes:
    """The same bytes but for one bit in the middle."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] if data else data


@contextmanager
def faulty_memory() -> Iterator[type[FaultyMemory]]:
    """`memory://` with faults, as long as the block lasts; starts and ends empty."""
    before = fsspec.get_filesystem_class("memory")
    fsspec.register_implementation("memory", FaultyMemory, clobber=True)
    FaultyMemory.store.clear()
    try:
        yield FaultyMemory
    finally:
        FaultyMemory.store.clear()
        FaultyMemory.pseudo_dirs[:] = [""]
        FaultyMemory.plan = Plan()
        fsspec.register_implementation("memory", before, clobber=True)
