"""How much of what `pairsieve sample` planted each step caught. In: decisions and the pool's columns. Out: counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.decide import READ
from pipeline.record import AsRead, batches, decisions_of, rows_of
from pipeline.step import table_texts
from pipeline.storage import Root

MAX_ROWS = 1_000_000
"""Largest pool that is looked at: a sample is a few thousand rows, and this is held in memory."""

CATCHERS = {
    "near_copy": ("dedup",),
    "mismatched_caption": ("cut",),
    "junk_caption": ("filter", "cut"),
    "unreadable_image": ("read",),
    "missing_caption": ("read",),
    "missing_image": ("read",),
    "truncated_shard": ("read",),
}
"""Fault -> the rules that are meant to catch it."""


def has_planted(read: AsRead) -> bool:
    """Whether a pool tells what was planted in it, and is small enough to be looked at."""
    facts = (json.loads(file.facts) for part in read.columns for file in part.files)
    return sum(read.rows) <= MAX_ROWS and any("planted" in f.get("columns", ()) for f in facts)


@dataclass(frozen=True)
class Told:
    """What the pool tells of each row, and what became of it; lists of N.

    Attributes:
        planted: one of CATCHERS, or anything else for none.
        planted_of: key of the row that a near copy repeats.
        uid, key, step, duplicate_of: as in decisions.
    """

    planted: list[str | None]
    planted_of: list[str | None]
    uid: list[str]
    key: list[str]
    step: list[str | None]
    duplicate_of: list[str | None]


def told(directory: Root, store: Root, read: AsRead) -> Told:
    """Read it from the decisions, and from the pool's own columns in the store.

    Raises:
        Unreadable, DamagedPart: a file is missing or damaged.
    """
    planted: list[str | None] = []
    original: list[str | None] = []
    for part in read.columns:
        columns = rows_of(store, part)
        planted += table_texts(columns, "planted")
        original += table_texts(columns, "planted_of")
    names = ["uid", "key", "step", "duplicate_of"]
    table = pa.concat_tables([b for path in decisions_of(directory) for b in batches(directory, path, names)])
    return Told(planted, original, *(table.column(name).to_pylist() for name in names))


def caught(rows: Told, steps: Sequence[str]) -> dict[str, Any]:
    """Count by fault and step.

    A near copy counts as caught by a dedup step that dropped it or its original, when the two are in one group of
    duplicates: joined by a chain of `duplicate_of` of that step.

    Args:
        rows: of the whole pool.
        steps: `NN-NAME` of each.

    Returns:
        steps: READ and the given ones; kinds: fault -> planted (rows), by_step (rows dropped; for a step that is meant
        to catch the fault, rows caught), meant (those steps), caught (rows, by any of them), recall; dropped and
        unplanted: step -> rows that it dropped, and those of them without a fault; precision: step -> rows caught by
        rows dropped, where it is meant to catch anything.
    """
    planted, uid, step, duplicate_of = rows.planted, rows.uid, rows.step, rows.duplicate_of
    row_of: dict[str | None, int] = {key: row for row, key in enumerate(rows.key)}
    groups = {name: _Groups() for name in steps}
    for mine, name, other in zip(uid, step, duplicate_of, strict=True):
        if name and other:
            groups[name].join(mine, other)

    every = [READ, *steps]
    dropped = Counter(name for name in step if name)
    kinds: dict[str, Any] = {}
    right: Counter[str] = Counter()
    for kind in (k for k in CATCHERS if k in set(planted)):
        meant = [name for name in every if name.partition("-")[2] in CATCHERS[kind]]
        by_step, found = dict.fromkeys(every, 0), 0
        faulty = [row for row, fault in enumerate(planted) if fault == kind]
        for row in faulty:
            if kind == "near_copy":
                first = row_of.get(rows.planted_of[row])
                catching = [n for n in meant if first is not None and _repeats(groups[n], step, uid, row, first, n)]
            else:
                catching = [n for n in meant if step[row] == n]
            elsewhere = step[row]
            if not catching and elsewhere and elsewhere not in meant:
                by_step[elsewhere] += 1
            for name in catching:
                by_step[name] += 1
            found += bool(catching)
        right.update({name: by_step[name] for name in meant})
        kinds[kind] = {
            "planted": len(faulty),
            "by_step": by_step,
            "meant": meant,
            "caught": found,
            "recall": found / len(faulty),
        }
    unplanted = Counter(name for name, fault in zip(step, planted, strict=True) if name and fault not in CATCHERS)
    return {
        "steps": every,
        "kinds": kinds,
        "dropped": {name: dropped[name] for name in every},
        "unplanted": {name: unplanted[name] for name in every},
        "precision": {name: right[name] / dropped[name] for name in every if name in right and dropped[name]},
    }


def _repeats(groups: _Groups, step: list[str | None], uid: list[str], row: int, first: int, name: str) -> bool:
    return name in (step[row], step[first]) and groups.root(uid[row]) == groups.root(uid[first])


class _Groups:
    """Uids joined into groups."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, uid: str) -> str:
        while (above := self._parent.get(uid, uid)) != uid:
            self._parent[uid] = self._parent.get(above, above)
            uid = above
        return uid

    def join(self, first: str, second: str) -> None:
        self._parent[self.root(first)] = self.root(second)
