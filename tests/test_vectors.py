"""Stored vectors and ordered words: by hand, against Python's own integers and fractions, and invariants."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline import vectors

rows16 = hnp.arrays(
    np.float16,
    st.tuples(st.integers(1, 12), st.integers(1, 9)),
    elements=st.floats(-1, 1, width=16, allow_subnormal=True),
)
finite32 = st.floats(width=32, allow_nan=False)
finite64 = st.floats(allow_nan=False)


def test_unit16_worked_by_hand():
    unit_ND, ok_N = vectors.unit16(np.array([[3, 4], [0, -2], [0, 0]], np.float32))
    assert unit_ND.tolist() == [[np.float16(0.6), np.float16(0.8)], [0, -1], [0, 0]]
    assert unit_ND.dtype == np.float16
    assert ok_N.tolist() == [True, True, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_a_non_finite_value_is_not_ok_and_comes_back_as_zeros(bad):
    unit_ND, ok_N = vectors.unit16(np.array([[1, bad], [1, 0]], np.float32))
    assert ok_N.tolist() == [False, True]
    assert unit_ND.tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        (np.float16, 65504),
        (np.float16, 6e-8),
        (np.float32, 1e38),
        (np.float32, 1e-44),
        (np.float64, 1e308),
        (np.float64, 5e-324),
    ],
)
def test_huge_and_tiny_rows_keep_their_direction(dtype, length):
    unit_ND, ok_N = vectors.unit16(np.array([[length, 0, -length, 0]]).astype(dtype))
    assert ok_N.all()
    assert unit_ND.tolist() == [[np.float16(0.5**0.5), 0, -np.float16(0.5**0.5), 0]]


def test_unit16_of_more_rows_than_a_block_is_row_by_row():
    vec_ND = np.random.default_rng(0).normal(size=(vectors.DOT_ROWS + 3, 5))
    vec_ND[vectors.DOT_ROWS] = 0
    unit_ND, ok_N = vectors.unit16(vec_ND)
    assert np.flatnonzero(~ok_N).tolist() == [vectors.DOT_ROWS]
    assert np.array_equal(unit_ND[-1], vectors.unit16(vec_ND[-1:])[0][0])
    assert np.allclose(vectors.norms(unit_ND[ok_N]), 1, atol=1e-3)


def test_no_rows_give_no_rows():
    empty = np.zeros((0, 4), np.float16)
    assert vectors.unit16(empty)[0].shape == (0, 4)
    assert vectors.norms(empty).shape == vectors.row_cosine(empty, empty).shape == (0,)
    assert vectors.draw(0, "01-random", []).shape == (0,)


def test_row_cosine_worked_by_hand():
    a_ND = np.array([[1, 0], [0.5, 0.5], [1, 0], [0.25, 0]], np.float16)
    b_ND = np.array([[0, 1], [0.5, 0.5], [-1, 0], [0.5, 0.5]], np.float16)
    assert vectors.row_cosine(a_ND, b_ND).tolist() == [0, 1, -1, np.float32(0.5**0.5)]


def test_the_cosine_with_a_zero_row_is_nan():
    assert np.isnan(vectors.row_cosine(np.zeros((1, 2), np.float16), np.ones((1, 2), np.float16)))[0]


@given(rows16)
def test_cosines_equal_exact_rational_arithmetic(vec_ND):
    """Dots and squared norms of float16 rows are exact in float64, so the only roundings are those written here."""
    unit_ND = vectors.unit16(vec_ND)[0]
    unit_ND = unit_ND[vectors.norms(unit_ND) > 0]
    other_ND = unit_ND[::-1]

    def dot(a, b):
        return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    expected = [
        np.float32(dot(a, b) / (math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))))
        for a, b in zip(unit_ND, other_ND, strict=True)
    ]
    cos_N = vectors.row_cosine(unit_ND, other_ND)
    assert cos_N.tolist() == expected
    assert np.array_equal(np.diagonal(vectors.all_cosines(unit_ND, other_ND)), cos_N)
    assert (vectors.row_cosine(unit_ND, unit_ND) == 1).all()


def test_a_cosine_does_not_depend_on_the_rows_beside_it():
    rng = np.random.default_rng(1)
    a_ND = vectors.unit16(rng.normal(size=(vectors.DOT_ROWS + 9, 33)))[0]
    b_ND = vectors.unit16(rng.normal(size=a_ND.shape))[0]
    cos_N = vectors.row_cosine(a_ND, b_ND)
    alone_N = [vectors.row_cosine(a_ND[i : i + 1], b_ND[i : i + 1])[0] for i in range(len(a_ND))]
    assert cos_N.tolist() == alone_N
    assert np.array_equal(vectors.row_cosine(np.asfortranarray(a_ND), b_ND), cos_N)


def test_first_largest_worked_by_hand():
    value_P = np.array([3, 5, 5, -1, 2, 2, 2, 1], np.float32)
    assert vectors.first_largest(value_P, np.array([0, 0, 0, 1, 2, 2, 2, 2])).tolist() == [1, 3, 4]


@given(st.lists(finite32, min_size=1), st.lists(finite64, min_size=1))
def test_ordered_bits_sort_as_the_floats_do_and_come_back(values32, values64):
    for values, dtype in ((values32, np.float32), (values64, np.float64)):
        value_N = np.array(values, dtype)
        bits_N = vectors.ordered_bits(value_N)
        assert bits_N.dtype.itemsize == value_N.dtype.itemsize
        assert np.array_equal(bits_N[:, None] < bits_N, value_N[:, None] < value_N)
        assert np.array_equal(bits_N[:, None] == bits_N, value_N[:, None] == value_N)
        assert np.array_equal(vectors.from_ordered_bits(bits_N), value_N)


def test_uid_words_worked_by_hand():
    uid = bytes.fromhex("0123456789abcdeffedcba9876543210")
    assert [int(word[0]) for word in vectors.uid_words(uid)] == [81985529216486895, 18364758544493064720]


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1))
def test_uid_words_are_the_halves_of_the_uid_as_an_integer_for_each_way_to_hold_it(uids):
    held = [b"".join(uids), np.array(uids, "S16"), np.frombuffer(b"".join(uids), np.uint8).reshape(-1, 16)]
    for uid_N in held:
        high_N, low_N = vectors.uid_words(uid_N)
        assert [int(h) << 64 | int(lo) for h, lo in zip(high_N, low_N, strict=True)] == [int(u.hex(), 16) for u in uids]


def test_draw_is_the_contract_s_hash():
    uid = "0123456789abcdeffedcba9876543210"
    expected = int.from_bytes(hashlib.sha256(b"7/03-random/0123456789abcdeffedcba9876543210").digest()[:8], "big")
    assert vectors.draw(7, "03-random", [uid]).tolist() == [expected]
    assert len({int(vectors.draw(seed, step, [uid])[0]) for seed in (0, 1) for step in ("01-random", "02-random")}) == 4


def test_widened_values_are_those_of_a_cast():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].reshape(-1, 8)
    assert np.array_equal(vectors.widened(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))
    assert vectors.widened(finite[::2, :]).tolist() == finite[::2].tolist()


def test_dots_are_the_exact_sums_of_products():
    a_ND = vectors.unit16(np.random.default_rng(1).normal(size=(vectors.DOT_ROWS + 3, 5)))[0]
    b_ND = a_ND[::-1].astype(np.float32)
    assert vectors.dots(a_ND, b_ND).tolist() == [
        sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) for a, b in zip(a_ND, b_ND, strict=True)
    ]
