"""The kept 30% of 2 GB of tars: our write stage, as it runs in a run, against `cp` of as many bytes and webdataset.

Everything lies in memory (/dev/shm, where there is one): what is measured is the work, not the disk.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import webdataset

from jobs.benches.measure import RUNS, Row, paired, seconds
from pipeline.curate import curate
from pipeline.executor import Executor
from pipeline.formats.tar import END, member_header, padding, walk
from pipeline.formats.webdataset import split
from pipeline.machine import Machine
from pipeline.ray_executor import RayExecutor
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.storage import Root

SHARDS, SAMPLES, IMAGE_BYTES = 8, 10_000, 25_000
"""img2dataset's shards, of images as heavy as the web's at 256 px: 2 GB."""

KEEP = 0.3
MACHINE = Machine(threads=1, workers=2)
PEER_PROCESSES = (1, 2)
"""Which of them share the pool's tars; as many as our workers at most."""


def measure(scratch: Path) -> Iterator[Row]:
    """Rates of kept bytes."""
    memory = Path("/dev/shm")
    executor = RayExecutor(MACHINE, "local")
    try:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else scratch) as folder:
            yield from _measure(Path(folder), executor)
    finally:
        executor.close()


def _measure(folder: Path, executor: RayExecutor) -> Iterator[Row]:
    pool, filtered = folder / "pool", folder / "run" / "filtered"
    write_pool(pool)

    def cp() -> float:
        return cp_seconds(filtered, folder / "cp")

    def peer(processes: int) -> float:
        return webdataset_seconds(crew, processes, pool, kept, folder / "peer")

    write_seconds(folder, executor), cp()
    kept_mb = sum(file.stat().st_size for file in filtered.glob("*")) / 1e6
    kept = {key for tar in filtered.glob("*.tar") for key in keys_of(tar)}
    name = f"copy: {KEEP:.0%} of {SHARDS * SAMPLES:,} samples in tars, digests included, 2 Ray workers"
    pairs = [(kept_mb / write_seconds(folder, executor), kept_mb / cp()) for _ in range(RUNS)]
    yield paired(name, "cp of the kept bytes", 0.25, "MB/s", pairs)
    with ProcessPoolExecutor(max(PEER_PROCESSES), get_context("spawn")) as crew:
        peer(max(PEER_PROCESSES))
        best = min(PEER_PROCESSES, key=peer)
        pairs = [(kept_mb / write_seconds(folder, executor), kept_mb / peer(best)) for _ in range(RUNS)]
    against = f"webdataset read, ShardWriter (the best of {PEER_PROCESSES} processes: {best})"
    yield paired(name, against, 8, "MB/s", pairs)


def cp_seconds(source: Path, target: Path) -> float:
    """Of `cp` of a folder to one that is not there, or goes first."""
    shutil.rmtree(target, ignore_errors=True)
    return seconds(lambda: subprocess.run(["cp", "-r", str(source), str(target)], check=True))


def write_seconds(folder: Path, executor: Executor) -> float:
    """What the write stage takes in a run over folder/pool that has decided, and lost its output."""
    recipe = {
        "pool": {"format": "webdataset", "path": str(folder / "pool")},
        "select": [{"random": {"keep": KEEP}}],
        "write": {"formats": ["webdataset"], "samples_per_shard": SAMPLES // 4},
    }
    for file in (folder / "run" / "filtered").glob("*"):
        file.unlink()
    run = Run(Root(str(folder / "run" / "store")), Root(str(folder / "run")), executor, MACHINE)
    curate(run, recipe_of(recipe))
    return next(float(stage["seconds"]) for stage in run.times if stage["stage"] == "write_tar")


def write_pool(folder: Path) -> None:
    """Tars in img2dataset's layout whose images are noise; the same bytes each time."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for shard in range(SHARDS):
        noise = random.bytes(2 * IMAGE_BYTES)
        lengths = random.integers(IMAGE_BYTES // 2, IMAGE_BYTES * 3 // 2, SAMPLES)
        with open(folder / f"{shard:05d}.tar", "wb") as tar:
            for row, length in enumerate(lengths.tolist()):
                key, caption = f"{shard:05d}{row:04d}", f"sample {row} of shard {shard}"
                fields = {"caption": caption, "key": key, "width": 256, "height": 256, "status": "success"}
                members = {
                    "jpg": b"%d " % row + noise[row : row + length],
                    "txt": caption.encode(),
                    "json": json.dumps(fields, indent=4).encode(),
                }
                for suffix, data in members.items():
                    tar.write(member_header(f"{key}.{suffix}", len(data), 1) + data + padding(len(data)))
            tar.write(END)


def keys_of(tar: Path) -> set[str]:
    """The key of every member."""
    with open(tar, "rb") as file:
        return {split(member.name)[0] for member in walk(file, tar.stat().st_size).members}


def webdataset_seconds(crew: ProcessPoolExecutor, processes: int, pool: Path, kept: set[str], out: Path) -> float:
    """Of so many processes that each make the selection of as many tars."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    urls = [str(tar) for tar in sorted(pool.glob("*.tar"))]
    shares = [urls[number::processes] for number in range(processes)]
    patterns = [f"{out}/{number}-%08d.tar" for number in range(processes)]
    return seconds(lambda: list(crew.map(webdataset_copy, shares, repeat(kept), patterns)))


def webdataset_copy(urls: list[str], kept: set[str], pattern: str) -> None:
    """The same selection as webdataset's users make it; nothing is decoded or encoded."""
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).select(lambda s: s["__key__"] in kept)
    with webdataset.ShardWriter(pattern, maxcount=SAMPLES, maxsize=1e12, encoder=False, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
