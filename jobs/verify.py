"""`pairsieve verify`, also `python -m jobs.verify`: proves that a run directory is what its pool and decisions say."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.entry import DONE, FAILED, main

SHOWN = 200
"""Differences that are printed one by one."""


def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The run directory.")],
    store: Annotated[str | None, typer.Option(help="Its store. [default: DIR/store]")] = None,
    machine: Annotated[str | None, typer.Option(help="Machine file. [default: this machine]")] = None,
) -> int:
    """Compare outputs with pool, decisions, checksums and store; exit 1 on any difference."""
    from pipeline.machine import load_machine
    from pipeline.record import shown
    from pipeline.storage import Root
    from pipeline.verify import verify as differences

    here = load_machine(machine)
    where = Root(directory, here.storage_options)
    count = 0
    for difference in differences(where, Root(store or f"{where.url}/store", here.storage_options), here):
        count += 1
        if count <= SHOWN:
            print(shown(difference))
    if count > SHOWN:
        print(f"and {count - SHOWN} more")
    print(f"{count} differences" if count else "no difference")
    return FAILED if count else DONE


if __name__ == "__main__":
    sys.exit(main([verify]))
