"""`make bench`, also `python -m jobs.bench`: pairsieve beside a peer or a physical limit, in one run on the same data.

Out: a line for each row as it is measured, bench.json with all of them, and bench.svg. Rows that are there already of
benches that are not measured now stay. Never a test: it fails on nothing but errors, and says which targets were
missed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from jobs.benches.measure import Row
from jobs.benches.picture import picture
from jobs.entry import DONE, main
from pipeline.config import nearest
from pipeline.errors import UserError

BENCHES = (
    *("decode", "embed", "kmeans", "assign", "duplicates", "quota", "cut"),
    *("copy", "reshard", "driver", "demo", "memory", "scaling"),
)
"""Modules of jobs/benches, in the order in which they run; each has `measure(scratch: Path) -> Iterator[Row]`."""


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Which to measure; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.svg.")] = Path("."),
) -> int:
    """Measure against peers and limits; minutes on an otherwise idle machine."""
    for name in names or ():
        if name not in BENCHES:
            raise UserError(f"bench: {name!r} is no bench{nearest(name, list(BENCHES))}")
    out.mkdir(parents=True, exist_ok=True)
    found = saved(out)
    for name in names or BENCHES:
        measure: Callable[[Path], Iterator[Row]] = import_module(f"jobs.benches.{name}").measure
        rows: list[Row] = []
        with tempfile.TemporaryDirectory(prefix="pairsieve-bench-") as scratch:
            for row in measure(Path(scratch)):
                print(line(row), flush=True)
                rows.append(row)
        found[name] = rows
        save(out, found)  # after each, for it may be stopped before the last
    return DONE


def saved(out: Path) -> dict[str, list[Row]]:
    """The rows of bench.json by bench; none where there is no such file, or one that does not tell their benches."""
    path = out / "bench.json"
    found: dict[str, list[Row]] = {}
    for row in json.loads(path.read_text()) if path.exists() else ():
        if name := row.pop("bench", None):
            found.setdefault(name, []).append(Row(**row))
    return found


def save(out: Path, found: Mapping[str, list[Row]]) -> None:
    """Write bench.json and bench.svg: rows in the order of BENCHES; of a bench that there is no longer, none."""
    rows = [(name, row) for name in BENCHES for row in found.get(name, ())]
    text = json.dumps([{"bench": name, **asdict(row)} for name, row in rows], indent=1)
    (out / "bench.json").write_text(text + "\n")
    (out / "bench.svg").write_text(picture([row for _, row in rows]))


def line(row: Row) -> str:
    """One row as text."""
    state = "ok  " if row.ratio >= row.target else "MISS"
    spread = f"{row.low:.2f}..{row.high:.2f} of {row.runs}"
    return (
        f"{state} {row.ratio:6.2f} (target {row.target:g}, {spread})  {row.name} | {row.against}: "
        f"{row.ours:.4g} to {row.theirs:.4g} {row.unit}"
    )


if __name__ == "__main__":
    sys.exit(main([bench]))
