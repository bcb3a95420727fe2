"""`pairsieve sample`, also `python -m jobs.sample`: writes a small pool to try things on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.entry import DONE, main


def sample(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    seed: Annotated[int, typer.Option(help="Of the planted faults.")] = 0,
) -> int:
    """Write a small sample pool in img2dataset's layout, with planted faults."""
    from pipeline.sample import write_sample

    summary = write_sample(directory, seed)
    print(f"{summary.samples:,} samples in {summary.shards} shards of {directory}")
    for title, counts in (("source", summary.sources), ("planted", summary.planted)):
        for name, count in sorted(counts.items()):
            print(f"{title}: {name}: {count:,}")
    return DONE


if __name__ == "__main__":
    sys.exit(main([sample]))
