"""`pairsieve plan`, also `python -m jobs.plan`: what a run would take, before it is started."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs.entry import DONE, main
from pipeline.costs import money, size
from pipeline.machine import Prices, load_machine
from pipeline.plan import Plan, predict
from pipeline.recipe import load_recipe


def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    machine: Annotated[str | None, typer.Option(help="Machine file. [default: this machine]")] = None,
    set: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Change a key of the recipe.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="As if the pool had so many samples.")] = None,
    bytes: Annotated[int | None, typer.Option(min=1, help="As if the pool had so many bytes.")] = None,
) -> int:
    """Look at a few shards and predict hours, bytes and money of a run."""
    wanted, here = load_recipe(recipe, set or []), load_machine(machine)
    # torch takes seconds to import: only where the recipe is right.
    from pipeline.probe import probe

    found = probe(wanted, here, rows, bytes)
    planned = predict(wanted, found.facts, found.speeds, found.capacity)
    show(planned)
    if here.prices:
        show_money(planned, here.prices)
    larger = ["the larger pool: shards, captions and damage as in this one"] if rows or bytes else []
    for note in (*found.notes, *larger, *assumed(planned)):
        print(f"- {note}")
    return DONE


def show(planned: Plan) -> None:
    """Print the work, and what is read and stored."""
    table = Table("work", "of cores", "of GPUs", "from start to end", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in planned.lines:
        table.add_row(line.name, figure(line.core_hours), figure(line.gpu_hours), figure(line.hours))
    table.add_row("total", figure(planned.core_hours), figure(planned.gpu_hours), figure(planned.hours))
    at_most = "at most " if planned.unpredictable else ""
    print(f"{planned.rows:,} samples, {planned.embedded:,} embedded, {at_most}{planned.kept:,} kept")
    Console(width=100).print(table)
    stored = ", ".join(f"{kind} {size(amount)}" for kind, amount in planned.stored.items())
    print(f"read {size(planned.read_bytes)}; stored {size(planned.stored_bytes)}: {stored}")
    print(f"requests to storage: about {planned.requests:,.0f}")


def show_money(planned: Plan, prices: Prices) -> None:
    """Print what it would cost."""
    cost = money(
        prices,
        core_hours=planned.core_hours,
        gpu_hours=planned.gpu_hours,
        stored_bytes=planned.stored_bytes,
        egress_bytes=planned.read_bytes,
        requests=planned.requests,
    )
    items = ", ".join(f"{name} {amount:,.2f}" for name, amount in cost.items())
    print(f"{prices.currency} {sum(cost.values()):,.2f}: {items}")


def assumed(planned: Plan) -> list[str]:
    """What the figures say beside themselves, and what they take for granted."""
    found = [f"embed: {planned.bound}"] if planned.bound else []
    for line in planned.lines:
        if line.serial_hours:
            alone = f"{figure(line.serial_hours)} in which one worker trains k-means, in {size(line.serial_bytes)}"
            found.append(f"{line.name}: {alone} of memory")
    if planned.unpredictable:
        found.append(f"what {', '.join(planned.unpredictable)} will drop is not known: counted as nothing")
    return [*found, "cores are as fast as here, all workers busy to the end; idle machines are not counted"]


def figure(hours: float) -> str:
    """Three digits, and the unit that suits."""
    for amount, unit in ((hours, "h"), (60 * hours, "min")):
        if amount >= 1:
            return f"{amount:,.0f} {unit}" if amount >= 100 else f"{amount:.3g} {unit}"
    return f"{3600 * hours:.3g} s"


if __name__ == "__main__":
    sys.exit(main([plan]))
