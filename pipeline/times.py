"""times.json: what a run took, over all of its starts; kept while it goes on, so that a crash costs half a minute."""

from __future__ import annotations

import json
import platform
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipeline.run import Run
from pipeline.storage import Root

EVIDENCE = ("read", "embed", "precomputed")
"""Stages with a part for each shard, which take nearly all the time of a run."""


@dataclass(frozen=True)
class Times:
    """What earlier starts of a run took.

    Attributes:
        work: stands for the recipe and the shards; what other work took in the same directory is not counted.
        shards: of the pool.
        pool_bytes: of their files.
        stages: entries of `Run.times` of the earlier starts.
    """

    work: str
    shards: int
    pool_bytes: int
    stages: tuple[dict[str, Any], ...]

    @staticmethod
    def of(directory: Root, work: str, shards: int, pool_bytes: int) -> Times:
        """Those of a run directory."""
        try:
            told = json.loads(directory.read("times.json"))
            stages = told["stages"] if told.get("work") == work else []
        except (FileNotFoundError, ValueError):
            stages = []
        return Times(work, shards, pool_bytes, tuple(stages))

    def write(self, run: Run, written_bytes: int = 0) -> None:
        """Write times.json, with what this start took so far."""
        stages = [*self.stages, *run.times]
        told = {
            "work": self.work,
            "host": platform.node(),
            "python": platform.python_version(),
            "stages": stages,
            "found": self._found(run, stages),
            "pool_bytes": self.pool_bytes,
            "stored_bytes": {stage: sum(sizes.values()) for stage, sizes in run.stored_bytes.items()},
            "written_bytes": written_bytes,
        }
        run.directory.write("times.json", json.dumps(told, indent=1).encode() + b"\n")

    def _found(self, run: Run, stages: list[dict[str, Any]]) -> dict[str, int]:
        """Stage of EVIDENCE -> shards that no start made: what they took, another run knows, or one that was killed.

        Arrays of several models count a shard for each. A shard that lacks one of several networks was not found.
        """
        asked = Counter(stage for stage, _ in run.datasets if stage in EVIDENCE)
        made = Counter[str]()
        for entry in stages:
            made[entry["stage"].partition(" ")[0]] += entry["parts"]
        found = {stage: self.shards * (1 if stage == "embed" else many) - made[stage] for stage, many in asked.items()}
        return {stage: many for stage, many in found.items() if many > 0}
