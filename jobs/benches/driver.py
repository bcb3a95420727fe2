"""What a unit costs that has next to nothing to do: 20,000 of them on two Ray workers, in a store in memory.

Each is committed, with bytes and facts of its own, as those of a pool are. Memory is that of the driver's process, with
all that Ray holds in it: by how much a stage of twice the units raises its peak, and what stays of a stage while its
dataset is in use.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from jobs.benches.measure import Row, alone, peak_rss_bytes, seconds, within
from pipeline.machine import Machine
from pipeline.parts import Dataset, given
from pipeline.ray_executor import RayExecutor
from pipeline.run import Run
from pipeline.stage import Function, Made, Rows
from pipeline.storage import Root

UNITS, RUNS = 20_000, 3
MACHINE = Machine(threads=1, workers=2)


@dataclass(frozen=True)
class Number:
    """A table of one number for each unit."""

    salt: int

    name: ClassVar[str] = "number"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("number",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.make

    def make(self, unit: Rows) -> Made:
        number = unit.given["unit"]
        return Made({"number": pa.table({"number": pa.array([number], pa.int64())})}, {"number": number})


def rss_bytes() -> int:
    """Memory of this process that is in RAM now, but for what Arrow's pool keeps for the next stage."""
    pa.default_memory_pool().release_unused()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Measured:
    """What one process found.

    Attributes:
        costs_ms: of a unit, in each stage.
        peak_bytes: by which a larger stage's peak is higher, for each more unit.
        growth_bytes: of the process, for each unit and stage.
        found_s: of each stage that is there.
    """

    costs_ms: list[float]
    peak_bytes: float
    growth_bytes: float
    found_s: list[float]


def measure(scratch: Path) -> Iterator[Row]:
    """The cost of a unit, what the driver's memory grows by, and how soon a finished stage is found again."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else scratch) as folder:
        # In a process of its own: a bench before this one may have held more than the driver ever will.
        found, _ = alone(measured, Path(folder))
    yield within(
        f"driver: {UNITS:,} units of next to nothing, 2 Ray workers, store in memory", 3, "ms a unit", found.costs_ms
    )
    yield within("driver: its memory at the peak of a stage", 1000, "bytes a unit", [found.peak_bytes])
    yield within("driver: its memory for each stage whose dataset is in use", 300, "bytes a unit", [found.growth_bytes])
    yield within(f"driver: {UNITS:,} finished units found again", 5, "s", found.found_s)


def measured(folder: Path) -> Measured:
    """Run in that process."""
    executor = RayExecutor(MACHINE, "local")

    def run() -> Run:
        return Run(Root(str(folder)), Root(str(folder)), executor, MACHINE)

    def units(count: int) -> Dataset:
        return given([{"unit": i} for i in range(count)], [f"{i:08d}.tar" for i in range(count)])

    try:
        many, more, peaks = units(UNITS), units(2 * UNITS), []
        for salt, dataset in ((-1, many), (-2, more)):  # what a first stage loads and Arrow's pool keeps is of both
            run().map(Number(salt), dataset)
            peaks.append(peak_rss_bytes())
        costs_ms, kept, before = [], [], rss_bytes()
        for salt in range(1, RUNS + 1):
            started = time.perf_counter()
            kept.append(run().map(Number(salt), many))
            costs_ms.append(1e3 * (time.perf_counter() - started) / UNITS)
        held = rss_bytes()
        found_s = [seconds(partial(run().map, Number(salt), many)) for salt in range(1, RUNS + 1)]
    finally:
        executor.close()
    return Measured(costs_ms, (peaks[1] - peaks[0]) / UNITS, (held - before) / UNITS / RUNS, found_s)
