"""Products with a bound: nothing that can be the largest is left out, in either precision, and little else remains."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import products, vectors
from pipeline.machine import bf16_flags


def unit_rows(seed, rows, dims, spread):
    """float32 unit rows around one direction."""
    rng = np.random.default_rng(seed)
    vec_ND = np.random.default_rng(0).normal(size=(1, dims)) + spread * rng.normal(size=(rows, dims))
    return vectors.widened(vectors.unit16(vec_ND)[0])


def largest(rows_BD, columns_CD, least_B, before):
    """Places of the largest cosines, by definition in float64."""
    dot_BC = rows_BD.astype(np.float64) @ columns_CD.astype(np.float64).T
    cos_BC = dot_BC / (vectors.norms(rows_BD)[:, None] * vectors.norms(columns_CD))
    places = set()
    for row, cos_C in enumerate(cos_BC):
        allowed_C = cos_C if before is None else cos_C[: before + row]
        for column in np.flatnonzero(allowed_C == max(allowed_C, default=0)):
            if least_B is None or allowed_C[column] >= least_B[row]:
                places.add(row * len(cos_C) + int(column))
    return places


@given(
    seed=st.integers(0, 99),
    rows=st.integers(1, 30),
    columns=st.integers(1, 40),
    dims=st.sampled_from([1, 3, 32, 300]),
    spread=st.sampled_from([0.01, 0.3, 10]),
    stretch=st.sampled_from([0, 2**-10, 0.3]),
    bound=st.booleans(),
    before=st.none() | st.integers(0, 20),
    measured=st.booleans(),
    bf16=st.booleans(),
    held=st.booleans(),
)
def test_no_largest_cosine_is_left_out(seed, rows, columns, dims, spread, stretch, bound, before, measured, bf16, held):
    rng = np.random.default_rng(seed)
    row_BD = unit_rows(seed, rows, dims, spread)
    column_CD = unit_rows(seed + 100, columns if before is None else before, dims, spread)
    if before is not None:
        column_CD = np.concatenate([column_CD, row_BD])
    column_CD = column_CD * (1 + stretch * rng.uniform(-1, 1, (len(column_CD), 1))).astype(np.float32)
    least_B = rng.uniform(-2, 1, rows).astype(np.float32) if bound else None
    mine, prepared = products.operand(row_BD, bf16, measured), products.operand(column_CD, bf16)
    scratch = np.full(rows * len(column_CD) + 3, 2, np.float32) if held else None
    place_P = products.candidates(mine, prepared, least_B, before, scratch)
    assert (np.diff(place_P) > 0).all() and place_P.dtype == np.int64
    wanted = largest(row_BD, column_CD, least_B, before)
    assert wanted <= set(place_P.tolist())
    if len(place_P):
        row_P, column_P = np.divmod(place_P, len(column_CD))
        assert before is None or (column_P < before + row_P).all()
        left_P = place_P[products.told_apart(mine, prepared, row_P, column_P)]
        assert wanted <= set(left_P.tolist()) <= set(place_P.tolist())
        assert np.array_equal(np.unique(left_P // len(column_CD)), np.unique(row_P))


@pytest.mark.parametrize("bf16", [False, True])
def test_of_well_parted_columns_one_remains(bf16):
    column_CD = np.eye(16, dtype=np.float32)
    row_BD = np.array([[0.8] + [0.1] * 15, [0.1] * 15 + [0.8]], np.float32)
    place_P = products.candidates(products.operand(row_BD, bf16), products.operand(column_CD, bf16))
    assert place_P.tolist() == [0, 16 + 15]


@pytest.mark.parametrize("bf16", [False, True])
def test_of_many_columns_all_near_ones_remain_wherever_they_stand(bf16):
    columns = products.FOLD * products.LEAST_STRETCH
    column_CD = np.zeros((columns, 2), np.float32)
    column_CD[:, 0] = 1
    near = [0, 1, columns // products.FOLD, columns - 1]
    column_CD[near] = [0.6, 0.8]
    row_BD = np.array([[0.6, 0.8], [1, 0]], np.float32)
    place_P = products.candidates(products.operand(row_BD, bf16), products.operand(column_CD, bf16))
    assert place_P.tolist() == [*near, *(columns + at for at in range(columns) if at not in near)]


@pytest.mark.parametrize("bf16", [False, True])
def test_cosines_below_the_bound_are_of_no_interest(bf16):
    vec_ND = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]], np.float32)
    both = products.operand(vec_ND, bf16)
    assert products.candidates(both, both, np.array([0.5, 0.9, 0.9], np.float32), before=0).tolist() == [2 * 3 + 1]


def test_a_bound_is_of_the_cosine_not_of_the_product():
    rows, column = (products.operand(np.array(vec, np.float32), False) for vec in ([[2, 0], [0.5, 0]], [[1, 0]]))
    assert products.candidates(rows, column, np.array([1.1, 0.9], np.float32)).tolist() == [1]


def test_pairs_that_bfloat16_cannot_tell_apart_are_told_apart():
    column_CD = np.array([[1, 0], [1, 2**-6], [0, 1]], np.float32)
    column_CD /= np.linalg.norm(column_CD, axis=1, keepdims=True)
    rows, columns = products.operand(column_CD[1:2], True), products.operand(column_CD, True)
    place_P = products.candidates(rows, columns)
    assert place_P.tolist() == [0, 1]
    assert products.told_apart(rows, columns, np.zeros(2, np.int64), place_P).tolist() == [1]


def test_dots_are_those_of_the_pairs():
    rows, columns = (products.operand(np.array(vec, np.float16), False) for vec in ([[1, 2], [3, 4]], [[5, 6], [7, 8]]))
    assert products.dots(rows, columns, np.array([0, 1, 1]), np.array([1, 0, 1])).tolist() == [23, 39, 53]


def test_what_bfloat16_lost_is_measured_or_bounded():
    vec_ND = np.array([[1 + 2**-10, 0], [0.5, 0.25]], np.float32)
    found = products.operand(vec_ND, bf16=True)
    assert found.lost.tolist() == [2**-10, 0]
    assert found.norm.tolist() == [1 + 2**-10, pytest.approx(0.3125**0.5)]
    bounded = products.operand(vec_ND, bf16=True, measured=False)
    assert (bounded.lost >= found.lost).all() and bounded.lost.tolist() == (found.norm * 2**-8).tolist()


ABOVE, BELOW = 1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20
"""Next to the middle of two bfloat16 numbers, 1 and 1 + 2^-7."""

DOWN = [BELOW] * 4 + [0] * 16
UP = [0] * 4 + [ABOVE / 2] * 15 + [0.25 * (1 + 127 / 128 + 2**-8 + 2**-20)]
"""Of the row of weights, the product with DOWN is larger; rounded to bfloat16 it is smaller by 0.7%."""

WEIGHTS = [0.875] * 4 + [0.4375] * 16
SEVENTHS = [[0.4375] * 4 + [0] * 16, [0] * 4 + [0.21875] * 16]
FILL = [0.25] * 3 + [0.125] * 3
"""Makes SEVENTHS unit vectors, without rounding."""


def unit(column_CD):
    """The columns with one coordinate more, which makes them unit vectors."""
    return np.column_stack([column_CD, np.sqrt(1 - (column_CD**2).sum(axis=1))])


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        pytest.param([*WEIGHTS, 0], unit(np.array([DOWN, UP]) / 4), id="columns"),
        pytest.param([*DOWN[:4], *UP[4:], *[0] * 6], np.column_stack([SEVENTHS, [FILL, FILL]]), id="row"),
        pytest.param(
            [1, 1, 1, 0, 0, 0], [[0.5, 2**-9 * BELOW, 0, *[0.5] * 3], [0.5, 2**-9, 2**-20, *[0.5] * 3]], id="sum"
        ),
    ],
)
def test_what_bfloat16_rounds_the_wrong_way_is_not_left_out(row, columns):
    row_BD, column_CD = np.array([row], np.float32), np.array(columns, np.float32)
    first, second = (row_BD.astype(np.float64) @ column_CD.T.astype(np.float64))[0]
    assert first > second
    rows, both = products.operand(row_BD, True), products.operand(column_CD, True)
    low_BC = rows.low @ both.low.T
    assert low_BC[0, 0] < low_BC[0, 1]
    assert products.candidates(rows, both).tolist() == [0, 1]


def test_a_part_of_an_operand_is_that_of_its_rows():
    vec_ND = unit_rows(1, 20, 8, 1)
    whole, part = products.operand(vec_ND, bf16=True)[5:9], products.operand(vec_ND[5:9], bf16=True)
    assert np.array_equal(whole.vec, part.vec) and np.array_equal(whole.norm, part.norm)
    assert np.array_equal(whole.lost, part.lost) and bool((whole.low == part.low).all())


@pytest.mark.parametrize("bf16", [False, True])
def test_memory_of_an_earlier_operand_is_written_over(bf16):
    first_ND, then_ND = vectors.unit16(unit_rows(1, 2700, 8, 1))[0], vectors.unit16(unit_rows(2, 2600, 8, 1))[0]
    first = products.operand(first_ND, bf16)
    found, wanted = products.operand(then_ND, bf16, into=first), products.operand(then_ND, bf16)
    assert np.shares_memory(found.vec, first.vec) and len(found.vec) == len(found.norm) == len(found.lost) == 2600
    assert np.array_equal(found.vec, then_ND.astype(np.float32)) and np.array_equal(found.norm, wanted.norm)
    assert np.array_equal(found.lost, wanted.lost) and found.lost.any() == bf16
    if bf16:
        assert torch.equal(found.low, torch.from_numpy(then_ND).float().bfloat16())


def test_rows_are_widened_alike_without_torch(monkeypatch):
    vec_ND = vectors.unit16(unit_rows(3, 300, 8, 1))[0]
    vec_ND.setflags(write=False)
    by_torch = products.operand(vec_ND, False)
    monkeypatch.delitem(sys.modules, "torch")
    by_numpy = products.operand(vec_ND, False)
    assert np.array_equal(by_torch.vec, by_numpy.vec) and np.array_equal(by_torch.norm, by_numpy.norm)


@pytest.mark.parametrize("turned", [False, True])
def test_columns_that_fill_a_tile_are_never_found(turned):
    vec_ND = vectors.widened(vectors.unit16(np.random.default_rng(4).normal(size=(71, 16)))[0])
    few, many = products.operand(vec_ND[:37], True), products.operand(vec_ND, True)
    rows, columns = (few, many) if turned else (many, few)
    place_P = products.candidates(rows, columns)
    row_P, column_P = np.divmod(place_P, len(columns.vec))
    assert np.array_equal(np.unique(row_P), np.arange(len(rows.vec)))
    assert set(zip(range(37), range(37), strict=True)) <= set(zip(row_P.tolist(), column_P.tolist(), strict=True))


@pytest.mark.parametrize(("loaded", "least"), [(True, products.LOADED_WORK), (False, products.BF16_WORK)])
def test_small_products_do_not_pay_for_bfloat16_and_still_less_for_an_import(monkeypatch, loaded, least):
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch")
    assert not products.pays(least - 1)
    assert products.pays(least) == bool(bf16_flags())


def test_threads_of_a_pool_multiply_alone_and_others_as_before():
    before = torch.get_num_threads()
    with products.each_alone(3, bf16=True) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == before
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == before
    with products.each_alone(3, bf16=False) as pool:
        assert pool.submit(torch.get_num_threads).result() == before
