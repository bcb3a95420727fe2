"""How far a run is, as its store tells it: in from any process at any time, also while the run is going on.

In: the roots of a run directory and its store. Out: counts for each stage, failures by name, what it took so far.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline.lease import holders
from pipeline.run import FAILED, LOOSE, MANIFESTS, SEGMENTS
from pipeline.storage import Root
from pipeline.times import read_times


@dataclass(frozen=True)
class StageStatus:
    """What a store holds of one stage, of all runs that share the store.

    Attributes:
        stage: its name.
        datasets: finished ones.
        parts: committed ones.
        pending: committed parts that no finished dataset has: the stage is under way, or was stopped.
        failed: (unit, cause) of the parts that could not be made when it was last tried.
    """

    stage: str
    datasets: int
    parts: int
    pending: int
    failed: tuple[tuple[str, str], ...]

    @property
    def state(self) -> str:
        if self.failed:
            return "failed"
        return "under way" if self.pending else "done"


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        finished: whether the run directory is whole.
        holders: processes that write it now (lease.holders).
        stages: in the order of their names.
        times: times.json, of all starts so far; None where no stage was done.
    """

    finished: bool
    holders: tuple[str, ...]
    stages: tuple[StageStatus, ...]
    times: dict[str, Any] | None


def status(directory: Root, store: Root) -> Status:
    """Look at a run directory and its store, whatever state they are in."""
    loose: dict[str, set[str]] = {}
    for path in store.list(LOOSE):
        loose.setdefault(_stage(path), set()).add(path.rpartition("/")[2].removesuffix(".json"))
    finished = _keys(store, MANIFESTS)
    compacted = _keys(store, SEGMENTS)
    datasets = Counter(_stage(path) for path in store.list(MANIFESTS))
    failed = {}
    for path in store.list(FAILED):
        units = json.loads(store.read(path))
        failed[path.rpartition("/")[2].removesuffix(".json")] = tuple((unit["name"], unit["cause"]) for unit in units)
    stages = []
    for stage in sorted({*loose, *finished, *compacted, *failed}):
        done = finished.get(stage, set())
        committed = loose.get(stage, set()) | compacted.get(stage, set()) | done
        stages.append(StageStatus(stage, datasets[stage], len(committed), len(committed - done), failed.get(stage, ())))
    whole = directory.bytes("checksums.sha256") is not None
    return Status(whole, tuple(holders(store, directory)), tuple(stages), read_times(directory))


def _stage(path: str) -> str:
    return path.split("/")[1]


def _keys(store: Root, folder: str) -> dict[str, set[str]]:
    """Stage -> keys of the receipts in its manifests or segments; one that is deleted meanwhile is passed over."""
    keys: dict[str, set[str]] = {}
    for path in store.list(folder):
        try:
            with store.open(path) as file:
                keys.setdefault(_stage(path), set()).update(pq.read_table(file, columns=["key"])["key"].to_pylist())
        except FileNotFoundError:
            continue
    return keys
