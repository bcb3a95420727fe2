"""Every step's verdict on one sample, with values and thresholds. In: a finished run and a uid. Out: one value per row.

Equal pairs share a uid, so there may be several rows. What the run directory does not hold (the caption, what a filter
measured of a row that passed) is read from the store, where it is at hand.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.bloom import may_hold
from pipeline.decide import READ
from pipeline.errors import UserError
from pipeline.recipe import Rule
from pipeline.record import AsRead, Record, Unreadable, as_read, decisions_of, load_record, rows_of
from pipeline.schema import DECISION
from pipeline.select.cut import Cut
from pipeline.select.dedup import Dedup
from pipeline.select.density import Density
from pipeline.select.filter import Filter, cld3
from pipeline.storage import Root, redacted

UID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class StepVerdict:
    """What one step says of one row.

    Attributes:
        step: `NN-NAME`.
        outcome: passed, dropped or not reached.
        reason: why it was dropped, or None.
        facts: name -> value: what was measured and what it was compared with, as far as it is known.
    """

    step: str
    outcome: str
    reason: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Explained:
    """One row of the pool.

    Attributes:
        uid, shard, key: which.
        kept: whether it is in the outputs.
        caption: None where the store is not at hand.
        scores: decisions' further columns: scores, and the pool's columns that a step used.
        verdicts: of reading, then of each step of the recipe.
    """

    uid: str
    shard: str
    key: str
    kept: bool
    caption: str | None
    scores: dict[str, Any]
    verdicts: tuple[StepVerdict, ...]


def explain(directory: Root, store: Root, uid: str) -> list[Explained]:
    """All rows of a uid, in pool order.

    Raises:
        UserError: it is not 32 hex digits, or no row has it; or the folder holds no finished run.
    """
    uid = uid.lower()
    if not UID.fullmatch(uid):
        raise UserError(f"{uid}: a uid is 32 hex digits")
    record = load_record(directory)
    pool = _pool(store, record)
    found = []
    first = 0
    for path in decisions_of(directory):
        rows, count = rows_of_uid(directory, path, uid)
        for at, row in rows:
            read = _row_as_read(store, pool, first + at)
            found.append(_explained(directory, record, row, read, path.rpartition("/")[2]))
        first += count
    if not found:
        raise UserError(f"{uid}: no sample of {redacted(directory.url)} has this uid")
    return found


def rows_of_uid(directory: Root, path: str, uid: str) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """Rows of a parquet file with a uid, each with its position; and the rows of the whole file."""
    found: list[tuple[int, dict[str, Any]]] = []
    with directory.open(path) as file, pq.ParquetFile(file) as table:
        first = 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if may_hold(file, table.metadata.row_group(group), "uid", uid.encode()):
                hit = pc.equal(table.read_row_group(group, columns=["uid"]).column("uid"), uid)
                if pc.any(hit).as_py():
                    at = pc.indices_nonzero(hit)
                    rows = table.read_row_group(group).take(at).to_pylist()
                    found += [(first + i, row) for i, row in zip(at.to_pylist(), rows, strict=True)]
            first += count
    return found, first


def _pool(store: Root, record: Record) -> AsRead | None:
    """The pool as it was read; None where the store is not at hand."""
    try:
        return as_read(store, record)
    except Unreadable:
        return None


def _row_as_read(store: Root, pool: AsRead | None, row: int) -> tuple[pa.Table, pa.Table] | None:
    """The sample at a position in the pool and its metadata, one row each; None where the store is not at hand."""
    if pool is None:
        return None
    ends = list(accumulate(pool.rows))
    unit = bisect_right(ends, row)
    at = row - (ends[unit - 1] if unit else 0)
    try:
        return rows_of(store, pool.samples[unit]).slice(at, 1), rows_of(store, pool.columns[unit]).slice(at, 1)
    except Unreadable:
        return None


def _explained(
    directory: Root, record: Record, row: dict[str, Any], read: tuple[pa.Table, pa.Table] | None, part: str
) -> Explained:
    steps = [(f"{number:02d}-{name}", rule) for number, (name, rule) in enumerate(record.recipe.select, 1)]
    names = [READ, *(name for name, _ in steps)]
    last = names.index(row["step"]) if row["step"] else len(names)
    verdicts = []
    for number, (name, rule) in enumerate([(READ, None), *steps]):
        if number > last:
            verdicts.append(StepVerdict(name, "not reached"))
            continue
        facts = _facts(directory, name, rule, row, read, part) if rule is not None else {}
        if number == last:
            own = {key: row[key] for key in ("value", "threshold", "duplicate_of") if row[key] is not None}
            verdicts.append(StepVerdict(name, "dropped", row["reason"], {**facts, **own}))
        else:
            verdicts.append(StepVerdict(name, "passed", None, facts))
    caption = read[0].column("caption")[0].as_py() if read else None
    scores = {name: value for name, value in row.items() if name not in DECISION}
    return Explained(row["uid"], row["shard"], row["key"], row["kept"], caption, scores, tuple(verdicts))


def _facts(
    directory: Root,
    step: str,
    rule: Rule,
    row: dict[str, Any],
    read: tuple[pa.Table, pa.Table] | None,
    part: str,
) -> dict[str, Any]:
    """What a step that the row reached measured of it."""
    folder = f"select/{step}"
    if isinstance(rule, Filter):
        return dict(_conditions(rule, *read)) if read else {}
    if isinstance(rule, Cut):
        threshold = json.loads(directory.read(f"{folder}/cut.json"))["threshold"]
        return {"value": row[rule.column or f"score_{rule.score}"], "threshold": threshold}
    if not isinstance(rule, (Dedup, Density)):
        return {}
    rows, _ = rows_of_uid(directory, f"{folder}/assign/{part}", row["uid"])
    mine = next((r for _, r in rows if (r["shard"], r["key"]) == (row["shard"], row["key"])), {})
    facts = {name: value for name, value in mine.items() if name not in ("uid", "shard", "key") and value is not None}
    if isinstance(rule, Dedup):
        return {**facts, "threshold": 1 - rule.epsilon}
    with directory.open(f"{folder}/clusters.parquet") as file:
        clusters = pq.read_table(file, columns=["cluster", "size", "quota"])
    own = clusters.filter(pc.equal(clusters.column("cluster"), facts.get("cluster", -1))).to_pylist()
    return {**facts, **({"cluster_size": own[0]["size"], "quota": own[0]["quota"]} if own else {})}


def _conditions(rule: Filter, samples: pa.Table, columns: pa.Table) -> Iterator[tuple[str, str]]:
    """Every condition of a filter, with what this row has against what it asks for."""
    detect = cld3() if rule.language and rule.language.detector else None
    for check in rule.checks(samples, columns, detect):
        if check.missing[0]:
            verdict = "no value"
        elif check.value is None:
            verdict = "fails" if check.fails[0] else "holds"
        else:
            verdict = f"{check.value[0]:g} against {check.threshold:g}, {'fails' if check.fails[0] else 'holds'}"
        yield check.key, verdict
