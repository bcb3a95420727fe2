"""Products with a bound: nothing that can be the largest is left out, in either precision, and little else remains."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import products, vectors


def unit_rows(seed, rows, dims, spread):
    """float32 unit rows around one direction."""
    rng = np.random.default_rng(seed)
    vec_ND = np.random.default_rng(0).normal(size=(1, dims)) + spread * rng.normal(size=(rows, dims))
    return vectors.widened(vectors.unit16(vec_ND)[0])


def normed(vec_ND):
    return (vec_ND / np.linalg.norm(vec_ND.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)


def largest(rows_BD, columns_CD, least_B, earlier):
    """Places of the largest products, by definition in float64."""
    dot_BC = rows_BD.astype(np.float64) @ columns_CD.astype(np.float64).T
    places = set()
    for row, dot_C in enumerate(dot_BC):
        allowed_C = dot_C[:row] if earlier else dot_C
        for column in np.flatnonzero(allowed_C == max(allowed_C, default=0)):
            if least_B is None or allowed_C[column] >= least_B[row]:
                places.add(row * len(dot_C) + int(column))
    return places


@given(
    seed=st.integers(0, 99),
    rows=st.integers(1, 30),
    columns=st.integers(1, 40),
    dims=st.sampled_from([1, 3, 32, 300]),
    spread=st.sampled_from([0.01, 0.3, 10]),
    bound=st.booleans(),
    earlier=st.booleans(),
    bf16=st.booleans(),
)
def test_no_largest_product_is_left_out(seed, rows, columns, dims, spread, bound, earlier, bf16):
    row_BD = unit_rows(seed, rows, dims, spread)
    column_CD = normed(unit_rows(seed + 100, columns, dims, spread))
    if earlier:
        row_BD = column_CD = normed(row_BD)
    least_B = np.random.default_rng(seed).uniform(-2, 1, rows).astype(np.float32) if bound else None
    prepared = products.operand(column_CD, bf16)
    mine = prepared if earlier else products.operand(row_BD, bf16)
    place_P = products.candidates(mine, prepared, least_B, earlier)
    assert (np.diff(place_P) > 0).all() and place_P.dtype == np.int64
    assert largest(row_BD, column_CD, least_B, earlier) <= set(place_P.tolist())


@pytest.mark.parametrize("bf16", [False, True])
def test_of_well_parted_columns_one_remains(bf16):
    column_CD = np.eye(16, dtype=np.float32)
    row_BD = np.array([[0.8] + [0.1] * 15, [0.1] * 15 + [0.8]], np.float32)
    place_P = products.candidates(products.operand(row_BD, bf16), products.operand(column_CD, bf16))
    assert place_P.tolist() == [0, 16 + 15]


@pytest.mark.parametrize("bf16", [False, True])
def test_products_below_the_bound_are_of_no_interest(bf16):
    vec_ND = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]], np.float32)
    both = products.operand(vec_ND, bf16)
    assert products.candidates(both, both, np.array([0.5, 0.9, 0.9], np.float32), earlier=True).tolist() == [2 * 3 + 1]


def test_what_bfloat16_lost_is_measured():
    vec_ND = np.array([[1 + 2**-10, 0], [0.5, 0.25]], np.float32)
    found = products.operand(vec_ND, bf16=True)
    assert found.lost.tolist() == [2**-10, 0]
    assert found.norm.tolist() == [1 + 2**-10, pytest.approx(0.3125**0.5)]


def test_a_part_of_an_operand_is_that_of_its_rows():
    vec_ND = unit_rows(1, 20, 8, 1)
    whole, part = products.operand(vec_ND, bf16=True)[5:9], products.operand(vec_ND[5:9], bf16=True)
    assert np.array_equal(whole.vec, part.vec) and np.array_equal(whole.norm, part.norm)
    assert np.array_equal(whole.lost, part.lost) and bool((whole.low == part.low).all())


def test_small_products_do_not_pay_for_an_import():
    assert not products.pays(products.BF16_WORK - 1)
    assert products.pays(products.BF16_WORK) == products.has_bf16()


def test_threads_of_a_pool_multiply_alone_and_others_as_before():
    before = torch.get_num_threads()
    with products.each_alone(3, bf16=True) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == before
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == before
    with products.each_alone(3, bf16=False) as pool:
        assert pool.submit(torch.get_num_threads).result() == before
