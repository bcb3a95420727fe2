"""The same work by one Ray worker and by two, of one thread each: embed, dedup, write; and what the machine allows.

Both crews are there all the time and have done the same before; one idles while the other is timed, and each goes first
in every other pair. Two virtual cores may be one, and others may use it: so each kind of work stands beside what needs
nothing but the machine, measured in the same workers in turn with it. That is matrix products; for `write`, plain
copies of the pool's files in its folder.

What is timed is a stage that goes on for long: 12 to 40 tasks for each worker, most of a tenth of a second to one,
models loaded, code imported, the pool listed and read. Left out, since no worker shares it: the start of Ray and of the
workers, k-means on its sample, the report. All of `dedup` and `write` lies in memory (/dev/shm, where there is one): a
disk would be what is measured.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.benches import copy
from jobs.benches.measure import RUNS, Row, paired, seconds
from jobs.benches.memory import write_vectors
from pipeline.curate import curate
from pipeline.embed import embed
from pipeline.encode import numerics, resolve
from pipeline.executor import Executor, Failure, Worker
from pipeline.formats.tar import END, member_header, padding
from pipeline.machine import Machine
from pipeline.pool import Pool, list_units
from pipeline.ray_executor import RayExecutor
from pipeline.read import Read
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.storage import Root

PRODUCTS, COPIES, WRITES = 160, 3, 4
"""Products, copies of the pool and writes of what it keeps that are timed as one."""

SHARDS, WARM, IMAGES, IMAGE_PX = 28, 4, 200, 256
VECTOR_SHARDS, ROWS, DIMS = 128, 10_000, 512
GROUP_UNITS = 4
"""Units of a group: a small pool in as many tasks as a large one."""

SAMPLE = 1000
"""Rows per cluster that k-means sees: it is not timed."""


Work = Callable[[Path, Executor, int], float]
"""Seconds of work in a folder; the number has not been used there before."""


def measure(scratch: Path) -> Iterator[Row]:
    """Rates of rows; the ratio is two workers' rate over one's."""
    ours = RayExecutor(Machine(threads=1, workers=3), "local")
    crews = [RayExecutor(Machine(threads=1, workers=workers)) for workers in (1, 2)]
    shm = Path("/dev/shm")
    memory = shm if shm.is_dir() else scratch
    try:
        write_images(scratch / "images")
        yield from beside(crews, scratch, "embed, tiny", (SHARDS - WARM) * IMAGES, embed_seconds)
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            write_vectors(Path(folder) / "vectors", VECTOR_SHARDS, ROWS, DIMS)
            yield from beside(crews, Path(folder), "dedup, but for k-means", VECTOR_SHARDS * ROWS, dedup_seconds)
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            copy.write_pool(Path(folder) / "pool")
            samples = copy.SHARDS * copy.SAMPLES
            yield from beside(crews, Path(folder), "write", WRITES * samples, write_seconds, COPIES * samples)
    finally:
        for executor in (*crews, ours):
            executor.close()


def beside(crews: Sequence[Executor], folder: Path, name: str, rows: int, work: Work, copied: int = 0) -> Iterator[Row]:
    """Work, and the machine itself at that time.

    Args:
        crews: of one worker and of two.
        folder: where the work finds its input.
        name: of the work.
        rows: that it does.
        work: what is done.
        copied: rows of the pool's files, copied so often; 0: the machine is measured by matrix products.
    """
    kind, unit = ("plain copies", "rows/s") if copied else ("matrix products", "products/s")
    amount, bare = (copied, copy_seconds) if copied else (PRODUCTS, multiply_seconds)
    found: list[list[tuple[float, float]]] = [[], []]
    for run in range(RUNS + 1):
        for pairs, done, seconds_of in zip(found, (rows, amount), (work, bare), strict=True):
            first_and_last = (0, 1) if run % 2 else (1, 0)
            rates = {at: done / seconds_of(folder, crews[at], 2 * run + at) for at in first_and_last}
            if run:  # the first one loads what is needed
                pairs.append((rates[1], rates[0]))
    yield paired(f"scaling: {name}, 2 Ray workers", "1 Ray worker", 1.8, "rows/s", found[0])
    yield paired(f"scaling: the machine beside it, {kind}, 2 Ray workers", "1 Ray worker", 1.8, unit, found[1])


@dataclass(frozen=True)
class Multiply:
    """A worker that multiplies matrices."""

    def open(self) -> Callable[[int], float]:
        matrix_NN = np.random.default_rng(0).random((1024, 1024), np.float32)
        return lambda times: float(sum((matrix_NN @ matrix_NN)[0, 0] for _ in range(times)))


def multiply_seconds(scratch: Path, executor: Executor, number: int) -> float:
    """Of work that needs nothing but processors."""
    return seconds(lambda: done_by(executor, Multiply(), [PRODUCTS // 16] * 16))


@dataclass(frozen=True)
class Copy:
    """A worker that copies files to their own folder, and removes the copy."""

    def open(self) -> Callable[[str], int]:
        return copied_bytes


def copied_bytes(path: str) -> int:
    """Copy a file as `cp` does where it cannot share blocks."""
    target = f"{path}.copy"
    with open(path, "rb") as source, open(target, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
        length = out.tell()
    os.unlink(target)
    return length


def copy_seconds(folder: Path, executor: Executor, number: int) -> float:
    """Of work that needs nothing but memory, or the disk: every file of the pool, COPIES times."""
    files = [str(tar) for tar in sorted((folder / "pool").glob("*.tar"))]
    return sum(seconds(lambda: done_by(executor, Copy(), files)) for _ in range(COPIES))


def done_by(executor: Executor, worker: Worker, tasks: Sequence[Any]) -> None:
    """Have tasks done, and see that they were."""
    for _, answer in executor.each(worker, tasks):
        assert not isinstance(answer, Failure), answer


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
        "select": [{"dedup": {"space": "own", "epsilon": 0.05, "sample_per_cluster": SAMPLE}}],
        "write": {"formats": ["subset"]},
        "seed": number,
    }
    with tempfile.TemporaryDirectory(dir=scratch) as folder:  # it holds all vectors twice: one at a time
        run = Run(Root(f"{folder}/store"), Root(f"{folder}/run"), executor, Machine(threads=1))
        curate(run, recipe_of(recipe), GROUP_UNITS)
    stages = ("cluster_assign", "dedup_scatter", "dedup_within", "dedup_drop")
    return sum(float(stage["seconds"]) for stage in run.times if stage["stage"] in stages)


def write_seconds(scratch: Path, executor: Executor, number: int) -> float:
    """Of the write stage, as bench `copy` has it, WRITES times."""
    return sum(copy.write_seconds(scratch, executor) for _ in range(WRITES))


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
