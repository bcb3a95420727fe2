"""The first rows of each group in a total order, for rows spread over many parts: keys in, a cut out.

A row's key is (value, uid, unit, row), lower first, read as 16-bit digits from the most significant on. One histogram
per part and digit, summed over the parts, fixes one more digit of each group's last taken key; as soon as few enough
rows are undecided, they are gathered and sorted instead. Memory is a cut plus one part; no order of parts, no split
into parts and no limit on the gathered rows changes the answer.

    cut = start(quota_K, value_bits=32)
    while cut.undecided > limit:                     # the rows are not counted before the first round
        cut = refine(cut, merge(histogram(cut, group_N, keys) for each part))
    cut = settle(cut, those rows of each part that are among its `candidates`)
    taken(cut, group_N, keys)                        # on any part, from the cut alone
"""

import sys
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.vectors import Bools, Uint64s

DIGIT_BITS = 16
TIE_DIGITS = 12  # uid 8, unit 2, row 2
UNCOUNTED = sys.maxsize


@dataclass(frozen=True)
class Keys:
    """The total order's key of each row; digits are made only when asked for.

    Attributes:
        value: uint32 or uint64, shape (N,): `vectors.ordered_bits` of the value, complemented for highest first.
        uid_high, uid_low: uint64, shape (N,): `vectors.uid_words`.
        unit: uint32, shape (N,): the unit's ordinal in the pool.
        row: uint32, shape (N,): the row's ordinal in its unit.
    """

    value: NDArray[np.unsignedinteger]
    uid_high: Uint64s
    uid_low: Uint64s
    unit: NDArray[np.uint32]
    row: NDArray[np.uint32]

    @property
    def words(self) -> tuple[NDArray[np.unsignedinteger], ...]:
        """The key's parts, most significant first."""
        return self.value, self.uid_high, self.uid_low, self.unit, self.row

    def digit(self, place: int) -> NDArray[np.uint16]:
        """Digit at `place`, 0 the most significant: uint16, shape (N,)."""
        for word in self.words:
            digits = word.dtype.itemsize // 2
            if place < digits:
                return (word >> word.dtype.type(DIGIT_BITS * (digits - 1 - place))).astype(np.uint16)
            place -= digits
        raise IndexError("a key has no more digits")

    def take(self, rows: NDArray[np.integer] | Bools) -> "Keys":
        """The keys at an index array or a mask."""
        return Keys(*(word[rows] for word in self.words))

    @staticmethod
    def join(parts: Sequence["Keys"]) -> "Keys":
        """The keys of several parts as one; at least one part."""
        return Keys(*(np.concatenate(words) for words in zip(*(part.words for part in parts), strict=True)))


@dataclass(frozen=True)
class Counts:
    """How many rows have each next digit, sorted by (group, digit), without zeros: int32, uint16, int64, shape (C,)."""

    group: NDArray[np.int32]
    digit: NDArray[np.uint16]
    count: NDArray[np.int64]


@dataclass(frozen=True)
class Cut:
    """What is known of each group's last taken key: all rows up to the prefix are taken, or the group is still open.

    Attributes:
        quota_K: int64: rows to take; at most the group's size once it is counted.
        prefix_KL: uint16, shape (K, L): digits of the last taken key; those from `depth_K` on are not known and 0.
        depth_K: int64: digits known; the same for all open groups.
        left_K: int64: rows to take among those with this prefix.
        inside_K: int64: rows with this prefix; -1 before the first count.
        open_K: bool: whether the rows with this prefix are undecided.
    """

    quota_K: NDArray[np.int64]
    prefix_KL: NDArray[np.uint16]
    depth_K: NDArray[np.int64]
    left_K: NDArray[np.int64]
    inside_K: NDArray[np.int64]
    open_K: Bools

    @property
    def undecided(self) -> int:
        """Rows in open groups that may or may not be taken; larger than any limit while they are not counted."""
        inside = self.inside_K[self.open_K]
        return UNCOUNTED if (inside < 0).any() else int(inside.sum())

    @property
    def value_digits(self) -> int:
        """Digits of the value at the front of a key."""
        return int(self.prefix_KL.shape[1]) - TIE_DIGITS

    @property
    def depth(self) -> int:
        """Digits known of every open group's last taken key: the place that the next histogram counts."""
        return int(self.depth_K[self.open_K].max(initial=0))


def start(quota_K: NDArray[np.int64], value_bits: int) -> Cut:
    """A cut that knows nothing but the quotas.

    Args:
        quota_K: int64, shape (K,), at least 0: rows to take of each group; more than there are takes them all.
        value_bits: 32 or 64, as the keys' values have.
    """
    groups = len(quota_K)
    return Cut(
        quota_K=quota_K,
        prefix_KL=np.zeros((groups, value_bits // DIGIT_BITS + TIE_DIGITS), np.uint16),
        depth_K=np.zeros(groups, np.int64),
        left_K=quota_K.copy(),
        inside_K=np.full(groups, -1, np.int64),
        open_K=quota_K > 0,
    )


def candidates(cut: Cut, group_N: NDArray[np.int32], keys: Keys) -> NDArray[np.int64]:
    """Indices, ascending, of the rows that are still undecided.

    Args:
        cut: of any round.
        group_N: int32, shape (N,), in [0, K).
        keys: of the same N rows.
    """
    known = min(cut.depth, cut.value_digits)
    at_N = np.broadcast_to(of_groups(group_N, cut.open_K), len(group_N))
    if known:
        # The digits of the value in one comparison, of all rows.
        shift = keys.value.dtype.type(DIGIT_BITS * (cut.value_digits - known))
        at_N = at_N & (keys.value >> shift == of_groups(group_N, _value_bits(cut) >> shift))
    rows = np.flatnonzero(at_N)
    for place in range(known, cut.depth):
        rows = rows[keys.take(rows).digit(place) == cut.prefix_KL[group_N[rows], place]]
    return rows


def histogram(cut: Cut, group_N: NDArray[np.int32], keys: Keys) -> Counts:
    """Count a part's undecided rows by group and next digit; the cut must have an open group.

    Args:
        cut: of any round.
        group_N: int32, shape (N,), in [0, K).
        keys: of the same N rows.
    """
    if cut.depth or not cut.open_K.all():  # else every row is undecided
        rows = candidates(cut, group_N, keys)
        group_N, keys = group_N[rows], keys.take(rows)
    bin_M = keys.digit(cut.depth).astype(np.int64)
    if len(cut.quota_K) > 1:
        bin_M += group_N.astype(np.int64) << DIGIT_BITS
    if len(cut.quota_K) << DIGIT_BITS <= 8 * len(bin_M):
        count = np.bincount(bin_M)
        bins = np.flatnonzero(count)
        count = count[bins]
    else:
        bins, count = np.unique(bin_M, return_counts=True)
    return _counts(bins, count)


def merge(parts: Iterable[Counts]) -> Counts:
    """Sum the counts of several parts; at least one."""
    held = list(parts)
    bin_C = np.concatenate([part.group.astype(np.int64) << DIGIT_BITS | part.digit for part in held])
    count_C = np.concatenate([part.count for part in held])
    bins, place_C = np.unique(bin_C, return_inverse=True)
    count = np.zeros(len(bins), np.int64)
    np.add.at(count, place_C, count_C)
    return _counts(bins, count)


def refine(cut: Cut, counts: Counts) -> Cut:
    """Fix the next digit of each open group's last taken key.

    A group closes when the digits of its value are known and every row with the new prefix is taken. It is not closed
    before, so that the last taken value is known whenever a group is closed.

    Args:
        cut: the one that the counts were made with.
        counts: merged over all parts.

    Raises:
        ValueError: the counts do not fit the cut, or two rows have the same key.
    """
    depth = cut.depth
    group_O = np.flatnonzero(cut.open_K)
    begin_O = np.searchsorted(counts.group, group_O, "left")
    end_O = np.searchsorted(counts.group, group_O, "right")
    sum_C = np.concatenate([[0], np.cumsum(counts.count)])
    size_O = sum_C[end_O] - sum_C[begin_O]
    if depth and not np.array_equal(size_O, cut.inside_K[group_O]):
        raise ValueError(f"counted {size_O.sum()} rows inside the cut, expected {cut.undecided}: a part is missing")
    cut = deepcopy(cut)
    if depth == 0:
        cut.quota_K[group_O] = cut.left_K[group_O] = np.minimum(cut.quota_K[group_O], size_O)
        cut.open_K[group_O] = cut.inside_K[group_O] = size_O  # an empty group closes with nothing taken
        group_O, begin_O = group_O[size_O > 0], begin_O[size_O > 0]

    bin_O = np.searchsorted(sum_C, sum_C[begin_O] + cut.left_K[group_O], "left") - 1
    cut.prefix_KL[group_O, depth] = counts.digit[bin_O]
    cut.depth_K[group_O] = depth + 1
    cut.left_K[group_O] -= sum_C[bin_O] - sum_C[begin_O]
    cut.inside_K[group_O] = inside_O = counts.count[bin_O]
    if depth + 1 == cut.prefix_KL.shape[1] and (inside_O > 1).any():
        raise ValueError("two rows have the same value, uid, unit and row")
    cut.open_K[group_O] = (inside_O > cut.left_K[group_O]) | (depth + 1 < cut.value_digits)
    return cut


def settle(cut: Cut, group_M: NDArray[np.int32], keys: Keys) -> Cut:
    """Fix each open group's last taken key by sorting its undecided rows.

    Args:
        cut: of any round; right after `start` every row is undecided.
        group_M: int32, shape (M,): groups of the undecided rows of all parts, in any order.
        keys: of the same M rows.

    Raises:
        ValueError: the rows are not all that are undecided.
    """
    size_K = np.bincount(group_M, minlength=len(cut.quota_K))
    counted_K = cut.open_K & (cut.inside_K >= 0)
    if not np.array_equal(size_K[counted_K], cut.inside_K[counted_K]):
        raise ValueError(f"got {len(group_M)} undecided rows, expected {cut.undecided}: a part is missing")
    cut = deepcopy(cut)
    order_M = np.lexsort((*keys.words[::-1], group_M))
    some_K = cut.open_K & (size_K > 0)
    begin_K = np.cumsum(size_K) - size_K
    last_O = order_M[(begin_K + np.minimum(cut.left_K, size_K) - 1)[some_K]]
    last = keys.take(last_O)
    for place in range(cut.prefix_KL.shape[1]):
        cut.prefix_KL[some_K, place] = last.digit(place)
    cut.depth_K[some_K] = cut.prefix_KL.shape[1]
    uncounted_K = cut.open_K & ~counted_K
    cut.quota_K[uncounted_K] = np.minimum(cut.quota_K, size_K)[uncounted_K]
    cut.left_K[cut.open_K] = cut.inside_K[cut.open_K] = some_K[cut.open_K]
    cut.open_K[:] = False
    return cut


def taken(cut: Cut, group_N: NDArray[np.int32], keys: Keys) -> Bools:
    """Which rows of a part are taken: bool, shape (N,).

    Args:
        cut: with no open group.
        group_N: int32, shape (N,), in [0, K).
        keys: of the same N rows.

    Raises:
        ValueError: a group is still open.
    """
    if cut.open_K.any():
        raise ValueError(f"{int(cut.open_K.sum())} groups of the cut are still open")
    last_N, some_N = of_groups(group_N, _value_bits(cut)), of_groups(group_N, cut.quota_K > 0)
    taken_N: Bools = some_N & (keys.value < last_N)
    equal = np.flatnonzero(some_N & (keys.value == last_N))
    for place in range(cut.value_digits, cut.prefix_KL.shape[1]):
        if not len(equal):  # most often no row of a part has the last value: each place costs 20 us all the same
            break
        whole = cut.depth_K[group_N[equal]] == place
        taken_N[equal[whole]] = True
        equal = equal[~whole]
        digit, last = keys.take(equal).digit(place), cut.prefix_KL[group_N[equal], place]
        taken_N[equal[digit < last]] = True
        equal = equal[digit == last]
    taken_N[equal] = True
    return taken_N


def last_value_bits(cut: Cut) -> tuple[NDArray[np.unsignedinteger], Bools]:
    """The value of each group's last taken key.

    Returns:
        uint32 or uint64 as the keys' values, shape (K,): the bits; and bool, shape (K,): False, with bits 0, where
        nothing is taken or the group is still open.
    """
    known_K = ~cut.open_K & (cut.quota_K > 0)
    bits_K = _value_bits(cut)
    return np.where(known_K, bits_K, bits_K.dtype.type(0)), known_K


def _value_bits(cut: Cut) -> NDArray[np.unsignedinteger]:
    """The value of each group's last taken key, as far as its digits are known: uint32 or uint64, shape (K,)."""
    uint = np.dtype(f"u{2 * cut.value_digits}").type
    bits_K = np.zeros(len(cut.quota_K), uint)
    for place in range(cut.value_digits):
        bits_K = bits_K << uint(DIGIT_BITS) | cut.prefix_KL[:, place]
    return bits_K


def of_groups(group_N: NDArray[np.int32], value_K: NDArray[Any]) -> NDArray[Any]:
    """The value of each row's group; of an only group as it is, to be broadcast: no copy for every row."""
    return value_K if len(value_K) == 1 else value_K[group_N]


def _counts(bins: NDArray[np.int64], count: NDArray[np.int64]) -> Counts:
    return Counts((bins >> DIGIT_BITS).astype(np.int32), bins.astype(np.uint16), count)
