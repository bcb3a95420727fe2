"""`python -m tests.memory POOL DIRECTORY`: a run on a local Ray of one worker; prints its peaks of memory in MiB.

Every rule and every output format, with a model over images; `spilled` is what Ray's object store had to put on disk.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import ray
from PIL import Image
from ray._private.internal_api import memory_summary

from pipeline.curate import curate
from pipeline.machine import Machine
from pipeline.ray_executor import RayExecutor
from pipeline.recipe import recipe_of
from pipeline.run import Run
from pipeline.storage import Root
from tests.crash import descendants

SIDE_PX = 160


def pool_of(folder: Path, samples: int) -> Path:
    """One shard; its images are noise, so that none is small and no two are alike."""
    folder.mkdir()
    random = np.random.default_rng(1)
    with tarfile.open(folder / "00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            image = io.BytesIO()
            pixels = random.integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8)
            Image.fromarray(pixels).save(image, "JPEG", quality=97)
            members = {"jpg": image.getvalue(), "txt": b"caption %d of some" % number}
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def recipe(pool: str) -> dict[str, object]:
    return {
        "pool": {"format": "webdataset", "path": pool},
        "models": {"tiny": {"weights": "tiny"}},
        "select": [
            {"filter": {"min_words": 2}},
            {"dedup": {"space": "tiny", "epsilon": 1e-7}},
            {"cut": {"score": "tiny", "keep": 0.9}},
            {"density": {"space": "tiny", "clusters": 4, "keep": 0.8}},
        ],
    }


def peak_mib(process: int | str) -> int:
    """The most memory that a process has held."""
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(kib) >> 10


def main(pool: str, directory: str) -> None:
    machine = Machine(threads=1, workers=1)
    executor = RayExecutor(machine)
    try:
        run = Run(Root(f"{directory}/store"), Root(directory), executor, machine)
        curated = curate(run, recipe_of(recipe(pool)))
        workers = descendants(int(Path("/proc/self").readlink().name), "ray::_Actor")
        summary = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
        found = {
            "kept": curated.kept,
            "worker": max(peak_mib(worker) for worker in workers),
            "driver": peak_mib("self"),
            "objects": int(re.findall(r"Plasma memory usage (\d+) MiB", summary)[0]),
            "spilled": sum(map(int, re.findall(r"Spilled (\d+) MiB", summary))),
        }
        print(json.dumps(found), flush=True)
    finally:
        executor.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
