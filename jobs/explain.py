"""`pairsieve explain`, also `python -m jobs.explain`: what every step found about one sample."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from jobs.entry import DONE, main
from pipeline.explain import explain as explained
from pipeline.machine import load_machine
from pipeline.record import shown
from pipeline.storage import Root


def explain(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The run directory.")],
    uid: Annotated[str, typer.Argument(metavar="UID", help="32 hex digits, as in decisions/.")],
    store: Annotated[str | None, typer.Option(help="Its store, for captions. [default: DIR/store]")] = None,
    machine: Annotated[str | None, typer.Option(help="Machine file, for storage options.")] = None,
) -> int:
    """Say what every step found about one sample, and about each of its equals."""
    options = load_machine(machine).storage_options
    where = Root(directory, options)
    for row in explained(where, Root(store or f"{where.url}/store", options), uid):
        print(shown(f"{row.uid} {row.shard} {row.key}: {'kept' if row.kept else 'dropped'}"))
        if row.caption is not None:
            print(f"  caption: {row.caption!r}")
        for name, value in row.scores.items():
            print(shown(f"  {name}: {_text(value)}"))
        for verdict in row.verdicts:
            reason = f" {verdict.reason}" if verdict.reason else ""
            facts = ", ".join(f"{name} {_text(value)}" for name, value in verdict.facts.items())
            print(shown(f"  {verdict.step}: {verdict.outcome}{reason}{': ' if facts else ''}{facts}"))
    return DONE


def _text(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main([explain]))
