"""What a unit costs that has next to nothing to do: 20,000 of them on two Ray workers, in a store in memory.

Each is committed, with bytes and facts of its own, as those of a pool are. Memory is that of the driver's process, with
all that Ray holds in it: at the peak of a stage, and what stays of it while its dataset is in use.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
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

FEW, UNITS = 5_000, 20_000
"""Units of a first stage, after which memory is looked at; and of each that follows."""

RUNS = 4
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
    """Memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Measured:
    """What one process found: of each stage, but for the peak, which only the first one shows."""

    costs_ms: list[float]
    peak_bytes: float
    growth_bytes: list[float]
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
    yield within("driver: its memory for each stage whose dataset is in use", 300, "bytes a unit", found.growth_bytes)
    yield within(f"driver: {UNITS:,} finished units found again", 5, "s", found.found_s)


def measured(folder: Path) -> Measured:
    """Run in that process."""
    executor = RayExecutor(MACHINE, "local")

    def run() -> Run:
        return Run(Root(str(folder)), Root(str(folder)), executor, MACHINE)

    def units(count: int) -> Dataset:
        return given([{"unit": i} for i in range(count)], [f"{i:08d}.tar" for i in range(count)])

    try:
        run().map(Number(0), units(FEW))
        peak_bytes, many = peak_rss_bytes(), units(UNITS)
        costs_ms, kept, rss = [], [], []
        for salt in range(1, RUNS + 1):
            started = time.perf_counter()
            kept.append(run().map(Number(salt), many))
            costs_ms.append(1e3 * (time.perf_counter() - started) / UNITS)
            rss.append(rss_bytes())
            if salt == 1:
                grown_bytes = (peak_rss_bytes() - peak_bytes) / (UNITS - FEW)
        found_s = [seconds(partial(run().map, Number(salt), many)) for salt in range(1, RUNS + 1)]
    finally:
        executor.close()
    return Measured(costs_ms, grown_bytes, [(after - before) / UNITS for before, after in pairwise(rss)], found_s)
