"""An exact global cut of scores that lie in many parts, against polars' streaming quantile and filter.

Both read the same parquet files with polars, which decodes no uid of a row whose score is too low, and write the kept
rows; ours counts scores beforehand, and decides each row itself. The quantile keeps every row at its value or above, so
its count is off by the ties; the cut takes exactly what is asked for, ties by uid. Each run has a process of its own.

That is the method alone. A second row times the step as a run does it: two workers that read committed parts and check
their digests, count, decide each row of the pool, and commit for each whether it is dropped, by what, with which score
and below which bound.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from jobs.benches.measure import RUNS, Row, paired, peak_rss_bytes, seconds, within
from pipeline import exact
from pipeline.arrow import fixed
from pipeline.exact import Counts, Keys
from pipeline.machine import Machine
from pipeline.parts import PARTS as PARTS_FOLDER
from pipeline.parts import Dataset, File, Part, given, to_parquet
from pipeline.ray_executor import RayExecutor
from pipeline.run import LOOSE, MANIFESTS, SEGMENTS, Run
from pipeline.select.cut import Cut, Score
from pipeline.state import Begin
from pipeline.step import Step
from pipeline.storage import Root
from pipeline.vectors import from_ordered_bits, ordered_bits

PARTS, PART_ROWS = 100, 1_000_000
KEEP = 0.3
MOST_BYTES = 10**9
SORTED_ROWS = 1 << 16
"""Undecided rows that are sorted; to count the scores once more takes half as long as to sort the million left."""
COLUMNS = ["score", "uid_high", "uid_low"]
ROW_N = np.arange(PART_ROWS, dtype=np.uint32)  # made once, not for each pass over each part


def measure(scratch: Path) -> Iterator[Row]:
    """Rows of bench.json."""
    for part in range(PARTS):
        rng = np.random.default_rng(part)
        uid_N2 = rng.integers(2**64, size=(PART_ROWS, 2), dtype=np.uint64)
        # Scores on a grid, as cosines of float16 vectors are not, so that the quantile falls among ties.
        score_N = np.rint(rng.normal(0.25, 0.05, PART_ROWS) * 2**20).astype(np.float32) / np.float32(2**20)
        table = pa.table({"score": score_N, "uid_high": uid_N2[:, 0], "uid_low": uid_N2[:, 1]})
        pq.write_table(table, scratch / f"{part:03}.parquet", compression="none", use_dictionary=False)
    keep = int(KEEP * PARTS * PART_ROWS)
    pairs, peaks, over = [], [], 0
    for _ in range(RUNS):
        own_s, kept, peak = alone(ours, scratch, keep)
        other_s, quantile_kept, _ = alone(theirs, scratch, keep)
        if kept != keep:
            raise AssertionError(f"the cut took {kept} rows, not {keep}")
        over = quantile_kept - keep
        pairs.append((PARTS * PART_ROWS / own_s, PARTS * PART_ROWS / other_s))
        peaks.append(peak / 1e6)
    name = f"keep {keep:,} of {PARTS * PART_ROWS:,} scores in {PARTS} parts, exactly"
    yield paired(name, f"polars streaming quantile + filter ({over:+d} rows)", 1.0, "scores/s", pairs)
    yield within(f"memory to {name}", MOST_BYTES / 1e6, "MB", peaks)
    yield stepped(scratch, keep, name)


def stepped(scratch: Path, keep: int, name: str) -> Row:
    """The whole step against the same peer."""
    executor = RayExecutor(Machine(threads=1, workers=2), "local")
    pairs = []
    try:
        step = step_of(scratch, Run(Root(str(scratch / "store")), Root(str(scratch / "run")), executor, Machine()))
        for run in range(RUNS + 1):
            # A budget that has not been asked for before, of scores that were not ranked; the first starts the workers.
            forget(scratch / "store", Score.name)
            sides = partial(Cut("own", keep - run).apply, step), partial(alone, theirs, scratch, keep)
            took_s = {side: seconds(sides[side]) for side in ((0, 1) if run % 2 else (1, 0))}
            pairs.append((PARTS * PART_ROWS / took_s[0], PARTS * PART_ROWS / took_s[1]))
    finally:
        executor.close()
    return paired(f"the step of a run: {name}", "polars streaming quantile + filter", 1.0, "scores/s", pairs[1:])


def forget(store: Path, stage: str) -> None:
    """Have a stage made anew."""
    for folder in (MANIFESTS, SEGMENTS, LOOSE, PARTS_FOLDER):
        shutil.rmtree(store / folder / stage, ignore_errors=True)


def step_of(scratch: Path, run: Run) -> Step:
    """The first step of a recipe over the scores, which a run finds in its store."""
    samples, scores = [], []
    for part in range(PARTS):
        table = pq.read_table(scratch / f"{part:03}.parquet")
        uid_N16 = np.stack([table.column(c).to_numpy() for c in COLUMNS[1:]], axis=1).astype(">u8").view(np.uint8)
        nothing = pa.nulls(PART_ROWS, pa.string())
        samples.append(committed(run.store, pa.table({"uid": fixed(uid_N16), "problem": nothing})))
        kinds = {"score": table.column("score"), "problem": nothing, "detail": nothing}
        scores.append(committed(run.store, pa.table(kinds)))
    pool, seen = (Dataset("pool", name, tuple(parts)) for name, parts in (("samples", samples), ("scores", scores)))
    state = run.map(Begin(), pool, seen)["state"]
    places = given([{"first_unit": part} for part in range(PARTS)])
    return Step(1, "01-cut", 0, run, pool, pool, {}, {"own": seen}, state, places, PARTS * PART_ROWS)


def committed(store: Root, table: pa.Table) -> Part:
    """A table as a part of one file."""
    data = to_parquet(table, internal=True)
    sha256 = hashlib.sha256(data).hexdigest()
    store.write(sha256, data)
    return Part(sha256[:8], (File(sha256, sha256, len(data), table.num_rows),))


def alone(work: Callable[[Path, int], int], folder: Path, keep: int) -> tuple[float, int, int]:
    """Seconds, kept rows and peak RSS of one run in a new process; the files of the run before are not there."""
    for written in folder.glob("*.kept"):  # the time to empty them is not the cut's
        written.unlink()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(timed, work, folder, keep).result()


def timed(work: Callable[[Path, int], int], folder: Path, keep: int) -> tuple[float, int, int]:
    """Run in that process."""
    kept: list[int] = []
    took = seconds(lambda: kept.append(work(folder, keep)))
    return took, kept[0], peak_rss_bytes()


def ours(folder: Path, keep: int) -> int:
    """Histograms, the few rows that are left, then the kept rows of each part; a thread for each core."""
    cut = exact.start(np.array([keep]), value_bits=32)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while cut.undecided > SORTED_ROWS:
            cut = exact.refine(cut, exact.merge(pool.map(partial(counted, folder, cut), range(PARTS))))
        groups, keys = zip(*pool.map(partial(undecided, folder, cut), range(PARTS)), strict=True)
        cut = exact.settle(cut, np.concatenate(groups), Keys.join(keys))
        return sum(pool.map(partial(filtered, folder, cut), range(PARTS)))


def counted(folder: Path, cut: exact.Cut, unit: int) -> Counts:
    """A part's histogram, from its scores alone."""
    with pq.ParquetFile(folder / f"{unit:03}.parquet", memory_map=True) as part:
        return exact.histogram(cut, *keys_of(part.read(columns=COLUMNS[:1], use_threads=False), unit, ROW_N))


def undecided(folder: Path, cut: exact.Cut, unit: int) -> tuple[NDArray[np.int32], Keys]:
    """A part's rows that the histograms left."""
    _, group_N, keys = scored(folder, unit, *score_range(cut))
    left = exact.candidates(cut, group_N, keys)
    return group_N[left], keys.take(left)


def filtered(folder: Path, cut: exact.Cut, unit: int) -> int:
    """Write a part's kept rows; how many."""
    rows, group_N, keys = scored(folder, unit, score_range(cut)[0], math.inf)
    kept = rows.select(COLUMNS).filter(exact.taken(cut, group_N, keys))
    kept.write_parquet(folder / f"ours-{unit:03}.kept", compression="uncompressed")
    return len(kept)


def scored(folder: Path, unit: int, least: float, most: float) -> tuple[pl.DataFrame, NDArray[np.int32], Keys]:
    """A part's rows with a score between two; the uids of others are not read."""
    scan = pl.scan_parquet(folder / f"{unit:03}.parquet", row_index_name="row")
    rows = scan.filter(pl.col("score") >= least, pl.col("score") <= most).collect()
    return rows, *keys_of(rows.to_arrow(), unit, rows["row"].to_numpy())


def score_range(cut: exact.Cut) -> tuple[float, float]:
    """The lowest and highest score that the known digits of the last taken key leave."""
    first = int.from_bytes(cut.prefix_KL[0, : cut.value_digits].astype(">u2").tobytes(), "big")
    unknown = max(0, cut.value_digits - int(cut.depth_K[0]))
    last = first | (1 << exact.DIGIT_BITS * unknown) - 1
    most, least = from_ordered_bits(~np.array([first, last], np.uint32)).tolist()
    return least, most


def keys_of(rows: pa.Table, unit: int, row_N: NDArray[np.uint32]) -> tuple[NDArray[np.int32], Keys]:
    """Groups and keys of a part's rows, highest score first; without the uid's columns all are 0."""
    value_N = ~ordered_bits(rows.column("score").to_numpy())
    n = len(value_N)
    none_N = np.broadcast_to(np.uint64(0), n)
    high_N, low_N = (rows.column(c).to_numpy() if c in rows.schema.names else none_N for c in COLUMNS[1:])
    return np.broadcast_to(np.int32(0), n), Keys(value_N, high_N, low_N, np.broadcast_to(np.uint32(unit), n), row_N)


def theirs(folder: Path, keep: int) -> int:
    """Two passes of polars' streaming engine."""
    scan = pl.scan_parquet(folder / "*.parquet")
    share = 1 - keep / (PARTS * PART_ROWS)
    least = scan.select(pl.col("score").quantile(share, "higher")).collect(engine="streaming").item()
    kept = folder / "theirs.kept"
    scan.filter(pl.col("score") >= least).sink_parquet(kept, compression="uncompressed", engine="streaming")
    return int(pl.scan_parquet(kept).select(pl.len()).collect().item())
