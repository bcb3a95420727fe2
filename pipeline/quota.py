"""Keep the first rows of each group, exactly, over all parts of a pool: ranked rows in, a cut out.

The distributed loop around the kernels of exact.py: some histogram passes while many rows are undecided, then one
sort of the few that are left. Used for global cuts and draws (one group) and for the picks of every cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline import exact
from pipeline.arrow import fixed, unfixed, valid
from pipeline.exact import Counts, Cut, Keys
from pipeline.machine import Machine
from pipeline.parts import Dataset
from pipeline.run import Run
from pipeline.stage import Function, Made, Rows
from pipeline.step import places_in
from pipeline.vectors import uid_words

GATHER_ROWS = 1 << 22
"""Undecided rows that one process sorts: some 200 MB."""

FEW_ROWS = 64
"""Undecided rows above which one more count of the values, of 4 or 8 bytes a row, costs less than to look up uids."""


def ranked(bits_N: np.ndarray, in_N: np.ndarray, group_N: np.ndarray | None = None) -> pa.Table:
    """The rows of a part in the form that the stages of this module read: one for each of its samples.

    Args:
        bits_N: uint32 or uint64, lower first: vectors.ordered_bits of the value, complemented for highest first.
        in_N: bool, which rows count; the others are never taken.
        group_N: int32, which quota each counts against; None where there is one.
    """
    columns = {"bits": pa.array(bits_N, mask=None if in_N.all() else ~in_N)}
    if group_N is not None:
        columns["group"] = pa.array(group_N.astype(np.int32))
    return pa.table(columns)


@dataclass(frozen=True)
class Ranks:
    """The rows of a part that count.

    Attributes:
        at: int64 (M,), position in the part.
        group: int32 (M,).
        bits: uint32 or uint64 (M,).
        rows: of the part, counted or not.
    """

    at: np.ndarray
    group: np.ndarray
    bits: np.ndarray
    rows: int

    @staticmethod
    def of(table: pa.Table) -> Ranks:
        """The rows of a `ranked` table."""
        column = table.column("bits").combine_chunks()
        at_M = np.flatnonzero(valid(column)) if column.null_count else np.arange(len(column))
        bits_M = column.drop_null().to_numpy()
        group_M = np.broadcast_to(np.int32(0), len(at_M))
        if "group" in table.column_names:
            group_M = table.column("group").to_numpy()[at_M]
        return Ranks(at_M, group_M, bits_M, table.num_rows)

    def take(self, some: np.ndarray) -> Ranks:
        return Ranks(self.at[some], self.group[some], self.bits[some], self.rows)

    @property
    def bare(self) -> Keys:
        """Keys of which only the value is right."""
        word_M = np.broadcast_to(np.uint64(0), len(self.at))
        ordinal_M = np.broadcast_to(np.uint32(0), len(self.at))
        return Keys(self.bits, word_M, word_M, ordinal_M, ordinal_M)

    def keys(self, samples: Rows, place: Rows) -> Keys:
        """Whole keys; for few rows, since the uids lie among all else that is known of the samples."""
        unit_M, row_M = places_in(samples, place, self.at)
        uid = samples.table(["uid"]).column("uid").take(pa.array(self.at))
        return Keys(self.bits, *uid_words(unfixed(uid, np.uint8)), unit_M, row_M)

    def last(self, cut: Cut) -> np.ndarray:
        """Positions here, int64, of the rows that have the value of the last one that a finished cut takes."""
        value_K, known_K = exact.last_value_bits(cut)
        known = exact.of_groups(self.group, known_K)
        return np.flatnonzero((self.bits == exact.of_groups(self.group, value_K)) & known)

    def near(self, cut: Cut) -> Ranks:
        """The undecided rows, as far as their value tells."""
        known = replace(cut, depth_K=np.minimum(cut.depth_K, cut.value_digits))
        return self.take(exact.candidates(known, self.group, self.bare))


def taken(cut: Cut, ranks: Ranks, left: Rows, samples: Rows, place: Rows) -> np.ndarray:
    """Which rows of a part a finished cut takes: bool (N,).

    Args:
        cut: with no open group.
        ranks: of the part.
        left: of the part, as `exact_cut` gives it; read only where rows have the value of the last one taken.
        samples: the same part of schema.SAMPLES; read only where such rows are too many to be in `left`.
        place: of the part (step.places_in).
    """
    taken_M = exact.taken(cut, ranks.group, ranks.bare)
    last = ranks.last(cut)
    tied = last[(cut.depth_K > cut.value_digits)[ranks.group[last]]]
    if len(tied):
        some = ranks.take(tied)
        known = left.table()
        if np.isin(some.at, at_L := known.column("at").to_numpy(), assume_unique=True).all():
            keys = keys_of(known)[1].take(np.searchsorted(at_L, some.at))
        else:
            keys = some.keys(samples, place)
        taken_M[tied] = exact.taken(cut, some.group, keys)
    taken_N = np.zeros(ranks.rows, bool)
    taken_N[ranks.at] = taken_M
    return taken_N


def exact_cut(
    run: Run,
    rows: Dataset,
    samples: Dataset,
    places: Dataset,
    quota: Dataset,
    value_bits: int,
    gather_rows: int = GATHER_ROWS,
) -> tuple[Dataset, Dataset]:
    """Find the last row that each group's quota takes.

    Args:
        run: does the passes.
        rows: `ranked` rows of every part.
        samples, places: of the same parts.
        quota: one part, with a column `quota` or given as {"quota": [...]}; int64, one for each group.
        value_bits: 32 or 64, as the rows' `bits` have.
        gather_rows: as GATHER_ROWS; never changes the result.

    Returns:
        One part that `cut_of` reads; and of every part the rows that were sorted, with their position and their key.
    """
    cut = run.map(Start(value_bits), quota)["cut"]
    undecided, depth = rows.num_rows, 0
    while undecided > (gather_rows if depth >= value_bits // exact.DIGIT_BITS else min(gather_rows, FEW_ROWS)):
        counts = run.map(Count(), rows, samples, places, cut.spread(len(rows)))["counts"]
        cut = run.map(Refine(), counts.grouped(len(counts)), cut)["cut"]
        undecided, depth = next(cut.facts())["undecided"], depth + 1
    left = run.map(Gather(), rows, samples, places, cut.spread(len(rows)))["undecided"]
    return run.map(Settle(), left.grouped(len(left)), cut)["cut"], left


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
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("counts",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.count

    def count(self, rows: Rows, samples: Rows, place: Rows, cut: Rows) -> Made:
        found, ranks = cut_of(cut), Ranks.of(rows.table())
        if found.depth < found.value_digits:
            counts = exact.histogram(found, ranks.group, ranks.bare)
        else:
            near = ranks.near(found)
            keys = near.keys(samples, place) if len(near.at) else near.bare
            counts = exact.histogram(found, near.group, keys)
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
    version: ClassVar[int] = 3
    outputs: ClassVar[tuple[str, ...]] = ("undecided",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.gather

    def gather(self, rows: Rows, samples: Rows, place: Rows, cut: Rows) -> Made:
        found = cut_of(cut)
        near = Ranks.of(rows.table()).near(found)
        keys = near.keys(samples, place) if len(near.at) else near.bare
        table = key_table(near.group, keys).append_column("at", pa.array(near.at))
        return Made({"undecided": table.take(exact.candidates(found, near.group, keys))})


@dataclass(frozen=True)
class Settle:
    """The final cut, by sorting the undecided rows of all parts."""

    name: ClassVar[str] = "quota_settle"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("cut",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.settle

    def settle(self, undecided: Rows, cut: Rows) -> Made:
        return cut_table(exact.settle(cut_of(cut), *keys_of(undecided.table())))


def key_table(group_M: np.ndarray, keys: Keys) -> pa.Table:
    """Groups and whole keys as a table."""
    return pa.table({"group": group_M, **{f.name: getattr(keys, f.name) for f in fields(keys)}})


def keys_of(table: pa.Table) -> tuple[np.ndarray, Keys]:
    """The inverse of `key_table`."""
    return table.column("group").to_numpy(), Keys(*(table.column(f.name).to_numpy() for f in fields(Keys)))
