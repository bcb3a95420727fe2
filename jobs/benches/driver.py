"""What a unit costs that has next to nothing to do: 20,000 of them on two Ray workers, in a store in memory.

Each is committed, with bytes and facts of its own, as those of a pool are. Memory is that of the driver's process, with
all that Ray holds in it: by how much each more unit of a stage raises its peak, and what stays of a stage while its
dataset is in use. Each reading is one process's, with a store of its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from jobs.benches.measure import RUNS, Row, alone, peak_rss_bytes, seconds, within
from pipeline.machine import Machine
from pipeline.parts import Dataset, given
from pipeline.ray_executor import RayExecutor
from pipeline.run import Run
from pipeline.stage import Function, Made, Rows
from pipeline.storage import Root

UNITS = 20_000
SIZES = (UNITS // 2, UNITS, 2 * UNITS)
"""Units of the stages whose peaks are compared, in this order; below, what each stage takes once is most of it."""

KEPT = 3
"""Stages of UNITS whose datasets stay in use."""
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
        cost_ms: of a unit, in the stages of UNITS that are kept.
        peak_bytes: by which a larger stage's peak is higher, for each more unit: the slope over SIZES.
        growth_bytes: of the process, for each unit of a kept stage: the slope over their number.
        found_s: until all stages are found again.
    """

    cost_ms: float
    peak_bytes: float
    growth_bytes: float
    found_s: float


def measure(scratch: Path) -> Iterator[Row]:
    """The cost of a unit, what the driver's memory grows by, and how soon a finished stage is found again."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else scratch) as folder:
        # In processes of their own: a bench before this one may have held more than the driver ever will.
        found = [alone(measured, Path(folder) / str(run))[0] for run in range(RUNS)]
    name = f"driver: {UNITS:,} units of next to nothing, 2 Ray workers, store in memory"
    yield within(name, 3, "ms a unit", [one.cost_ms for one in found])
    sizes = ", ".join(f"{units:,}" for units in SIZES)
    name = f"driver: its memory at the peak of a stage, slope over {sizes} units"
    yield within(name, 1000, "bytes a unit", [one.peak_bytes for one in found])
    name = "driver: its memory for each stage whose dataset is in use"
    yield within(name, 300, "bytes a unit", [one.growth_bytes for one in found])
    every = sum(SIZES) + KEPT * UNITS
    name = f"driver: a finished run found again, {len(SIZES) + KEPT} stages with {every:,} units in all"
    yield within(name, 5, "s", [one.found_s for one in found])


def measured(folder: Path) -> Measured:
    """Run in that process."""
    executor = RayExecutor(MACHINE, "local")

    def run() -> Run:
        return Run(Root(str(folder)), Root(str(folder)), executor, MACHINE)

    def units(count: int) -> Dataset:
        return given([{"unit": i} for i in range(count)], [f"{i:08d}.tar" for i in range(count)])

    try:
        run().map(Number(0), units(SIZES[0] // 4))  # what a first stage loads and Arrow's pool keeps is of all
        many = units(UNITS)
        peaks = []
        stages = [(Number(salt), many if size == UNITS else units(size)) for salt, size in enumerate(SIZES, 1)]
        for stage, dataset in stages:
            forget_peak()
            run().map(stage, dataset)
            peaks.append(peak_rss_bytes())
        kept, held, cost_s = [], [rss_bytes()], 0.0
        for salt in range(len(SIZES) + 1, len(SIZES) + 1 + KEPT):
            stages.append((Number(salt), many))
            cost_s += seconds(lambda: kept.append(run().map(*stages[-1])))
            held.append(rss_bytes())
        found_s = seconds(lambda: resume(run(), stages))
    finally:
        executor.close()
    growth = slope(range(KEPT + 1), held) / UNITS
    return Measured(1e3 * cost_s / UNITS / KEPT, slope(SIZES, peaks), growth, found_s)


def slope(x: Sequence[int], y: Sequence[int]) -> float:
    """Of the line that is nearest to all points."""
    return float(np.polyfit(x, y, 1)[0])


def resume(run: Run, stages: Sequence[tuple[Number, Dataset]]) -> None:
    """Find every stage again, as a run does that goes on."""
    for stage, dataset in stages:
        run.map(stage, dataset)


def forget_peak() -> None:
    """Let this process's peak be what it holds now, where the system can."""
    resets = Path("/proc/self/clear_refs")
    if resets.exists():
        resets.write_text("5")
