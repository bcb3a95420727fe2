"""Exact cuts through a run: a sort of all rows decides, whatever the split into parts and the rows held at once."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import exact
from pipeline.exact import last_value_bits, taken
from pipeline.parts import given as told
from pipeline.quota import Count, cut_of, cut_table, exact_cut, keys_of, ranked
from pipeline.vectors import ordered_bits
from tests import steps


@st.composite
def rankings(draw):
    """Ranked rows with many ties, cut into parts anywhere; quotas; how many rows may be held."""
    n, groups = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    values = rng.choice([-1.0, -0.0, 0.0, 0.5, 0.5 + 2.0**-20, 1e30], n).astype(dtype)
    uid_N = rng.choice(np.array([b"\0" * 15 + b"\1", b"\0" * 8 + b"\xff" * 8, b"\0" * 7 + b"\1" * 9], "S16"), n)
    uid_N = [bytes(u).ljust(16, b"\0") for u in uid_N]
    unit_N = np.sort(rng.integers(0, 3, n))
    row_N = np.arange(n) - np.searchsorted(unit_N, unit_N)
    group_N = rng.integers(0, groups, n)
    bits_N = ordered_bits(values) if draw(st.booleans()) else ~ordered_bits(values)
    table = ranked(np.arange(n), group_N, bits_N, pa.array(uid_N, pa.binary(16)), unit_N, row_N, values)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    quotas = draw(st.lists(st.integers(0, n + 3), min_size=groups, max_size=groups))
    return table, [0, *cuts, n], quotas, draw(st.sampled_from([1, 2, 5, 1000]))


def by_sorting(table, quotas):
    """Rows taken, and each group's last taken bits, by the order that the design names."""
    rows = table.to_pylist()
    order = sorted(range(len(rows)), key=lambda r: tuple(rows[r][name] for name in ("bits", "uid", "unit", "row")))
    found, last = [], {}
    for group, quota in enumerate(quotas):
        mine = [r for r in order if rows[r]["group"] == group][:quota]
        found += mine
        if mine:
            last[group] = rows[mine[-1]]["bits"]
    return sorted(found), last


@pytest.mark.goal("R13")
@settings(max_examples=40)
@given(rankings())
def test_a_cut_equals_a_sort_of_everything(problem):
    table, ends, quotas, gather_rows = problem
    run = steps.memory_run()
    rows = steps.stored(run, [table.slice(a, b - a) for a, b in itertools.pairwise(ends)])
    bits = 8 * table.column("bits").to_numpy().dtype.itemsize
    cut = exact_cut(run, rows, told([{"quota": quotas}]), bits, gather_rows)
    limit = cut_of(run.rows(cut.parts[0]))
    found = []
    for part, first in zip(rows.parts, ends, strict=False):
        piece = run.rows(part).table()
        found += (first + np.flatnonzero(taken(limit, *keys_of(piece)))).tolist()
    expected, last = by_sorting(table, quotas)
    assert found == expected
    value_K, known_K = last_value_bits(limit)
    assert {g: int(v) for g, (v, k) in enumerate(zip(value_K, known_K, strict=True)) if k} == last


@pytest.mark.parametrize("gather_rows", [1, 1000])
def test_quotas_may_come_as_a_table_and_a_cut_tells_how_much_it_takes(gather_rows):
    run = steps.memory_run()
    uid = pa.array([bytes([i]) * 16 for i in range(6)], pa.binary(16))
    group = np.array([0, 1, 0, 1, 0, 1])
    bits = np.array([5, 4, 3, 2, 1, 0], np.uint32)
    rows = steps.stored(run, [ranked(np.arange(6), group, bits, uid, np.zeros(6), np.arange(6))])
    quota = steps.stored(run, [pa.table({"quota": [2, 9]})])
    cut = exact_cut(run, rows, quota, 32, gather_rows)
    assert next(cut.facts()) == {"undecided": 0, "quota": 5}
    assert ("quota_count" in {entry["stage"] for entry in run.times}) == (gather_rows == 1)
    table = run.rows(rows.parts[0]).table()
    assert taken(cut_of(run.rows(cut.parts[0])), *keys_of(table)).tolist() == [False, True, True, True, True, True]


class Noted:
    """Rows of one table (stage.Rows) that note which columns were read."""

    def __init__(self, table):
        self._table, self.read = table, []

    def table(self, columns=None):
        self.read += columns or self._table.column_names
        return self._table.select(columns) if columns else self._table


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_count_reads_what_ties_need_only_when_the_values_are_known(depth):
    uid = pa.array([bytes([i // 2, 0, i] + 13 * [0]) for i in range(6)], pa.binary(16))
    table = ranked(np.arange(6), np.zeros(6), np.ones(6, np.uint32), uid, np.zeros(6), np.arange(6))
    cut = exact.start(np.array([3]), 32)
    for _ in range(depth):
        cut = exact.refine(cut, exact.histogram(cut, *keys_of(table)))
    rows = Noted(table)
    counts = Count().count(rows, Noted(cut_table(cut).tables["cut"])).tables["counts"]
    assert rows.read == ["group", "bits", *(["uid", "unit", "row"] if depth >= 2 else [])]
    assert counts.column("count").to_pylist() == [[6], [6], [2, 2, 2], [1, 1]][depth]


@pytest.mark.parametrize("gather_rows", [1, 1000])
def test_nothing_is_taken_of_nothing(gather_rows):
    run = steps.memory_run()
    none = pa.array([], pa.binary(16))
    rows = ranked(np.empty(0), np.empty(0), np.empty(0, np.uint64), none, np.empty(0), np.empty(0))
    cut = exact_cut(run, steps.stored(run, [rows, rows]), told([{"quota": [3]}]), 64, gather_rows)
    assert next(cut.facts()) == {"undecided": 0, "quota": 0}
