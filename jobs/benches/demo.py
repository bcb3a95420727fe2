"""The whole demo recipe with a warm cache, against its embedding and its copying alone: what all else costs.

Both are stages of the same run; each run starts in an empty directory, on Ray workers that are there already.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jobs.benches.measure import Row, paired, seconds
from pipeline.curate import curate
from pipeline.machine import load_machine
from pipeline.ray_executor import RayExecutor
from pipeline.recipe import load_recipe
from pipeline.run import Run
from pipeline.sample import write_sample
from pipeline.storage import Root

RUNS = 3
ALONE = ("embed", "write_tar")


def measure(scratch: Path) -> Iterator[Row]:
    """Rates of listed samples."""
    write_sample(scratch / "pool", 0)
    recipe = load_recipe(Path("conf/recipes/demo.yaml"), [f"pool.path={scratch / 'pool'}"])
    machine = load_machine("conf/machines/laptop.yaml")
    executor = RayExecutor(machine, "local")

    def whole(number: int) -> tuple[float, float]:
        root = str(scratch / str(number))
        run = Run(Root(f"{root}/store"), Root(root), executor, machine)
        taken = seconds(lambda: curate(run, recipe))
        samples = sum(stage["rows"] for stage in run.times if stage["stage"] == "begin")
        alone = sum(stage["seconds"] for stage in run.times if stage["stage"] in ALONE)
        return samples / taken, samples / alone

    try:
        whole(0)
        pairs = [whole(1 + number) for number in range(RUNS)]
    finally:
        executor.close()
    name = "demo: the whole recipe, warm, one Ray worker for each core"
    yield paired(name, "its embedding and its copying alone", 0.6, "rows/s", pairs)
