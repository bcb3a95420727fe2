"""The whole demo recipe with a warm cache, against its embedding and its copying alone: what all else costs.

Each run starts in an empty directory, on Ray workers that are there already, and has its limit measured beside it: that
of the embed bench, on every core at once as the workers are, for as many of the pool's pairs as are embedded; and that
of the copy bench, `cp` of what the run kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow.compute as pc

from jobs.benches.copy import cp_seconds
from jobs.benches.cores import Pairs, on_every_core
from jobs.benches.embed import passes
from jobs.benches.measure import RUNS, Row, paired, seconds
from pipeline.curate import Curated, curate
from pipeline.formats import webdataset
from pipeline.machine import keep_freed_memory, load_machine
from pipeline.pool import Pool, list_units
from pipeline.ray_executor import RayExecutor
from pipeline.recipe import load_recipe
from pipeline.run import Run
from pipeline.sample import write_sample
from pipeline.storage import Root, UnitFiles

MACHINE = "conf/machines/laptop.yaml"
WARM_PAIRS = 64


def measure(scratch: Path) -> Iterator[Row]:
    """Rates of listed samples."""
    pool = scratch / "pool"
    write_sample(pool, 0)
    recipe = load_recipe(Path("conf/recipes/demo.yaml"), [f"pool.path={pool}"])
    machine = load_machine(MACHINE)
    executor = RayExecutor(machine, "local")

    def whole(number: int) -> tuple[float, float]:
        root = scratch / str(number)
        run = Run(Root(f"{root}/store"), Root(str(root)), executor, machine)
        found: list[Curated] = []
        taken_s = seconds(lambda: found.append(curate(run, recipe)))
        embedded = next(left for step, _, left in found[0].funnel if step == "01-filter")
        pairs = on_every_core(partial(embed_rate, pool))
        limit_s = embedded / pairs[0][0] + cp_seconds(root / "filtered", root / "cp")
        return found[0].listed / taken_s, found[0].listed / limit_s

    try:
        whole(0)
        pairs = [whole(1 + number) for number in range(RUNS)]
    finally:
        executor.close()
    name = "demo: the whole recipe, warm, one Ray worker for each core"
    yield paired(name, "decode, image and text forward, and cp of the kept, each alone", 0.6, "rows/s", pairs)


def embed_rate(pool: Path, number: int, cores: int) -> Pairs:
    """Pairs per second of one core that decodes its share of the pool, and passes it forward, each alone; twice."""
    keep_freed_memory()  # as a worker does
    machine = load_machine(MACHINE)
    images: list[bytes] = []
    captions: list[str] = []
    for unit in list_units(Pool("webdataset", str(pool)), {})[number::cores]:
        with UnitFiles(unit, machine) as files:
            samples = webdataset.read(files).samples
            usable = samples.filter(pc.is_null(samples["problem"]))
            images += [image for image in webdataset.images(files, usable) if image]
            captions += usable["caption"].to_pylist()
    model = {"weights": "tiny"}
    passes(model, machine, images[:WARM_PAIRS], captions[:WARM_PAIRS])()
    rate = len(images) / passes(model, machine, images, captions)()
    return [(rate, rate)]
