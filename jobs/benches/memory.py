"""Peak memory of a Ray worker that does a whole run, for growing shards and for growing pools; and of what takes most.

Shards grow in images and in bytes and are embedded; pools grow in shards, far enough for several groups of GROUP_UNITS.
What takes most is a group's survivors on their way to their clusters, and the sample that k-means is trained on: each
is measured in a process of its own that finds all before it done.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs.benches.measure import RUNS, Row, alone, paired, peak_rss_bytes, within
from pipeline.cluster import Clustering, Draw, Train
from pipeline.curate import curate
from pipeline.executor import Executor, Serial
from pipeline.formats.tar import END, member_header, padding
from pipeline.machine import Machine
from pipeline.parts import given
from pipeline.pool import Pool, list_units
from pipeline.precomputed import Precomputed
from pipeline.ray_executor import RayExecutor
from pipeline.read import Read
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.schema import GROUP_UNITS
from pipeline.select.dedup import CLUSTER_ROWS, TASKS, Dedup
from pipeline.state import Begin
from pipeline.step import Step
from pipeline.storage import Root

BUDGET_MB = 2000
"""Of a CPU worker with a small model, as the README states it."""

SAMPLES, IMAGE_BYTES = 300, 40_000
SIZES = (1, 4, 10)
SHARDS, ROWS, DIMS = GROUP_UNITS, 50, 64
MACHINE = Machine(threads=1, workers=1, image_batch=32)
VECTOR_ROWS, VECTOR_DIMS, ITERATIONS = 10_000, 512, 20
TRAINED, TRAINED_GROUP = 100, 16
"""Clusters that k-means is trained for, on a sample from groups of so many units."""

LONG_RUNS = 3
"""Of what takes a minute or two."""


def measure(scratch: Path) -> Iterator[Row]:
    """Peak memory against the budget, and that of ten times as many shards against the first."""
    for size in SIZES:
        pool = scratch / f"tars-{size}"
        write_tar(pool, size * SAMPLES)
        title = f"memory: a worker that embeds, selects and writes a shard of {size * SAMPLES * IMAGE_BYTES / 1e6:g} MB"
        runs = [scratch / f"tars-{size}-run-{run}" for run in range(RUNS)]
        yield within(title, BUDGET_MB, "MB", [worker_mb(tar_recipe(pool), run) for run in runs])
    pools = {size: scratch / f"metadata-{size}" for size in (1, 10)}
    for size, pool in pools.items():
        write_metadata(pool, size * SHARDS)
    peaks = []
    for run in range(LONG_RUNS):
        one, ten = (worker_mb(metadata_recipe(pool), Path(f"{pool}-run-{run}")) for pool in pools.values())
        peaks.append((one, ten))
    title = f"memory: a worker that selects from {SHARDS:,} shards"
    yield paired(title, f"from {10 * SHARDS:,}", 0.9, "MB", peaks)
    yield from stages(scratch)


def stages(scratch: Path) -> Iterator[Row]:
    """Peak memory of the two stages."""
    write_vectors(scratch / "vectors", GROUP_UNITS, VECTOR_ROWS, VECTOR_DIMS)
    executor = RayExecutor(Machine(threads=1, workers=2), "local")
    try:
        scatter(scratch, executor, 0)
        trained = train(scratch, executor, 0)
    finally:
        executor.close()
    survivors = GROUP_UNITS * VECTOR_ROWS
    for title, work in (
        (f"scatters {survivors:,} x {VECTOR_DIMS} for dedup", scatter),
        (f"trains k-means on {trained:,} x {VECTOR_DIMS}", train),
    ):
        peaks_mb = [alone(work, scratch, Serial(), 1 + run)[1] / 1e6 for run in range(LONG_RUNS)]
        yield within(f"memory: a worker that {title}", BUDGET_MB, "MB", peaks_mb)


def scatter(scratch: Path, executor: Executor, number: int) -> None:
    """Send the survivors of a group to the buckets of their clusters, which are larger for each number."""
    step = vectors_step(scratch, executor, GROUP_UNITS)
    found = Clustering(step.survivors // CLUSTER_ROWS, 1, 1, 0).fit(step, "own")
    Dedup("own", 0.05).scatter(step, found, step.survivors // TASKS * (1 + number))


def train(scratch: Path, executor: Executor, number: int) -> int:
    """Train centroids on a sample as dedup draws it, from each number's seed; rows of the sample."""
    step = vectors_step(scratch, executor, TRAINED_GROUP)
    evidence, side = step.space("own")
    fraction = TRAINED * Dedup("own", 0.05).sample_per_cluster / step.survivors
    drawn = step.run.map(Draw(side, 0, step.name, fraction), evidence, step.samples, step.state)["drawn"]
    centroids = step.run.map(Train("vector", TRAINED, ITERATIONS, number), drawn.grouped(len(drawn)))["centroids"]
    return int(next(centroids.facts())["sample"])


def vectors_step(scratch: Path, executor: Executor, group_units: int) -> Step:
    """The first step of a run over scratch/vectors."""
    run = Run(Root(str(scratch / "store")), Root(str(scratch)), executor, MACHINE)
    units = list_units(Pool("datacomp", str(scratch / "vectors")), {})
    read = run.read(Read("datacomp"), units)
    made = run.map(Precomputed("img", None, "datacomp", VECTOR_DIMS), read["samples"], units=units)
    found = (read["samples"], read["columns"], made["vectors"], made["scores"])
    samples, columns, vectors, scores = (each.grouped(group_units) for each in found)
    state = run.map(Begin(), samples, scores)["state"]
    places = given([{"first_unit": i * group_units, "group": i} for i in range(len(samples))])
    seen = {"own": vectors}, {"own": scores}
    return Step(1, "01-dedup", 0, run, samples, columns, *seen, state, places, samples.num_rows)


@dataclass(frozen=True)
class Peak:
    """Asks a worker's process for the most memory that it has held."""

    def open(self) -> Callable[[int], int]:
        return lambda _: peak_rss_bytes()


def worker_mb(recipe: dict[str, Any], directory: Path) -> float:
    """Peak memory of the one worker of a run."""
    root = str(directory)
    executor = RayExecutor(MACHINE, "local")
    try:
        curate(Run(Root(f"{root}/store"), Root(root), executor, MACHINE), recipe_of(recipe))
        ((_, peak),) = executor.each(Peak(), [0])
        assert isinstance(peak, int), peak
        return peak / 1e6
    finally:
        executor.close()


def tar_recipe(pool: Path) -> dict[str, Any]:
    """Every kind of step on tiny's vectors."""
    steps = [
        {"dedup": {"space": "small", "epsilon": 0.01}},
        {"cut": {"score": "small", "keep": 0.9}},
        {"density": {"space": "small", "clusters": 10, "keep": 0.6}},
    ]
    return {
        "pool": {"format": "webdataset", "path": str(pool)},
        "models": {"small": {"weights": "tiny"}},
        "select": steps,
    }


def metadata_recipe(pool: Path) -> dict[str, Any]:
    """The same on the pool's own vectors; the sample that the clusters are learnt from is the same for all pools."""
    steps = [
        {"dedup": {"space": "own", "epsilon": 0.01, "sample_per_cluster": 300}},
        {"cut": {"score": "own", "keep": 0.9}},
        {"density": {"space": "own", "clusters": 10, "keep": 0.6, "sample_per_cluster": 300}},
    ]
    return {
        "pool": {"format": "datacomp", "path": str(pool)},
        "models": {"own": {"image": "img", "text": "txt"}},
        "select": steps,
    }


def write_tar(folder: Path, samples: int) -> None:
    """One shard of small pictures that are heavy: noise follows each JPEG's end."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with open(folder / "00000.tar", "wb") as tar:
        for row in range(samples):
            jpeg = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)).save(jpeg, "JPEG")
            members = {"jpg": jpeg.getvalue() + random.bytes(IMAGE_BYTES), "txt": f"picture number {row}".encode()}
            members["json"] = json.dumps({"key": f"{row:09d}", "url": f"https://example.org/{row}"}).encode()
            for suffix, data in members.items():
                tar.write(member_header(f"{row:09d}.{suffix}", len(data)) + data + padding(len(data)))
        tar.write(END)


def write_metadata(folder: Path, shards: int) -> None:
    """DataComp's layout, with random vectors."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for shard in range(shards):
        uids = [random.bytes(16).hex() for _ in range(ROWS)]
        table = {"uid": uids, "text": [f"picture {uid}" for uid in uids]}
        pq.write_table(pa.table(table), folder / f"{shard:08d}.parquet")
        img, txt = random.normal(size=(2, ROWS, DIMS)).astype(np.float16)
        np.savez(folder / f"{shard:08d}.npz", img=img, txt=txt)


def write_vectors(folder: Path, shards: int, rows: int, dims: int) -> None:
    """Shards in DataComp's layout, with random vectors."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for shard in range(shards):
        uids = [random.bytes(16).hex() for _ in range(rows)]
        pq.write_table(pa.table({"uid": uids, "text": uids}), folder / f"{shard:08d}.parquet")
        img = random.standard_normal((rows, dims), np.float32).astype(np.float16)
        np.savez(folder / f"{shard:08d}.npz", img=img)
