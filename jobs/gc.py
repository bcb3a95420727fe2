"""`pairsieve gc`, also `python -m jobs.gc`: what no kept run refers to in a store."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from jobs.entry import DONE, main
from pipeline.errors import UserError
from pipeline.gc import kept_runs, referred, unreferred
from pipeline.lease import holders
from pipeline.machine import load_machine
from pipeline.run import MANIFESTS
from pipeline.storage import Root, redacted


def gc(
    url: Annotated[str, typer.Argument(metavar="URL", help="The store, such as DIR/store. No run may be using it.")],
    keep: Annotated[list[str] | None, typer.Option(metavar="DIR", help="A run directory to keep; repeatable.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is listed.")] = False,
    machine: Annotated[str | None, typer.Option(help="Machine file, for storage options.")] = None,
) -> int:
    """List what no kept run refers to in a store; a store inside a finished run keeps that run's parts."""
    options = load_machine(machine).storage_options
    store = Root(url, options)
    if not store.list(MANIFESTS):
        raise UserError(f"{redacted(url)}: this is no store, it has no {MANIFESTS}/")
    runs = kept_runs(store, [Root(where, options) for where in keep or []], options)
    if delete and not runs:
        raise UserError("--delete needs at least one --keep DIR: nothing in this store would be kept")
    writers = holders(store)
    if delete and writers:
        raise UserError(
            f"--delete: a run may be using this store: {'; '.join(writers)}; delete its lease if it is dead"
        )
    found = list(unreferred(store, referred(store, runs), time.time()))
    for file in found:
        print(file.path)
        if delete:
            store.delete(file.path)
    verb = "deleted" if delete else "not referred to; --delete deletes them"
    print(f"{len(found):,} files, {sum(file.bytes for file in found):,} bytes {verb}")
    return DONE


if __name__ == "__main__":
    sys.exit(main([gc]))
