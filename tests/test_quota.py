"""Exact cuts through a run: a sort of all rows decides, whatever the split into parts and the rows held at once."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import exact
from pipeline.exact import last_value_bits
from pipeline.parts import given as told
from pipeline.quota import Count, Gather, Ranks, cut_of, cut_table, exact_cut, keys_of, ranked, taken
from pipeline.vectors import ordered_bits
from tests import steps
from tests.steps import Told


@st.composite
def rankings(draw):
    """Ranked rows with many ties in units anywhere, in parts of so many units; quotas; how many rows may be held."""
    n, groups = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    values = rng.choice([-1.0, -0.0, 0.0, 0.5, 0.5 + 2.0**-20, 1e30], n).astype(dtype)
    uid_N = rng.choice(np.array([b"\0" * 15 + b"\1", b"\0" * 8 + b"\xff" * 8, b"\0" * 7 + b"\1" * 9], "S16"), n)
    uid_N = [bytes(u).ljust(16, b"\0") for u in uid_N]
    group_N = rng.integers(0, groups, n).astype(np.int32)
    bits_N = ordered_bits(values) if draw(st.booleans()) else ~ordered_bits(values)
    in_N = rng.random(n) < draw(st.sampled_from([0.5, 1.0]))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    quotas = draw(st.lists(st.integers(0, n + 3), min_size=groups, max_size=groups))
    rows = (bits_N, in_N, group_N, uid_N)
    return rows, [0, *cuts, n], draw(st.integers(1, 3)), quotas, draw(st.sampled_from([1, 2, 5, 1000]))


def by_sorting(bits_N, in_N, group_N, uid_N, quotas):
    """Rows taken, and each group's last taken bits; the order of units and rows is the order of all rows."""
    order = sorted(np.flatnonzero(in_N).tolist(), key=lambda r: (bits_N[r], uid_N[r], r))
    found, last = [], {}
    for group, quota in enumerate(quotas):
        mine = [r for r in order if group_N[r] == group][:quota]
        found += mine
        if mine:
            last[group] = int(bits_N[mine[-1]])
    return sorted(found), last


def stored(run, rows, ends, units):
    """The rows as datasets of `units` units a part: ranked, samples, places; and the first row of each part."""
    bits_N, in_N, group_N, uid_N = rows
    bounds = list(itertools.pairwise(ends))
    samples = steps.stored(run, [steps.samples_of(*({"uid": u} for u in uid_N[a:b])) for a, b in bounds]).grouped(units)
    parts = [(mine[0][0], mine[-1][1]) for mine in (bounds[i : i + units] for i in range(0, len(bounds), units))]
    one_group = not group_N.any()
    tables = [ranked(bits_N[a:b], in_N[a:b], None if one_group else group_N[a:b]) for a, b in parts]
    places = told([{"first_unit": i * units} for i in range(len(parts))])
    return steps.stored(run, tables), samples, places, [a for a, _ in parts]


def all_taken(run, cut, left, rows, samples, places, firsts):
    limit = cut_of(run.rows(cut.parts[0]))
    found = []
    for at, first in enumerate(firsts):
        mine, *more = (run.rows(dataset.parts[at]) for dataset in (rows, left, samples, places))
        found += (first + np.flatnonzero(taken(limit, Ranks.of(mine.table()), *more))).tolist()
    return found


@pytest.mark.goal("R13")
@settings(max_examples=60)
@given(rankings())
def test_a_cut_equals_a_sort_of_everything(problem):
    rows, ends, units, quotas, gather_rows = problem
    run = steps.memory_run()
    *datasets, firsts = stored(run, rows, ends, units)
    bits = 8 * rows[0].dtype.itemsize
    cut, left = exact_cut(run, *datasets, told([{"quota": quotas}]), bits, gather_rows)
    expected, last = by_sorting(*rows, quotas)
    assert all_taken(run, cut, left, *datasets, firsts) == expected
    value_K, known_K = last_value_bits(cut_of(run.rows(cut.parts[0])))
    assert {g: int(v) for g, (v, k) in enumerate(zip(value_K, known_K, strict=True)) if k} == last


@pytest.mark.parametrize("gather_rows", [1, 1000])
def test_quotas_may_come_as_a_table_and_a_cut_tells_how_much_it_takes(gather_rows):
    run = steps.memory_run()
    group_N = np.array([0, 1, 0, 1, 0, 1], np.int32)
    rows = (np.array([5, 4, 3, 2, 1, 0], np.uint32), np.ones(6, bool), group_N, [bytes([i]) * 16 for i in range(6)])
    *datasets, firsts = stored(run, rows, [0, 6], 1)
    cut, left = exact_cut(run, *datasets, steps.stored(run, [pa.table({"quota": [2, 9]})]), 32, gather_rows)
    assert next(cut.facts()) == {"undecided": 0, "quota": 5}
    assert ("quota_count" in {entry["stage"] for entry in run.times}) == (gather_rows == 1)
    assert all_taken(run, cut, left, *datasets, firsts) == [1, 2, 3, 4, 5]


class Unread(Told):
    """Samples that note whether they were read."""

    reads = 0

    def table(self, columns=None):
        self.reads += 1
        return super().table(columns)


def test_uids_are_read_only_where_values_are_equal_to_the_last_one():
    bits_N, in_N = np.array([7, 1, 7, 9, 7, 0], np.uint32), np.array([1, 1, 1, 1, 1, 0], bool)
    rows, place = Told(ranked(bits_N, in_N)), Told(given={"first_unit": 3})
    samples = Unread(steps.samples_of(*({"uid": bytes([9 - i]) * 16} for i in range(6))))
    cut = exact.start(np.array([3]), 32)
    for _ in range(2):
        told_cut = Told(cut_table(cut).tables["cut"])
        counts = Count().count(rows, samples, place, told_cut).tables["counts"]
        columns = (counts.column(name).to_numpy() for name in ("group", "digit", "count"))
        cut = exact.refine(cut, exact.Counts(*columns))
    assert samples.reads == 0
    told_cut = Told(cut_table(cut).tables["cut"])
    counts = Count().count(rows, samples, place, told_cut).tables["counts"]
    assert (samples.reads, counts.column("count").to_pylist()) == (1, [1, 1, 1])
    left = Gather().gather(rows, samples, place, told_cut).tables["undecided"]
    assert (samples.reads, left.column("unit").to_pylist(), left.column("row").to_pylist()) == (2, [3] * 3, [0, 2, 4])
    done = exact.settle(cut, *keys_of(left))
    ranks = Ranks.of(rows.table())
    assert taken(done, ranks, Told(left), samples, place).tolist() == [False, True, True, False, True, False]
    assert samples.reads == 2
    few = Told(left.slice(1))  # as after counts that closed the group before its rows were few
    assert taken(done, ranks, few, samples, place).tolist() == [False, True, True, False, True, False]
    assert samples.reads == 3
    elsewhere = Unread(*samples.tables)
    others = ranked(np.array([8, 6], np.uint32), np.ones(2, bool))
    none = Gather().gather(Told(others), elsewhere, place, told_cut).tables["undecided"]
    assert none.num_rows == 0
    assert taken(done, Ranks.of(others), Told(none), elsewhere, place).tolist() == [False, True]
    assert elsewhere.reads == 0


@pytest.mark.parametrize("gather_rows", [1, 1000])
def test_nothing_is_taken_of_nothing(gather_rows):
    run = steps.memory_run()
    nothing = (np.empty(0, np.uint64), np.empty(0, bool), np.empty(0, np.int32), [])
    *datasets, firsts = stored(run, nothing, [0, 0, 0], 1)
    cut, left = exact_cut(run, *datasets, told([{"quota": [3]}]), 64, gather_rows)
    assert next(cut.facts()) == {"undecided": 0, "quota": 0}
    assert all_taken(run, cut, left, *datasets, firsts) == []
