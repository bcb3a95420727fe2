"""DataComp's resharding on the metadata of 10M uids: which rows a subset.npy names, by our list step and by np.isin.

Both read their uids from disk. Each runs in a process of its own, so that its peak memory can be told: ours reads
unit after unit, np.isin has to hold all uids at once. It is given them in the form that it is fastest at, and told that
none is there twice.
"""

from __future__ import annotations

from binascii import unhexlify
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benches.measure import RUNS, Row, alone, paired, seconds
from pipeline.executor import Serial
from pipeline.machine import Machine
from pipeline.parts import given
from pipeline.pool import Pool, list_units
from pipeline.ray_executor import RayExecutor
from pipeline.read import Read
from pipeline.run import Run
from pipeline.schema import GROUP_UNITS
from pipeline.select.list import List
from pipeline.state import Begin
from pipeline.step import Step
from pipeline.storage import Root

SHARDS, ROWS = 1024, 10_000
SMALL = GROUP_UNITS
NAMED = 0.3
MACHINE = Machine(threads=1, workers=2)

Form: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of all uids, S32 (N,), and a subset, u8,u8 (M,) in order: bool (N,)."""


def measure(scratch: Path) -> Iterator[Row]:
    """Rates of rows, and the peak memory of ours for a small and the large pool."""
    write_pool(scratch / "pool")
    executor = RayExecutor(MACHINE, "local")
    try:
        select(scratch, SHARDS, 0, Run(Root(str(scratch / "store")), Root(str(scratch)), executor, MACHINE))
    finally:
        executor.close()
    rows = SHARDS * ROWS
    best = min(FORMS, key=lambda form: alone(isin, scratch, SMALL, 0, form)[0])
    rates, memory_mb = [], []
    for number in range(1, RUNS + 1):
        own_s, own_bytes = alone(list_step, scratch, SHARDS, number)
        other_s, other_bytes = alone(isin, scratch, SHARDS, number, best)
        rates.append((rows / own_s / 1e6, rows / other_s / 1e6))
        # Of another subset: of the same one the small pool's part would be found, not made.
        memory_mb.append((alone(list_step, scratch, SMALL, RUNS + number)[1] / 1e6, own_bytes / 1e6))
    name = f"reshard: {rows / 1e6:.0f}M uids against a subset of {NAMED:.0%}, one core"
    yield paired(name, f"np.isin on {best.__name__} (which took {other_bytes / 1e6:.0f} MB)", 1, "M rows/s", rates)
    yield paired(f"reshard: peak memory for {SMALL * ROWS / 1e6:.1f}M uids", "for all", 0.9, "MB", memory_mb)


def write_pool(folder: Path) -> None:
    """Metadata in DataComp's layout with random uids, and some subsets of them."""
    folder.mkdir()
    random = np.random.default_rng(0)
    uids, named = list[np.ndarray](), random.random((2 * RUNS + 1, SHARDS * ROWS), np.float32) < NAMED
    for shard in range(SHARDS):
        uid_N = random.integers(0, 256, (ROWS, 16), np.uint8)
        digits, ends = uid_N.tobytes().hex().encode(), np.arange(0, 32 * ROWS + 1, 32, dtype=np.int32)
        table = {
            "uid": pa.StringArray.from_buffers(ROWS, pa.py_buffer(ends), pa.py_buffer(digits)),
            "url": [f"https://example.org/{row}.jpg" for row in range(ROWS)],
            "text": [f"caption number {row}" for row in range(ROWS)],
        }
        pq.write_table(pa.table(table), folder / f"{shard:08d}.parquet")
        uids.append(uid_N.view(">u8").astype("<u8").view("u8,u8").ravel())
    for number, named_N in enumerate(named):
        np.save(folder.parent / f"named-{number}.npy", named_N)
        pair_M = np.concatenate(uids)[named_N]
        np.save(folder.parent / f"subset-{number}.npy", pair_M[np.lexsort((pair_M["f1"], pair_M["f0"]))])


def list_step(scratch: Path, shards: int, number: int) -> float:
    """Our step over a pool that has been read, in this process."""
    return select(scratch, shards, number, Run(Root(str(scratch / "store")), Root(str(scratch)), Serial(), MACHINE))


def select(scratch: Path, shards: int, number: int, run: Run) -> float:
    """Seconds of the list step; what goes before it is found, or made."""
    units = list_units(Pool("datacomp", str(scratch / "pool")), {})[:shards]
    read = run.read(Read("datacomp"), units)
    samples, columns = (read[name].grouped(GROUP_UNITS) for name in ("samples", "columns"))
    state = run.map(Begin(), samples)["state"]
    places = given([{"first_unit": i * GROUP_UNITS, "group": i} for i in range(len(samples))])
    step = Step(1, "01-list", 0, run, samples, columns, {}, {}, state, places, samples.num_rows)
    rule = List(allow=str(scratch / f"subset-{number}.npy")).pinned(MACHINE)
    return seconds(lambda: rule.apply(step))


def isin(scratch: Path, shards: int, number: int, form: Form) -> float:
    """Seconds of np.isin over all uids at once, as they come from the metadata: so it sorts the list only once.

    Raises:
        AssertionError: it found other rows than the subset names.
    """
    found: list[np.ndarray] = []

    def join() -> None:
        paths = sorted((scratch / "pool").glob("*.parquet"))[:shards]
        uid_N = np.concatenate([hexes(pq.read_table(path, columns=["uid"]).column(0)) for path in paths])
        found.append(form(uid_N, np.load(scratch / f"subset-{number}.npy", allow_pickle=False)))

    taken_s = seconds(join)
    if not np.array_equal(found[0], np.load(scratch / f"named-{number}.npy", allow_pickle=False)[: len(found[0])]):
        raise AssertionError(f"np.isin on {form.__name__} found other rows than the subset names")
    return taken_s


def texts(uid_N: np.ndarray, pair_M: np.ndarray) -> np.ndarray:
    """Whether the subset names each uid, by uids as the metadata has them."""
    listed_M = np.frombuffer(pair_M.view("<u8").astype(">u8").tobytes().hex().encode(), "S32")
    return np.isin(uid_N, listed_M, assume_unique=True)


def pairs(uid_N: np.ndarray, pair_M: np.ndarray) -> np.ndarray:
    """The same by uids as the subset has them."""
    return np.isin(words(uid_N).view(pair_M.dtype).ravel(), pair_M, assume_unique=True)


def halves(uid_N: np.ndarray, pair_M: np.ndarray) -> np.ndarray:
    """The same by first halves; where one is in the subset, its second half is looked up there.

    Raises:
        AssertionError: two uids of the subset share their first half.
    """
    high_N, low_N = words(uid_N).T
    high_M = pair_M["f0"].copy()
    if (high_M[1:] == high_M[:-1]).any():
        raise AssertionError("two uids of the subset share their first half")
    there_N = np.isin(high_N, high_M, assume_unique=True)
    row = np.flatnonzero(there_N)
    there_N[row] = pair_M["f1"].take(np.searchsorted(high_M, high_N[row]), mode="clip") == low_N[row]
    return there_N


FORMS: tuple[Form, ...] = (texts, pairs, halves)


def words(uid_N: np.ndarray) -> np.ndarray:
    """uint64 (N, 2)."""
    return np.frombuffer(unhexlify(uid_N.tobytes()), ">u8").astype("<u8").reshape(-1, 2)


def hexes(column: pa.ChunkedArray) -> np.ndarray:
    """S32 (N,), without a copy."""
    return np.frombuffer(column.combine_chunks().buffers()[2], "S32", len(column))
