"""`pairsieve report`, also `python -m jobs.report`: (re)writes the report of a finished run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.entry import DONE, main


def report(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The run directory.")],
    store: Annotated[str | None, typer.Option(help="Its store. [default: DIR/store]")] = None,
    machine: Annotated[str | None, typer.Option(help="Machine file. [default: this machine]")] = None,
) -> int:
    """Write DIR/report/index.html and report.json, and their lines of DIR/checksums.sha256."""
    from pipeline.machine import load_machine
    from pipeline.report import replace_report
    from pipeline.storage import Root, redacted

    here = load_machine(machine)
    where = Root(directory, here.storage_options)
    replace_report(where, Root(store or f"{where.url}/store", here.storage_options), here)
    print(f"report: {redacted(where.url)}/report/index.html")
    return DONE


if __name__ == "__main__":
    sys.exit(main([report]))
