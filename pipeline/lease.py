"""One run at a time in a run directory. In: the store and the directory. Out: a lease in the store while a run lasts.

It spares two runs of one directory from undoing each other's files. Nothing depends on it for the committed parts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.errors import UserError
from pipeline.parts import canonical, digest
from pipeline.storage import Root, redacted

LEASES = "leases"
"""Folder of a store: one object for each run directory that is being written."""

BEAT_S = 10.0
"""Between signs of life of a run."""

WATCH_S = 35.0
"""A holder that gives no sign for so long, by the clock of who watches, is taken for dead."""

log = logging.getLogger(__name__)


@contextmanager
def leased(store: Root, directory: Root, beat_s: float = BEAT_S, watch_s: float = WATCH_S) -> Iterator[None]:
    """Hold a run directory for as long as the block lasts.

    Args:
        store: where the lease lies.
        directory: what it is for.
        beat_s: between signs of life.
        watch_s: how long another holder's are waited for.

    Raises:
        UserError: another run that is alive holds it.
    """
    path = _path(directory)
    mine = {"host": platform.node(), "pid": os.getpid(), "run": uuid.uuid4().hex, "of": redacted(directory.url)}
    if other := _take(store, path, mine, watch_s):
        holder = f"process {other['pid']} on {other['host']}"
        raise UserError(f"{redacted(directory.url)}: another run writes here ({holder}); wait, or name another")
    over = threading.Event()
    heart = threading.Thread(target=_beat, args=(store, path, mine, beat_s, over), name="lease", daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join(1.0)
        with suppress(OSError):  # it would hide why the run ended; who comes next sees that nobody is there
            if _holder(store, path) == mine["run"]:
                store.delete(path)


def _take(store: Root, path: str, mine: dict[str, Any], watch_s: float) -> dict[str, Any] | None:
    """Get a lease; None, or the holder that is alive.

    Of several runs that find a dead holder one follows it: the one that gets the lease of the succession.
    """
    while not store.create(path, canonical({**mine, "beat": 0})):
        gone, other = _holder(store, path), _read(store, path)
        if other and _lives(store, path, other, watch_s):
            return other
        if gone is None:
            continue
        succession = f"{path.removesuffix('.json')}-{gone}.json"
        if rival := _take(store, succession, mine, watch_s):
            return rival
        try:
            if _holder(store, path) == gone:  # else another has followed it and left the succession
                store.write(path, canonical({**mine, "beat": 0}))
                log.warning("%s: the run before did not end; going on from what it committed", mine["of"])
                return None
        finally:
            store.delete(succession)
    return None


def holders(store: Root, directory: Root | None = None) -> list[str]:
    """Who writes with a store, as far as can be told without waiting for a sign of life.

    Args:
        store: its root.
        directory: the run directory that is asked about; None: any.

    Returns:
        `process 7 on host (leases/....json)`, without those of this host whose process is gone.
    """
    paths = list(store.list(LEASES)) if directory is None else [_path(directory)]
    leases = [(path, lease) for path in paths if (lease := _read(store, path))]
    return [
        f"process {lease['pid']} on {lease['host']} ({path})"
        for path, lease in leases
        if lease["host"] != platform.node() or _runs(lease["pid"])
    ]


def _path(directory: Root) -> str:
    return f"{LEASES}/{digest(str(directory.local('') or directory.url))}.json"


def _beat(store: Root, path: str, mine: dict[str, Any], beat_s: float, over: threading.Event) -> None:
    for beat in itertools.count(1):
        if over.wait(beat_s):
            return
        with suppress(OSError):  # the run itself will meet the same error
            if _holder(store, path) not in (None, mine["run"]):
                log.warning("%s: this run gave no sign for too long, and another has followed it", mine["of"])
                return
            store.write(path, canonical({**mine, "beat": beat}))


def _lives(store: Root, path: str, other: dict[str, Any], watch_s: float) -> bool:
    """Whether a holder gives a sign of life. Clocks of hosts are not compared, and a process id may be used again."""
    if other["host"] == platform.node() and not _runs(other["pid"]):
        return False
    log.info("another run, process %s on %s, seems to write here; waiting for a sign", other["pid"], other["host"])
    end = time.monotonic() + watch_s
    while time.monotonic() < end:
        time.sleep(min(1.0, watch_s / 10))
        now = _read(store, path)
        if now != other:
            return now is not None
    return False


def _read(store: Root, path: str) -> dict[str, Any] | None:
    """A lease; None where there is none, or a torn one."""
    try:
        lease = json.loads(store.read(path))
    except (FileNotFoundError, ValueError):
        return None
    return lease if isinstance(lease, dict) and {"host", "pid", "run", "beat"} <= lease.keys() else None


def _holder(store: Root, path: str) -> str | None:
    """What tells a lease from its successor's; None where there is none."""
    lease = _read(store, path)
    if lease:
        return str(lease["run"])
    try:
        return hashlib.sha256(store.read(path)).hexdigest()
    except FileNotFoundError:
        return None


def _runs(pid: int) -> bool:
    if pid == os.getpid():
        return False  # the one of a container that was started again
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
