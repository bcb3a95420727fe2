"""Peak memory of a Ray worker that does a whole run, for growing shards and for growing pools.

Shards grow in images and in bytes and are embedded; pools grow in shards, far enough for several groups of GROUP_UNITS.
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

from jobs.benches.measure import Row, paired, peak_rss_bytes, within
from pipeline.curate import curate
from pipeline.formats.tar import END, member_header, padding
from pipeline.machine import Machine
from pipeline.ray_executor import RayExecutor
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.schema import GROUP_UNITS
from pipeline.storage import Root

BUDGET_MB = 2000
"""Of a CPU worker with a small model, as the README states it."""

SAMPLES, IMAGE_BYTES = 300, 40_000
SIZES = (1, 4, 10)
SHARDS, ROWS, DIMS = GROUP_UNITS, 50, 64
MACHINE = Machine(threads=1, workers=1, image_batch=32)


def measure(scratch: Path) -> Iterator[Row]:
    """Peak memory against the budget, and that of ten times as many shards against the first."""
    for size in SIZES:
        pool = scratch / f"tars-{size}"
        write_tar(pool, size * SAMPLES)
        title = f"memory: a worker that embeds, selects and writes a shard of {size * SAMPLES * IMAGE_BYTES / 1e6:g} MB"
        yield within(title, BUDGET_MB, "MB", [worker_mb(tar_recipe(pool), scratch / f"tars-{size}-run")])
    peaks = []
    for size in (1, 10):
        pool = scratch / f"metadata-{size}"
        write_metadata(pool, size * SHARDS)
        peaks.append(worker_mb(metadata_recipe(pool), scratch / f"metadata-{size}-run"))
    title = f"memory: a worker that selects from {SHARDS:,} shards"
    yield paired(title, f"from {10 * SHARDS:,}", 0.9, "MB", [(peaks[0], peaks[1])])


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
