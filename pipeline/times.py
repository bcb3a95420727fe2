"""times.json: what a run took, over all of its starts; kept while it goes on, for a start after this one."""

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


def read_times(directory: Root) -> dict[str, Any] | None:
    """times.json of a run directory; None where there is none, or not a whole one."""
    try:
        found = json.loads(directory.read("times.json"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("stages"), list) else None


@dataclass(frozen=True)
class Times:
    """What earlier starts of a run took.

    Attributes:
        work: stands for the recipe and the shards; what other work took in the same directory is not counted.
        shards: of the pool.
        pool_bytes: of their files.
        stages: entries of `Run.times` of the earlier starts.
        since: entries that the run had when this start began.
    """

    work: str
    shards: int
    pool_bytes: int
    stages: tuple[dict[str, Any], ...]
    since: int

    @staticmethod
    def begin(run: Run, work: str, shards: int, pool_bytes: int) -> Times:
        """Those of the run's directory, from which other work's are taken away."""
        found = read_times(run.directory)
        if found is None or found.get("work") != work:
            run.directory.delete("times.json")
            found = {"stages": []}
        return Times(work, shards, pool_bytes, tuple(found["stages"]), len(run.times))

    def write(self, run: Run, written_bytes: int = 0) -> None:
        """Write times.json, with what this start took so far."""
        stages = [*self.stages, *run.times[self.since :]]
        times = {
            "work": self.work,
            "host": platform.node(),
            "python": platform.python_version(),
            "stages": stages,
            "found": self._found(run, stages),
            "pool_bytes": self.pool_bytes,
            "stored_bytes": {stage: sum(sizes.values()) for stage, sizes in run.stored_bytes.items()},
            "written_bytes": written_bytes,
        }
        run.directory.write("times.json", json.dumps(times, indent=1).encode() + b"\n")

    def _found(self, run: Run, stages: list[dict[str, Any]]) -> dict[str, int]:
        """Stage of EVIDENCE -> shards that no start made: what they took, another run knows, or one that was killed.

        Arrays of several models count a shard for each. A shard that lacks one of several networks was not found.
        """
        asked = Counter(stage for stage, _ in run.datasets if stage in EVIDENCE)
        made = Counter[str]()
        for entry in stages:
            made[entry["stage"].partition(" ")[0]] += entry["parts"]
            made.update(entry.get("further", {}))
        found = {stage: self.shards * (1 if stage == "embed" else many) - made[stage] for stage, many in asked.items()}
        return {stage: many for stage, many in found.items() if many > 0}
