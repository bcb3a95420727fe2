"""The report: a finished run directory in, report/index.html and report/report.json out.

index.html stands alone: no network, no script. Captions, keys and column names are strangers' text: Jinja escapes them,
`shown` takes what could reorder or hide text out of them, and a policy in the page forbids everything but its own
styles and the pictures inside it. report.json holds every number that the page shows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import charts
from pipeline.control import controls
from pipeline.costs import held_hours, money, size
from pipeline.errors import PairsieveError, UserError
from pipeline.machine import Machine, Prices
from pipeline.pictures import (
    Seen,
    captions_of,
    characteristic,
    identify,
    look,
    ranges_of,
    spoken_units,
)
from pipeline.planted import caught, has_planted, told
from pipeline.record import AsRead, Record, as_read, batches, load_record, parts_of, rows_of, shown
from pipeline.storage import Root, redacted
from pipeline.tally import NEAR, Concepts, StepTally, Tally, tally

MINUS = "\N{MINUS SIGN}"
BINS = 48
MAX_POINTS = 2000
"""Clusters drawn in a scatter, the largest first."""

MAX_NAMED = 20
"""Damaged shards that are named, and combinations of failed conditions."""


def write_report(directory: Root, store: Root, machine: Machine) -> dict[str, dict[str, Any]]:
    """Write the report of a finished run.

    Args:
        directory: the run directory: recipe.yaml, run.json, times.json, decisions/, select/, problems/.
        store: its store, for captions and what was planted; without it the report says so.
        machine: how storage is reached.

    Returns:
        path below the run directory -> {sha256, bytes} of both files.

    Raises:
        UserError: the folder holds no finished run.
        Unreadable: one of its files is missing or damaged.
    """
    record = load_record(directory)
    found, seen = gather(directory, store, machine, record)
    files = {
        "report/index.html": page(found, {row: s.picture for row, s in seen.items() if s.picture}).encode(),
        "report/report.json": (json.dumps(found, indent=1, sort_keys=True, allow_nan=False) + "\n").encode(),
    }
    for path, data in files.items():
        directory.write(path, data)
    return {path: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for path, data in files.items()}


def replace_report(directory: Root, store: Root, machine: Machine) -> None:
    """Write the report anew, and its own lines of checksums.sha256.

    Raises:
        As write_report; UserError also where the run has no checksums.
    """
    try:
        lines = directory.read("checksums.sha256").decode().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{redacted(directory.url)}: no finished run is here (no checksums.sha256)") from None
    written = write_report(directory, store, machine)
    digests = {path: sha256 for sha256, _, path in (line.partition("  ") for line in lines)}
    digests |= {path: file["sha256"] for path, file in written.items()}
    text = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(digests.items()))
    directory.write("checksums.sha256", text.encode())


def gather(directory: Root, store: Root, machine: Machine, record: Record) -> tuple[dict[str, Any], dict[int, Seen]]:
    """Every number of the report, and the rows that it shows."""
    funnel, recipe = record.funnel, record.recipe
    listed, kept = funnel[0][1], funnel[-1][2]
    names = [step for step, _, _ in funnel[1:]]
    read, missing = _as_read(store, record, listed)
    units = spoken_units(read)
    counted = tally(directory, record, listed, ranges_of(read, units))
    control = controls(counted.drawn, names, recipe.seed)
    seen, originals, note = _looked(directory, store, read, record, machine, counted)
    if missing:
        note = f"The store of this run could not be read ({missing}), so there are no captions and no pictures here."
    spoken = captions_of(store, read, units) if any(s.concepts for s in counted.steps) else []
    at = np.concatenate([np.zeros(0, np.int64), *(np.arange(r.start, r.stop) for r in ranges_of(read, units))])
    shown = _Shown(seen, originals)
    about = record.about
    paths = recipe.pool.path if isinstance(recipe.pool.path, list) else [recipe.pool.path]
    return {
        "pool": {"format": recipe.pool.format, "path": [redacted(path) for path in paths[:MAX_NAMED]]},
        "listed": listed,
        "kept": kept,
        "unreadable": about["unreadable"],
        "shards": about["shards"],
        "damaged_shards": about["damaged_shards"],
        "max_unreadable": recipe.limits.max_unreadable,
        "funnel": [
            {"step": s, "entered": a, "left": b, "of_pool": b / listed if listed else 0.0} for s, a, b in funnel
        ],
        "steps": [
            _step(step, record, control[step.name], shown, _words(step.concepts, spoken, at)) for step in counted.steps
        ],
        "control": {"stride": counted.drawn.stride, "pool": control["pool"]},
        "problems": _problems(directory),
        "planted": caught(told(directory, store, read), names) if has_planted(read) else None,
        "times": _times(json.loads(directory.read("times.json")), listed, machine.prices),
        "versions": about["versions"],
        "models": about["models"],
        "numerics": about["numerics"],
        "note": note,
    }, seen


def _as_read(store: Root, record: Record, listed: int) -> tuple[AsRead, str]:
    """The pool as it was read; nothing, and why, where the store cannot give it."""
    try:
        read = as_read(store, record)
        for part in read.samples[:1]:
            rows_of(store, part, ["uid"])
    except IndexError:
        return AsRead(), "run.json names no samples in it"
    except PairsieveError as error:
        return AsRead(), str(error)
    except OSError as error:
        return AsRead(), type(error).__name__
    rows = sum(read.rows)
    return (read, "") if rows == listed else (AsRead(), f"{rows} rows in it, {listed} listed")


def _looked(
    directory: Root, store: Root, read: AsRead, record: Record, machine: Machine, counted: Tally
) -> tuple[dict[int, Seen], dict[str, list[int]], str | None]:
    """The rows to show as they are shown, the rows of each original's uid, and why pictures are missing."""
    rows: set[int] = set()
    originals: set[str] = set()
    for step in counted.steps:
        mine = [step.near_kept, step.near_dropped, step.pairs, *step.by_reason.values()]
        if step.concepts:
            mine += [*step.concepts.typical.values(), *_at_thresholds(step.concepts)]
        rows.update(row for table in mine for row in table.column("row").to_pylist())
        if step.rule_name == "dedup":
            originals.update(u for table in mine for u in table.column("of").to_pylist() if u)
    found, rows_of_uid = identify(directory, rows, originals)
    seen, note = look(found, store, read, record.recipe.pool, machine)
    return seen, rows_of_uid, note


def _at_thresholds(concepts: Concepts) -> tuple[pa.Table, pa.Table]:
    """The last kept and the first dropped row of the largest clusters that have both, cluster by cluster."""
    size = concepts.table.column("size").to_pylist()
    both = set(concepts.last_kept.column("cluster").to_pylist())
    both &= set(concepts.first_dropped.column("cluster").to_pylist())
    wanted = sorted(both, key=lambda c: (-size[c], c))[:NEAR]

    def rows(table: pa.Table) -> pa.Table:
        known = table.column("cluster").to_pylist()
        return table.take(pa.array([known.index(c) for c in wanted], pa.int64()))

    return rows(concepts.last_kept), rows(concepts.first_dropped)


class _Shown:
    """Candidates as entries of the report."""

    def __init__(self, seen: dict[int, Seen], originals: dict[str, list[int]]) -> None:
        self._seen = seen
        self._originals = originals

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        return [self._entry(r) for r in table.to_pylist()]

    def pairs(self, table: pa.Table) -> list[dict[str, Any]]:
        """Entries with the earlier row that each repeats, where it is listed."""
        found = []
        for candidate in table.to_pylist():
            others = [r for r in self._originals.get(candidate["of"] or "", []) if r != candidate["row"]]
            if others:
                found.append(self._entry(candidate) | {"original": self._identity(others[0])})
        return found

    def _identity(self, row: int) -> dict[str, Any]:
        seen = self._seen[row]
        return {"row": row, "uid": seen.uid, "shard": seen.shard, "key": seen.key, "caption": seen.caption}

    def _entry(self, candidate: dict[str, Any]) -> dict[str, Any]:
        figures = {name: candidate[name] for name in ("value", "threshold", "kept", "cluster")}
        return self._identity(candidate["row"]) | {k: v for k, v in figures.items() if v is not None}


def _words(concepts: Concepts | None, captions: Sequence[str], rows: np.ndarray) -> dict[int, list[str]]:
    if concepts is None or not captions:
        return {}
    row, cluster = concepts.spoken
    at = np.searchsorted(rows, row)
    return characteristic([captions[i] for i in at], cluster, concepts.shown)


def _step(
    step: StepTally, record: Record, control: dict[str, Any], shown: _Shown, words: dict[int, list[str]]
) -> dict[str, Any]:
    """One step of the report."""
    about: dict[str, Any] = record.about
    _, entered, left = record.funnel[step.number]
    drops = about["drops"][step.name]
    overlap = sorted(drops["overlap"].items(), key=lambda item: (-item[1], item[0]))
    found: dict[str, Any] = {
        "step": step.name,
        "rule": step.rule_name,
        "parameters": _parameters(dataclasses.asdict(step.rule)),
        "entered": entered,
        "left": left,
        "reasons": drops["reasons"],
        "overlap": [{"fails": name.split("+"), "rows": rows} for name, rows in overlap[:MAX_NAMED]],
        "also_below": step.overlap,
        "control": control,
        "clustering": about["health"][step.name],
        "by_reason": {name: shown.rows(table) for name, table in sorted(step.by_reason.items())},
        "near_kept": shown.rows(step.near_kept),
        "near_dropped": shown.rows(step.near_dropped),
    }
    if step.score:
        found["histogram"] = step.score.histogram(BINS) | {"threshold": step.score.threshold}
    if step.rule_name == "dedup":
        found |= {n: shown.pairs(t) for n, t in (("near_kept", step.near_kept), ("near_dropped", step.near_dropped))}
        found["pairs"] = shown.pairs(step.pairs)
    if step.concepts:
        last, first = _at_thresholds(step.concepts)
        found |= {"near_kept": shown.rows(last), "near_dropped": shown.rows(first)}
        found |= _concepts(step.concepts, shown, words)
    return found


def _parameters(plain: dict[str, Any], above: str = "") -> dict[str, Any]:
    """A rule's keys that are set, those inside others with dots; URLs without what may be secret."""
    found: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            found |= _parameters(value, f"{above}{name}.")
        elif value is not None:
            found[above + name] = redacted(value) if isinstance(value, str) else value
    return found


def _concepts(concepts: Concepts, shown: _Shown, words: dict[int, list[str]]) -> dict[str, Any]:
    clusters = [row | {"share": row["quota"] / row["size"]} for row in concepts.table.to_pylist() if row["size"]]
    by_number = {row["cluster"]: row for row in clusters}

    def concept(number: int) -> dict[str, Any]:
        found: dict[str, Any] = by_number[number]
        return found | {"words": words.get(number, []), "rows": shown.rows(concepts.typical[number])}

    drawn = sorted(clusters, key=lambda row: (-row["size"], row["cluster"]))[:MAX_POINTS]
    return {
        "clusters": {"live": len(clusters), "drawn": drawn},
        "largest": [concept(number) for number in concepts.largest],
        "pruned": [concept(number) for number in concepts.pruned],
    }


def _problems(directory: Root) -> dict[str, Any]:
    """Samples and shards with each problem, and the first damaged shards."""
    samples: Counter[str] = Counter()
    shards: Counter[str] = Counter()
    named: list[dict[str, Any]] = []
    for path in parts_of(directory, "problems"):
        seen: set[tuple[str, str]] = set()  # all lines of a shard are in one part
        for table in batches(directory, path):
            of_shard = pc.is_null(table.column("key"))
            for found in table.filter(pc.invert(of_shard)).column("reason").value_counts().to_pylist():
                samples[found["values"]] += found["counts"]
            for line in table.filter(of_shard).to_pylist():
                if (line["shard"], line["reason"]) not in seen:
                    seen.add((line["shard"], line["reason"]))
                    shards[line["reason"]] += 1
                    named.append(line)
        del named[MAX_NAMED:]
    reasons = sorted({*samples, *shards}, key=lambda reason: (-samples[reason] - shards[reason], reason))
    return {
        "reasons": [{"reason": r, "samples": samples[r], "shards": shards[r]} for r in reasons],
        "damaged": named,
    }


def _times(times: dict[str, Any], listed: int, prices: Prices | None) -> dict[str, Any]:
    """Seconds and rates of each stage that had something to do, and what the run took in all its starts."""
    stages: dict[str, dict[str, Any]] = {}
    longest: dict[str, float] = {}
    for entry in times["stages"]:
        stage = stages.setdefault(entry["stage"], {"stage": entry["stage"], "parts": 0, "rows": 0, "seconds": 0.0})
        for name in ("parts", "rows", "seconds"):
            stage[name] += entry[name]
        if "phases" in entry:
            before = stage.get("phases", {})
            stage["phases"] = {p: round(before.get(p, 0) + s, 3) for p, s in entry["phases"].items()}
            if entry["seconds"] >= longest.get(entry["stage"], 0):  # a start of a few seconds does not say what bounds
                longest[entry["stage"]], stage["bound"] = entry["seconds"], entry["bound"]
    for name, stage in stages.items():
        seconds = stage["seconds"]
        stage["rows_per_s"] = stage["rows"] / seconds if seconds else None
        if name.split(" ")[0] == "embed" and seconds:
            models = int(name.partition(" x")[2] or 1)
            stage["images_per_s"] = stage["rows"] / models / seconds
    return {
        "host": times["host"],
        "stages": list(stages.values()),
        "seconds": sum(s["seconds"] for s in stages.values()),
        "found": times.get("found", {}),
        "taken": _taken(times, listed, prices),
    }


def _taken(times: dict[str, Any], listed: int, prices: Prices | None) -> dict[str, Any]:
    """Hours that workers held, also for a million samples of the pool; bytes; and money, where prices are stated."""
    core_hours, gpu_hours = held_hours(times["stages"])
    stored = times["stored_bytes"]
    vectors = sum(size for stage, size in stored.items() if stage in ("embed", "precomputed"))
    found: dict[str, Any] = {
        "core_hours": core_hours,
        "gpu_hours": gpu_hours,
        "core_hours_per_million": 1e6 * core_hours / listed if listed else 0.0,
        "gpu_hours_per_million": 1e6 * gpu_hours / listed if listed else 0.0,
        "pool_bytes": times["pool_bytes"],
        "vector_bytes": vectors,
        "stored_bytes": sum(stored.values()),
        "written_bytes": times["written_bytes"],
    }
    if prices:
        kept = found["stored_bytes"] + found["written_bytes"]
        read = any(entry["stage"] == "read" for entry in times["stages"])
        cost = money(prices, core_hours, gpu_hours, kept, found["pool_bytes"] if read else 0)
        found["money"] = {"currency": prices.currency, "total": sum(cost.values()), **cost}
    return found


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or not share else f"{share:.2g}"


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value:,.0f}" if value == int(value) else f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return text.replace("-", MINUS)


def _exact(value: float) -> str:
    """As many digits as tell neighbours of a threshold apart."""
    return (f"{value:,.0f}" if value == int(value) else f"{value:.6g}").replace("-", MINUS)


def _signed(value: float) -> str:
    value = round(value, 4) or 0.0
    return ("+" if value > 0 else "") + _figure(value)


def page(found: dict[str, Any], pictures: dict[int, str]) -> str:
    """The report as a page; `pictures` are data: URIs by row."""
    return template().render(r=found, pictures=pictures)


@cache
def template() -> jinja2.Template:
    """report.html, compiled: that takes longer than filling it in."""
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {
        "shown": shown,
        "count": _count,
        "percent": _percent,
        "figure": _figure,
        "exact": _exact,
        "size": size,
        "signed": _signed,
    }
    env.globals |= {"charts": charts}
    return env.from_string(resources.files("pipeline").joinpath("report.html").read_text("utf-8"))
