"""What no kept run refers to in a store. In: a store and the runs that are kept. Out: paths, in the order of deletion.

A run is kept by its run.json, which names its datasets; their manifests name every receipt and so every part. What is
deleted goes names first, bytes last, so that a stop in the middle never leaves a receipt whose part is gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.parts import PARTS
from pipeline.record import load_record, receipts_of
from pipeline.run import LISTED, LOOSE, MANIFESTS, SEGMENTS, in_order, read_record
from pipeline.storage import TEMPORARY, Root, redacted

STALE_S = 24 * 3600.0
"""Age at which a temporary file belongs to no process any more."""


@dataclass(frozen=True)
class Unreferred:
    """A file of a store that no kept run refers to."""

    path: str
    bytes: int


@dataclass(frozen=True)
class Referred:
    """What the kept runs refer to in a store: manifests and parts by path, receipts by key."""

    manifests: frozenset[str]
    keys: frozenset[str]
    parts: frozenset[str]


def kept_runs(store: Root, keep: Sequence[Root], options: dict[str, dict[str, object]]) -> list[Root]:
    """The runs to keep: those named, and the one whose directory holds the store."""
    parent = store.url.rpartition("/")[0]
    if not parent or parent.endswith(":/"):
        return list(keep)
    home = Root(parent, options)
    return [*keep, home] if home.bytes("run.json") is not None else list(keep)


def referred(store: Root, runs: Sequence[Root]) -> Referred:
    """What some finished runs refer to.

    Raises:
        UserError: one of them is not finished, so that its parts cannot be known, or uses another store.
        Unreadable: a manifest is damaged.
    """
    manifests: set[str] = set()
    keys: set[str] = set()
    parts: set[str] = set()
    for run in runs:
        if run.bytes("checksums.sha256") is None:
            raise UserError(f"{redacted(run.url)}: this run is not finished, so what it needs is not known; finish it")
        mine = set(load_record(run).manifests)
        for path in sorted(mine):
            if store.bytes(path) is None:
                raise UserError(f"{redacted(run.url)}: it refers to {path}, which is not in {redacted(store.url)}")
        for path in sorted(mine - manifests):
            for receipt in receipts_of(store, path):
                keys.add(receipt["key"])
                parts.update(file["path"] for file in receipt["files"].values())
        manifests |= mine
    return Referred(frozenset(manifests), frozenset(keys), frozenset(parts))


def unreferred(store: Root, kept: Referred, now_s: float) -> Iterator[Unreferred]:
    """Everything of a store that is not referred to, in the order in which it may be deleted.

    Files that no run writes are left alone. A segment goes unless all its receipts are kept: those that are have a
    place in their manifest too.

    Args:
        store: its root.
        kept: what stays.
        now_s: seconds since 1970, to tell stale temporary files of a local store.
    """
    for path, count in store.list(MANIFESTS).items():
        if path not in kept.manifests:
            yield Unreferred(path, count)
    for path, count in store.list(SEGMENTS).items():
        if not _keys_packed(store, path) <= kept.keys:
            yield Unreferred(path, count)
    for path, count in store.list(LOOSE).items():
        if path.rpartition("/")[2].removesuffix(".json") not in kept.keys:
            yield Unreferred(path, count)
    for path, count in store.list(LISTED).items():
        if not set(_keys(store, path)) <= kept.keys:
            yield Unreferred(path, count)
    for path, count in store.list(PARTS).items():
        if path not in kept.parts:
            yield Unreferred(path, count)
    yield from stale(store, now_s)


def stale(store: Root, now_s: float) -> Iterator[Unreferred]:
    """Temporary files of a local store that a process left behind when it was killed."""
    local = store.local("")
    if local is None:
        return
    for folder, _, names in os.walk(local):
        for name in sorted(names):
            path = Path(folder) / name
            if name.startswith(TEMPORARY) and now_s - path.stat().st_mtime > STALE_S:
                yield Unreferred(path.relative_to(local).as_posix(), path.stat().st_size)


def _keys_packed(store: Root, path: str) -> set[str]:
    try:
        return {receipt["key"] for receipt in in_order(store.read(path))}
    except ValueError:
        return {""}


def _keys(store: Root, path: str) -> list[str]:
    memos = read_record(store, path)
    return list(memos.values()) if isinstance(memos, dict) else [""]
