"""`pairsieve status`, also `python -m jobs.status`: what is done, running, failed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs.entry import DONE, main
from pipeline.costs import held_hours, size
from pipeline.errors import UserError
from pipeline.machine import load_machine
from pipeline.status import status as status_of
from pipeline.storage import Root, redacted


def status(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The run directory.")],
    store: Annotated[str | None, typer.Option(help="Its store. [default: DIR/store]")] = None,
    machine: Annotated[str | None, typer.Option(help="Machine file, for storage options.")] = None,
) -> int:
    """Show what is done, running and failed; during a run too, from any other process."""
    options = load_machine(machine).storage_options
    where = Root(directory, options)
    nothing = UserError(f"{redacted(directory)}: no run is here, and nothing in its store (is it elsewhere? --store)")
    try:
        found = status_of(where, Root(store or f"{where.url}/store", options))
    except NotADirectoryError:
        raise nothing from None
    if not (found.finished or found.stages or found.holders):
        raise nothing
    table = Table("stage", "datasets", "parts", "state", box=None, pad_edge=False)
    for stage in found.stages:
        more = f" ({stage.pending:,} parts so far)" if stage.state == "under way" else ""
        table.add_row(stage.stage, f"{stage.datasets:,}", f"{stage.parts:,}", stage.state + more)
    Console(width=100).print(table)
    for stage in found.stages:
        for unit, cause in stage.failed:
            print(f"failed: {stage.stage}: {unit}: {cause}")
    if found.times:
        stages = found.times["stages"]
        names, seconds = {stage["stage"] for stage in stages}, sum(stage["seconds"] for stage in stages)
        so_far = "" if found.finished else "so far: "
        print(f"{so_far}{len(names)} stages computed in {seconds:,.1f} s, over all starts")
        core_hours, gpu_hours = held_hours(stages)
        print(f"its workers held {core_hours:.3g} core-hours and {gpu_hours:.3g} GPU-hours")
    if found.times and found.finished:
        stored, written = sum(found.times["stored_bytes"].values()), found.times["written_bytes"]
        print(f"it keeps {size(stored)} in its store and {size(written)} beside it")
    for holder in found.holders:
        print(f"running: {holder}")
    if not found.holders:
        print("finished" if found.finished else "not finished, and nobody is at it")
    return DONE


if __name__ == "__main__":
    sys.exit(main([status]))
