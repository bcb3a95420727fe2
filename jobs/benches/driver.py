"""What a unit costs that has nothing to do: 20,000 of them on two Ray workers, each committed, in a store in memory.

Memory is that of the driver, which has listed all units before the stage begins.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from jobs.benches.measure import Row, paired, seconds, within
from pipeline.machine import Machine
from pipeline.parts import given
from pipeline.ray_executor import RayExecutor
from pipeline.run import Quiet, Run
from pipeline.stage import Function, Made, Rows
from pipeline.storage import Root

UNITS = 20_000
FIRST, LAST = UNITS // 4, UNITS
"""Units done when the driver's memory is looked at."""

RUNS = 3
MACHINE = Machine(threads=1, workers=2)


@dataclass(frozen=True)
class Nothing:
    """A table without rows for each unit."""

    salt: int

    name: ClassVar[str] = "nothing"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("nothing",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.make

    def make(self, unit: Rows) -> Made:
        return Made({"nothing": pa.table({"at": pa.array([], pa.int64())})}, {"rows": 0})


@dataclass
class Memory(Quiet):
    """Looks at the memory of this process on the way."""

    done: int = 0
    rss_bytes: dict[int, int] = field(default_factory=dict)

    def advance(self, rows: int) -> None:
        self.done += 1
        if self.done in (FIRST, LAST):
            self.rss_bytes[self.done] = rss_bytes()


def rss_bytes() -> int:
    """Memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(scratch: Path) -> Iterator[Row]:
    """The cost of a unit, what the driver's memory grows by, and how soon a finished stage is found again."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else scratch) as folder:
        executor = RayExecutor(MACHINE, "local")
        try:
            yield from _measure(Path(folder), executor)
        finally:
            executor.close()


def _measure(folder: Path, executor: RayExecutor) -> Iterator[Row]:
    units = given([{"unit": i} for i in range(UNITS)], [f"{i:08d}.tar" for i in range(UNITS)])
    costs_ms, memory_mb, found_s = [], [], []
    for salt in range(RUNS):
        root, memory = Root(str(folder / str(salt))), Memory()
        first, again = (Run(root, root, executor, MACHINE, shown) for shown in (memory, Quiet()))
        costs_ms.append(1e3 * seconds(partial(first.map, Nothing(salt), units)) / UNITS)
        memory_mb.append((memory.rss_bytes[FIRST] / 1e6, memory.rss_bytes[LAST] / 1e6))
        found_s.append(seconds(partial(again.map, Nothing(salt), units)))
    yield within(f"driver: {UNITS:,} empty units, 2 Ray workers, store in memory", 3, "ms a unit", costs_ms)
    yield paired(f"driver: its memory after {FIRST:,} units", f"after {LAST:,}", 0.9, "MB", memory_mb)
    yield within(f"driver: {UNITS:,} finished units found again", 5, "s", found_s)
