"""Exact cuts: by hand, against a sort of everything for any split into parts, and the refusal of wrong counts."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import exact, vectors


def keys_of(value, uid=None, unit=None, row=None):
    """Keys with small uids, so that they tie often; the row number tells equal ones apart."""
    n = len(value)
    word = np.array(uid if uid is not None else [0] * n, np.uint64)
    return exact.Keys(
        value=vectors.ordered_bits(np.array(value)),
        uid_high=word >> np.uint64(1),
        uid_low=word << np.uint64(63),
        unit=np.array(unit if unit is not None else [0] * n, np.uint32),
        row=np.array(row if row is not None else range(n), np.uint32),
    )


def rounds(quota_K, group_N, keys, parts, limit):
    """The distributed loop, as the driver runs it: parts are lists of row indices."""
    cut = exact.start(np.array(quota_K, np.int64), 8 * keys.value.dtype.itemsize)
    held = [(group_N[rows], keys.take(rows)) for rows in parts]
    while cut.undecided > limit:
        cut = exact.refine(cut, exact.merge(exact.histogram(cut, *part) for part in held))
    few = [exact.candidates(cut, *part) for part in held]
    cut = exact.settle(
        cut,
        np.concatenate([group[rows] for (group, _), rows in zip(held, few, strict=True)]),
        exact.Keys.join([part.take(rows) for (_, part), rows in zip(held, few, strict=True)]),
    )
    taken_N = np.zeros(len(group_N), bool)
    for rows, part in zip(parts, held, strict=True):
        taken_N[rows] = exact.taken(cut, *part)
    return cut, taken_N


def by_sorting(quota_K, group_N, keys):
    taken_N = np.zeros(len(group_N), bool)
    last_K = {}
    order_N = np.lexsort(keys.words[::-1])
    for group, quota in enumerate(quota_K):
        first = order_N[group_N[order_N] == group][:quota]
        taken_N[first] = True
        if len(first):
            last_K[group] = int(keys.value[first[-1]])
    return taken_N, last_K


@st.composite
def problems(draw):
    n = draw(st.integers(1, 60))
    groups = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    some = draw(st.sampled_from([[0.0, -0.0, 1.0], [0.25, 0.25 + 2**-20, -3.0, 7.5, 1e-40]]))
    value = draw(st.lists(st.sampled_from(some), min_size=n, max_size=n))
    uid = draw(st.lists(st.integers(0, 7), min_size=n, max_size=n))
    unit = draw(st.lists(st.sampled_from([0, 1, 70000]), min_size=n, max_size=n))
    group_N = np.array(draw(st.lists(st.integers(0, groups - 1), min_size=n, max_size=n)), np.int32)
    quota_K = draw(st.lists(st.integers(0, n + 2), min_size=groups, max_size=groups))
    part_N = np.array(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    parts = [np.flatnonzero(part_N == part) for part in draw(st.permutations(range(4)))]
    return quota_K, group_N, keys_of(np.array(value, dtype), uid, unit), parts, draw(st.integers(0, n))


@given(problems())
def test_any_split_into_parts_and_any_limit_take_what_a_sort_of_everything_takes(problem):
    quota_K, group_N, keys, parts, limit = problem
    cut, taken_N = rounds(quota_K, group_N, keys, parts, limit)
    expected_N, last_K = by_sorting(quota_K, group_N, keys)
    assert taken_N.tolist() == expected_N.tolist()
    assert cut.quota_K.tolist() == np.bincount(group_N[expected_N], minlength=len(quota_K)).tolist()
    bits_K, known_K = exact.last_value_bits(cut)
    assert {int(group): int(bits_K[group]) for group in np.flatnonzero(known_K)} == last_K
    assert not bits_K[~known_K].any()
    assert bits_K.dtype == keys.value.dtype


@pytest.mark.goal("R13")
@pytest.mark.parametrize(
    ("rows", "parts"), [(100_000, 50), pytest.param(10_000_000, 1000, marks=[pytest.mark.campaign, pytest.mark.slow])]
)
def test_a_cut_is_that_of_numpys_partition_whatever_the_order_of_the_parts(rows, parts, record_property):
    rng = np.random.default_rng(1)
    value_N = rng.normal(size=rows).astype(np.float32).round(4)
    odd = np.array([0.0, -0.0, 1e-45, -1e-45, 1.1e-38, -1.1e-38, 3.4e38, -3.4e38], np.float32)
    value_N[rng.integers(rows, size=rows // 10)] = np.resize(odd, rows // 10)
    uid_N = rng.permutation(rows).astype(np.uint64)
    keys, group_N = keys_of(value_N, uid_N), np.zeros(rows, np.int32)
    quota = rows // 2  # among the zeros of both signs
    size = rows // parts
    cuts = []
    for _ in range(2):
        slices = [slice(first, first + size) for first in rng.permutation(parts) * size]
        cut, taken_N = rounds([quota], group_N, keys, slices, limit=1000)
        cuts.append([getattr(cut, field.name).tobytes() for field in fields(cut)])
    assert cuts[0] == cuts[1]
    last = np.partition(value_N, quota - 1)[quota - 1]
    assert vectors.from_ordered_bits(exact.last_value_bits(cut)[0])[0] == last
    assert taken_N.sum() == quota
    assert taken_N[value_N < last].all() and not taken_N[value_N > last].any()
    tied_N = value_N == last
    assert uid_N[tied_N & taken_N].max() < uid_N[tied_N & ~taken_N].min()
    record_property("figure", f"{rows:,} values, {parts:,} parts in 2 orders: numpy's partition; {tied_N.sum():,} ties")


def test_worked_by_hand():
    keys = keys_of(np.array([0.5, 0.1, 0.5, 0.9, 0.5], np.float32), uid=[3, 9, 1, 0, 1])
    group_N = np.zeros(5, np.int32)
    for quota, rows in [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (4, [0, 1, 2, 4]), (9, [0, 1, 2, 3, 4])]:
        cut, taken_N = rounds([quota], group_N, keys, [np.arange(5)], limit=0)
        assert np.flatnonzero(taken_N).tolist() == rows
        bits_K, known_K = exact.last_value_bits(cut)
        assert known_K.tolist() == [quota > 0]
        if rows:
            assert vectors.from_ordered_bits(bits_K)[0] == max(np.float32([0.5, 0.1, 0.5, 0.9, 0.5])[rows])


def test_unit_and_then_row_decide_between_equal_uids():
    keys = keys_of(np.zeros(4, np.float32), unit=[70000, 1, 1, 0], row=[0, 66000, 3, 5])
    taken = [rounds([q], np.zeros(4, np.int32), keys, [np.arange(4)], 0)[1].tolist() for q in (1, 2, 3)]
    assert taken == [[False, False, False, True], [False, False, True, True], [False, True, True, True]]


def test_a_key_is_sixteen_digits_of_its_words():
    keys = exact.Keys(
        value=np.array([0x0000000100020003], np.uint64),
        uid_high=np.array([0x0004000500060007], np.uint64),
        uid_low=np.array([0x00080009000A000B], np.uint64),
        unit=np.array([0x000C000D], np.uint32),
        row=np.array([0x000E000F], np.uint32),
    )
    assert [int(keys.digit(place)[0]) for place in range(16)] == list(range(16))
    with pytest.raises(IndexError, match="a key has no more digits"):
        keys.digit(16)


def test_a_group_without_rows_takes_nothing():
    keys = keys_of(np.array([1.0], np.float32))
    cut, taken_N = rounds([2, 2], np.array([1], np.int32), keys, [np.array([0])], limit=0)
    assert (cut.quota_K.tolist(), taken_N.tolist()) == ([0, 1], [True])
    assert exact.last_value_bits(cut)[1].tolist() == [False, True]


def test_many_rows_of_one_group_are_counted_by_digit():
    value_N = np.random.default_rng(0).normal(size=20_000).astype(np.float32).round(2)
    group_N = np.zeros(len(value_N), np.int32)
    keys = keys_of(value_N)
    cut, taken_N = rounds([7_000], group_N, keys, np.array_split(np.arange(len(value_N)), 3), limit=10)
    assert np.array_equal(taken_N, by_sorting([7_000], group_N, keys)[0])
    assert cut.undecided == 0


def test_an_only_group_is_cut_as_one_among_several():
    value_N = np.random.default_rng(1).normal(size=500).astype(np.float32).round(1)
    keys, parts = keys_of(value_N, uid=np.arange(500) % 7), np.array_split(np.arange(500), 4)
    for quota in (0, 1, 250, 500):
        for limit in (0, 1000):
            alone = rounds([quota], np.zeros(500, np.int32), keys, parts, limit)
            among = rounds([9, quota, 9], np.ones(500, np.int32), keys, parts, limit)
            assert alone[1].tolist() == among[1].tolist()
            assert alone[1].sum() == quota
            assert alone[0].prefix_KL[0].tolist() == among[0].prefix_KL[1].tolist()


def test_the_first_digits_are_counted_without_the_words_for_ties():
    value_N = np.random.default_rng(2).normal(size=100).astype(np.float32)
    keys, group_N = keys_of(value_N, uid=range(100)), np.zeros(100, np.int32)
    none = np.broadcast_to(np.uint64(0), 100)
    values = exact.Keys(keys.value, none, none, none.astype(np.uint32), none.astype(np.uint32))
    cut = exact.start(np.array([40]), 32)
    while cut.undecided:
        counts = exact.histogram(cut, group_N, values)
        assert counts.count.tolist() == exact.histogram(cut, group_N, keys).count.tolist()
        cut = exact.refine(cut, counts)
    assert cut.depth_K.tolist() == [2]  # no two values are equal
    assert exact.taken(cut, group_N, keys).tolist() == by_sorting([40], group_N, keys)[0].tolist()


def test_a_group_that_takes_nothing_is_not_counted():
    keys, group_N = keys_of(np.ones(4, np.float32)), np.array([0, 1, 1, 2], np.int32)
    counts = exact.histogram(exact.start(np.array([0, 1, 1]), 32), group_N, keys)
    assert (counts.group.tolist(), counts.count.tolist()) == ([1, 2], [2, 1])


def test_a_cut_is_plain_arrays_and_a_round_leaves_the_one_before_as_it_was():
    keys = keys_of(np.array([1.0, 2.0, 3.0], np.float32))
    group_N = np.zeros(3, np.int32)
    before = exact.start(np.array([2]), 32)
    copy = {field.name: getattr(before, field.name).copy() for field in fields(before)}
    after = exact.refine(before, exact.histogram(before, group_N, keys))
    exact.settle(before, group_N, keys)
    assert all(np.array_equal(getattr(before, name), array) for name, array in copy.items())
    assert exact.taken(exact.settle(before, group_N, keys), group_N, keys).tolist() == [True, True, False]
    assert (before.undecided, after.undecided) == (exact.UNCOUNTED, 1)


def test_a_missing_part_is_refused_by_the_counts():
    keys = keys_of(np.zeros(4, np.float32))
    group_N = np.zeros(4, np.int32)
    cut = exact.refine(exact.start(np.array([2]), 32), exact.histogram(exact.start(np.array([2]), 32), group_N, keys))
    with pytest.raises(ValueError, match="counted 3 rows inside the cut, expected 4: a part is missing"):
        exact.refine(cut, exact.histogram(cut, group_N[:3], keys.take(np.arange(3))))


def test_a_missing_part_is_refused_by_the_sort():
    keys = keys_of(np.zeros(4, np.float32))
    group_N = np.zeros(4, np.int32)
    cut = exact.refine(exact.start(np.array([2]), 32), exact.histogram(exact.start(np.array([2]), 32), group_N, keys))
    with pytest.raises(ValueError, match="got 3 undecided rows, expected 4: a part is missing"):
        exact.settle(cut, group_N[:3], keys.take(np.arange(3)))


def test_two_rows_with_one_key_are_refused():
    keys = keys_of(np.zeros(2, np.float32), row=[5, 5])
    with pytest.raises(ValueError, match="two rows have the same value, uid, unit and row"):
        rounds([1], np.zeros(2, np.int32), keys, [np.arange(2)], limit=0)


def test_an_open_cut_decides_nothing():
    keys = keys_of(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="1 groups of the cut are still open"):
        exact.taken(exact.start(np.array([1, 0]), 32), np.zeros(2, np.int32), keys)


def test_a_sort_right_after_the_start_takes_no_more_than_there_are():
    keys = keys_of(np.array([3.0, 1.0, 2.0], np.float32))
    group_N = np.array([0, 2, 2], np.int32)
    cut = exact.settle(exact.start(np.array([5, 4, 1]), 32), group_N, keys)
    assert (cut.quota_K.tolist(), cut.undecided) == ([1, 0, 1], 0)
    assert exact.taken(cut, group_N, keys).tolist() == [True, True, False]
    assert exact.last_value_bits(cut)[1].tolist() == [True, False, True]
