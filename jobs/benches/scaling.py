"""The same work by one Ray worker and by two, of one thread each: embed, dedup, write; and what the machine allows.

Both crews are there all the time and have done the same before; one idles while the other is timed. Two virtual cores
may be one: the first row is matrix products in the same workers, which share nothing but the machine.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs.benches import copy
from jobs.benches.measure import Row, paired, seconds
from pipeline.curate import curate
from pipeline.embed import embed
from pipeline.encode import numerics, resolve
from pipeline.executor import Executor
from pipeline.formats.tar import END, member_header, padding
from pipeline.machine import Machine
from pipeline.pool import Pool, list_units
from pipeline.ray_executor import RayExecutor
from pipeline.read import Read
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.storage import Root

RUNS = 3
PRODUCTS = 160
SHARDS, WARM, IMAGES, IMAGE_PX = 14, 4, 100, 256
VECTOR_SHARDS, ROWS, DIMS = 64, 2000, 256
GROUP_UNITS = 4
"""Units of a group: a small pool in as many tasks as a large one."""


def measure(scratch: Path) -> Iterator[Row]:
    """Rates of rows; the ratio is two workers' rate over one's."""
    ours = RayExecutor(Machine(threads=1, workers=3), "local")
    crews = {workers: RayExecutor(Machine(threads=1, workers=workers)) for workers in (1, 2)}
    write_images(scratch / "images")
    write_vectors(scratch / "vectors")
    (scratch / "copy").mkdir()
    copy.write_pool(scratch / "copy" / "pool")
    rows: dict[str, tuple[int, Callable[[Path, Executor, int], float]]] = {
        "the machine itself, matrix products": (PRODUCTS, multiply_seconds),
        "embed, tiny": ((SHARDS - WARM) * IMAGES, embed_seconds),
        "dedup, but for k-means on its sample": (VECTOR_SHARDS * ROWS, dedup_seconds),
        "write": (copy.SHARDS * copy.SAMPLES, write_seconds),
    }
    try:
        for name, (amount, work) in rows.items():
            pairs = []
            for number in range(RUNS + 1):
                one, two = (amount / work(scratch, crew, 10 * number + workers) for workers, crew in crews.items())
                pairs.append((two, one))
            del pairs[0]
            yield paired(f"scaling: {name}, 2 Ray workers", "1 Ray worker", 1.8, "rows/s", pairs)
    finally:
        for executor in (*crews.values(), ours):
            executor.close()


@dataclass(frozen=True)
class Multiply:
    """A worker that multiplies matrices."""

    def open(self) -> Callable[[int], float]:
        matrix_NN = np.random.default_rng(0).random((1024, 1024), np.float32)
        return lambda times: float(sum((matrix_NN @ matrix_NN)[0, 0] for _ in range(times)))


def multiply_seconds(scratch: Path, executor: Executor, number: int) -> float:
    """Of work that needs nothing but processors."""
    return seconds(lambda: list(executor.each(Multiply(), [PRODUCTS // 16] * 16)))


def embed_seconds(scratch: Path, executor: Executor, number: int) -> float:
    """Of the embed stage with its model loaded; another name of the model makes it another stage."""
    machine = Machine(threads=1)
    run = Run(Root(str(scratch / "store")), Root(str(scratch / "run")), executor, machine)
    units = list_units(Pool("webdataset", str(scratch / "images")), {})
    samples = run.read(Read("webdataset"), units)["samples"]
    weights, here = resolve(None, "tiny"), run.numerics(numerics)
    stage = embed(f"tiny-{number}", weights, here, "webdataset", False, ())
    run.map(stage, replace(samples, parts=samples.parts[:WARM]), units=units[:WARM])
    run.map(stage, samples, units=units)
    return float(run.times[-1]["seconds"])


def dedup_seconds(scratch: Path, executor: Executor, number: int) -> float:
    """Of what the dedup step does for each group and cluster; another seed has other clusters."""
    recipe = {
        "pool": {"format": "datacomp", "path": str(scratch / "vectors")},
        "models": {"own": {"image": "img"}},
        "select": [{"dedup": {"space": "own", "epsilon": 0.05}}],
        "write": {"formats": ["subset"]},
        "seed": number,
    }
    run = Run(Root(str(scratch / "store")), Root(str(scratch / "run")), executor, Machine(threads=1))
    curate(run, recipe_of(recipe), GROUP_UNITS)
    stages = ("cluster_draw", "cluster_assign", "dedup_scatter", "dedup_within", "dedup_drop")
    return sum(float(stage["seconds"]) for stage in run.times if stage["stage"] in stages)


def write_seconds(scratch: Path, executor: Executor, number: int) -> float:
    """Of the write stage, as bench `copy` has it."""
    return copy.write_seconds(scratch / "copy", executor)


def write_images(folder: Path) -> None:
    """Shards of pictures of IMAGE_PX in img2dataset's layout."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for shard in range(SHARDS):
        with open(folder / f"{shard:05d}.tar", "wb") as tar:
            for row in range(IMAGES):
                key, jpeg = f"{shard:05d}{row:04d}", io.BytesIO()
                pixels = Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8))
                pixels.resize((IMAGE_PX, IMAGE_PX)).save(jpeg, "JPEG")
                members = {"jpg": jpeg.getvalue(), "txt": f"picture {row} of shard {shard}".encode()}
                members["json"] = json.dumps({"key": key}).encode()
                for suffix, data in members.items():
                    tar.write(member_header(f"{key}.{suffix}", len(data)) + data + padding(len(data)))
            tar.write(END)


def write_vectors(folder: Path) -> None:
    """DataComp's layout, with random vectors."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for shard in range(VECTOR_SHARDS):
        uids = [random.bytes(16).hex() for _ in range(ROWS)]
        pq.write_table(pa.table({"uid": uids, "text": uids}), folder / f"{shard:08d}.parquet")
        np.savez(folder / f"{shard:08d}.npz", img=random.normal(size=(ROWS, DIMS)).astype(np.float16))
