"""`pairsieve run`, also `python -m jobs.curate`: a recipe in, a run directory out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from jobs.entry import DONE, TOO_DAMAGED, main
from jobs.progress import progress
from pipeline.curate import Curated, curate
from pipeline.errors import UserError
from pipeline.executor import Executor, Serial
from pipeline.lease import leased
from pipeline.machine import Machine, load_machine
from pipeline.recipe import load_recipe, resolved
from pipeline.run import FAILED, LOOSE, MANIFESTS, SEGMENTS, Run
from pipeline.storage import Root, redacted


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    run: Annotated[str | None, typer.Option(help="Run directory: a path or URL. [default: runs/RECIPE]")] = None,
    store: Annotated[
        str | None, typer.Option(help="Where datasets are kept, to share them. [default: RUN/store]")
    ] = None,
    set: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Change a key of the recipe.")] = None,
    machine: Annotated[str | None, typer.Option(help="Machine file. [default: this machine]")] = None,
    executor: Annotated[
        Literal["serial", "ray"], typer.Option(help="Ray: the cluster at RAY_ADDRESS, else a local one.")
    ] = "ray",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Go on with a run that is there and not finished; start none.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe with every default, and stop.")] = False,
) -> int:
    """Curate a pool: read, embed, select, decide, write, report."""
    wanted = load_recipe(recipe, set or [])
    if dry_run:
        print(resolved(wanted), end="")
        return DONE
    where = (run or f"runs/{recipe.stem}").rstrip("/")
    here = load_machine(machine)
    directory, kept_in = Root(where, here.storage_options), Root(store or f"{where}/store", here.storage_options)
    if retry_failed:
        check_unfinished(directory, kept_in)
    make_folder(directory, "--run")
    make_folder(kept_in, "--store")
    workers = executor_of(executor, here)
    try:
        with leased(kept_in, directory):
            curated = curate(Run(kept_in, directory, workers, here, progress()), wanted)
    finally:
        workers.close()
    show(curated, where)
    return TOO_DAMAGED if curated.too_damaged else DONE


def executor_of(name: str, machine: Machine) -> Executor:
    """The executor that a name stands for; ray is imported only when asked for."""
    if name == "serial":
        return Serial()
    from pipeline.ray_executor import RayExecutor

    return RayExecutor(machine)


def make_folder(root: Root, option: str) -> None:
    """Make the folder that an option names, where it is on this machine's disk: an object store has none.

    Raises:
        UserError: it is a file, or lies below one.
        OSError: the disk refuses it.
    """
    folder = root.local("")
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{option} {root.url}: a file is in its place") from None


def check_unfinished(directory: Root, store: Root) -> None:
    """See that there is something to go on with.

    Raises:
        UserError: the run is finished, or nothing of it is there.
    """
    if directory.bytes("checksums.sha256") is not None:
        raise UserError(f"--retry-failed: {redacted(directory.url)} is finished, nothing failed")
    if not any(store.list(folder) for folder in (FAILED, MANIFESTS, SEGMENTS, LOOSE)):
        raise UserError(f"--retry-failed: {redacted(directory.url)} holds no unfinished run; leave the flag out")


def show(curated: Curated, where: str) -> None:
    """Print the funnel, the report's path, and whether the damage is over the limit."""
    table = Table("step", "in", "out", "kept", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for step, entered, left in curated.funnel:
        table.add_row(step, f"{entered:,}", f"{left:,}", f"{left / entered:.1%}" if entered else "-")
    console = Console(width=100)
    console.print(table)
    print(f"{curated.kept:,} of {curated.listed:,} samples kept")
    print(f"report: {redacted(where)}/report/index.html")
    if curated.unreadable or curated.damaged:
        found = f"{curated.unreadable:,} samples, {curated.damaged:,} of {curated.shards:,} shards"
        print(f"problems: {found}; see {redacted(where)}/problems")
    if curated.too_damaged:
        print("pairsieve: finished, but more input was damaged than the recipe's limits allow", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main([run]))
