"""Trains a filter network. In: a training recipe and a folder. Out: model.safetensors and its card in that folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobs import entry
from pipeline.machine import load_machine

if TYPE_CHECKING:
    from pipeline import train

LINES = 20
"""Progress lines of a whole training where there is no terminal."""


def train_filter(
    recipe: Annotated[Path, typer.Argument(help="Training recipe (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Folder of the model; default: runs/NAME of the recipe.")] = None,
    machine: Annotated[str | None, typer.Option(help="Machine file (YAML).")] = None,
) -> int:
    """Train a filter network, or go on where the same command was stopped."""
    # torch takes seconds to import: only once a training is really asked for.
    from pipeline.train import load_train_recipe, train

    asked = load_train_recipe(recipe)
    with _shown() as show:
        trained = train(asked, out or Path("runs") / recipe.stem, load_machine(machine), show)
    print(trained.card.read_text("utf-8"))
    print(f"weights: {trained.weights}")
    return entry.DONE


@contextmanager
def _shown() -> Iterator[train.Progress]:
    """A progress bar on a terminal, some plain lines elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=None)

        def show(done: int, steps: int, loss: float) -> None:
            bar.update(task, completed=done, total=steps, description=f"train, loss {loss:.3f}")
            if not console.is_terminal and (done == steps or done % max(1, steps // LINES) == 0):
                console.print(f"train: step {done} of {steps}, loss {loss:.3f}")

        yield show


def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0 when the model is written, 2 when the recipe, its data or the machine file is wrong."""
    return entry.main([train_filter], argv)


if __name__ == "__main__":
    sys.exit(main())
