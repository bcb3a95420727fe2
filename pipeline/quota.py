"""Keep the first rows of each group, exactly, over all parts of a pool: ranked rows in, a cut out.

The distributed loop around the kernels of exact.py: some histogram passes while many rows are undecided, then one
sort of the few that are left. Used for global cuts and draws (one group) and for the picks of every cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline import exact
from pipeline.arrow import fixed, unfixed
from pipeline.exact import Counts, Cut, Keys
from pipeline.machine import Machine
from pipeline.parts import Dataset
from pipeline.run import Run
from pipeline.stage import Function, Made, Rows
from pipeline.vectors import uid_words

GATHER_ROWS = 1 << 22
"""Undecided rows that one process sorts: some 200 MB."""

VALUES, TIES = ("group", "bits"), ("uid", "unit", "row")
"""Columns of `ranked` rows that are counted first, and those that only rows of equal value need."""


def ranked(
    at_M: np.ndarray,
    group_M: np.ndarray,
    bits_M: np.ndarray,
    uid_M: pa.Array,
    unit_M: np.ndarray,
    row_M: np.ndarray,
    measure_M: np.ndarray | None = None,
) -> pa.Table:
    """Rows in the form that the stages of this module read.

    Args:
        at_M: position of the row in its part.
        group_M: int32, which quota it counts against.
        bits_M: uint32 or uint64, lower first: vectors.ordered_bits of the value, complemented for highest first.
        uid_M: binary(16).
        unit_M: ordinal of the unit in the pool.
        row_M: ordinal of the row in its unit.
        measure_M: float64, what the decision names as the row's value; None where there is nothing to name.
    """
    measure = pa.nulls(len(at_M), pa.float64()) if measure_M is None else pa.array(measure_M.astype(np.float64))
    return pa.table(
        {
            "at": pa.array(at_M.astype(np.uint32)),
            "group": pa.array(group_M.astype(np.int32)),
            "bits": pa.array(bits_M),
            "uid": uid_M,
            "unit": pa.array(unit_M.astype(np.uint32)),
            "row": pa.array(row_M.astype(np.uint32)),
            "measure": measure,
        }
    )


def keys_of(rows: pa.Table) -> tuple[np.ndarray, Keys]:
    """Groups and keys of ranked rows; where the columns TIES were not read, all words but the value are 0."""
    group_M, bits_M = rows.column("group").to_numpy(), rows.column("bits").to_numpy()
    if "uid" not in rows.column_names:
        word_M = np.broadcast_to(np.uint64(0), len(bits_M))
        ordinal_M = np.broadcast_to(np.uint32(0), len(bits_M))
        return group_M, Keys(bits_M, word_M, word_M, ordinal_M, ordinal_M)
    high_M, low_M = uid_words(unfixed(rows.column("uid"), np.uint8))
    return group_M, Keys(bits_M, high_M, low_M, rows.column("unit").to_numpy(), rows.column("row").to_numpy())


def exact_cut(run: Run, rows: Dataset, quota: Dataset, value_bits: int, gather_rows: int = GATHER_ROWS) -> Dataset:
    """Find the last row that each group's quota takes.

    Args:
        run: does the passes.
        rows: `ranked` rows of every part.
        quota: one part, with a column `quota` or given as {"quota": [...]}; int64, one for each group.
        value_bits: 32 or 64, as the rows' `bits` have.
        gather_rows: as GATHER_ROWS; never changes the result.

    Returns:
        One part that `cut_of` reads.
    """
    cut = run.map(Start(value_bits), quota)["cut"]
    undecided = rows.num_rows
    while undecided > gather_rows:
        counts = run.map(Count(), rows, cut.spread(len(rows)))["counts"]
        cut = run.map(Refine(), counts.grouped(len(counts)), cut)["cut"]
        undecided = next(cut.facts())["undecided"]
    left = run.map(Gather(), rows, cut.spread(len(rows)))["undecided"]
    return run.map(Settle(), left.grouped(len(left)), cut)["cut"]


def cut_table(cut: Cut) -> Made:
    """A cut as the output of a stage."""
    table = pa.table(
        {
            "quota": pa.array(cut.quota_K),
            "prefix": fixed(cut.prefix_KL),
            "depth": pa.array(cut.depth_K),
            "left": pa.array(cut.left_K),
            "inside": pa.array(cut.inside_K),
            "open": pa.array(cut.open_K),
        }
    )
    return Made({"cut": table}, {"undecided": cut.undecided, "quota": int(cut.quota_K.sum())})


def cut_of(rows: Rows) -> Cut:
    """The inverse of `cut_table`."""
    table = rows.table()
    numbers = (table.column(name).to_numpy() for name in ("quota", "depth", "left", "inside"))
    quota_K, depth_K, left_K, inside_K = numbers
    open_K = table.column("open").to_numpy(zero_copy_only=False)
    return Cut(quota_K, unfixed(table.column("prefix"), np.uint16), depth_K, left_K, inside_K, open_K)


@dataclass(frozen=True)
class Start:
    """The cut before the first pass."""

    value_bits: int

    name: ClassVar[str] = "quota_start"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("cut",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.start

    def start(self, quota: Rows) -> Made:
        given: Any = quota.given.get("quota")
        quota_K = quota.table(["quota"]).column("quota").to_numpy() if given is None else np.array(given, np.int64)
        return cut_table(exact.start(quota_K, self.value_bits))


@dataclass(frozen=True)
class Count:
    """Histogram of the next digit of a part's undecided rows."""

    name: ClassVar[str] = "quota_count"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("counts",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.count

    def count(self, rows: Rows, cut: Rows) -> Made:
        found = cut_of(cut)
        ties = TIES if found.depth >= found.value_digits else ()
        counts = exact.histogram(found, *keys_of(rows.table([*VALUES, *ties])))
        columns = {"group": counts.group, "digit": counts.digit, "count": counts.count}
        return Made({"counts": pa.table({name: pa.array(values) for name, values in columns.items()})})


@dataclass(frozen=True)
class Refine:
    """One more digit of every open group's last row, from the histograms of all parts."""

    name: ClassVar[str] = "quota_refine"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("cut",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.refine

    def refine(self, counts: Rows, cut: Rows) -> Made:
        merged = exact.merge([Counts(np.empty(0, np.int32), np.empty(0, np.uint16), np.empty(0, np.int64))])
        for piece in counts.pieces():
            columns = (piece.column(name).to_numpy() for name in ("group", "digit", "count"))
            merged = exact.merge([merged, Counts(*columns)])
        return cut_table(exact.refine(cut_of(cut), merged))


@dataclass(frozen=True)
class Gather:
    """The rows of a part that are still undecided."""

    name: ClassVar[str] = "quota_gather"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("undecided",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.gather

    def gather(self, rows: Rows, cut: Rows) -> Made:
        table = rows.table([*VALUES, *TIES])
        return Made({"undecided": table.take(pa.array(exact.candidates(cut_of(cut), *keys_of(table))))})


@dataclass(frozen=True)
class Settle:
    """The final cut, by sorting the undecided rows of all parts."""

    name: ClassVar[str] = "quota_settle"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("cut",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.settle

    def settle(self, undecided: Rows, cut: Rows) -> Made:
        return cut_table(exact.settle(cut_of(cut), *keys_of(undecided.table())))
