"""Vectors as they are stored, and the words that rows are ordered by: arrays in, arrays out.

Shape letters used in every kernel: N samples, M non-null samples, K clusters, D dims, B block rows.

The one fact that the exact kernels rest on: float16 values are multiples of 2^-24, so products of two of them are
multiples of 2^-48, and a sum of them that stays below 32 fits the 53 bits of a float64. The float64 dot of two stored
unit rows is therefore exact, in any order of summation, on any processor and with any number of threads.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float16s: TypeAlias = NDArray[np.float16]
Float32s: TypeAlias = NDArray[np.float32]
Float64s: TypeAlias = NDArray[np.float64]
Floats: TypeAlias = NDArray[np.floating]
Bools: TypeAlias = NDArray[np.bool_]
Uint8s: TypeAlias = NDArray[np.uint8]
Uint64s: TypeAlias = NDArray[np.uint64]

DOT_ROWS = 64  # their float64 rows stay in a processor's second cache, with those that they are multiplied by

_BIAS = np.float32(2.0 ** (127 - 15))  # between the exponents of float32 and float16
_LEAST = np.float32(2.0 ** (-24 - 127 + 15))  # of a float16, in the place of its bits in a float32: subnormal


def unit16(vec_ND: Floats) -> tuple[Float16s, Bools]:
    """Scale each row to unit L2 norm and round it to float16.

    Rows are divided by their largest entry first, so neither float16 overflow nor tiny rows lose their direction.

    Args:
        vec_ND: float16, float32 or float64, shape (N, D), any finite length.

    Returns:
        float16, shape (N, D): unit rows; and bool, shape (N,): False where a row holds a non-finite value or has no
        direction (zero norm). Such a row comes back as zeros.
    """
    unit_ND = np.zeros(vec_ND.shape, np.float16)
    ok_N = np.zeros(len(vec_ND), np.bool_)
    for start in range(0, len(vec_ND), DOT_ROWS):
        block_BD = vec_ND[start : start + DOT_ROWS].astype(np.float64)
        largest_B = np.abs(block_BD).max(axis=1, initial=0)
        ok_B = np.isfinite(largest_B) & (largest_B > 0)
        scaled_BD = block_BD[ok_B] / largest_B[ok_B, None]
        scaled_BD /= np.sqrt(np.einsum("nd,nd->n", scaled_BD, scaled_BD))[:, None]
        unit_ND[start : start + DOT_ROWS][ok_B] = scaled_BD
        ok_N[start : start + DOT_ROWS] = ok_B
    return unit_ND, ok_N


def widened(vec_ND: Float16s) -> Float32s:
    """The same finite values as float32, C-contiguous: many at a time, where numpy's cast takes each by itself."""
    if not _LEAST * _BIAS:  # a library has told this thread to take subnormal numbers for 0
        return np.ascontiguousarray(vec_ND, np.float32)
    wide_ND = np.empty(vec_ND.shape, np.float32)
    bits_ND = wide_ND.view(np.uint32)
    for start in range(0, len(vec_ND), DOT_ROWS):
        block = slice(start, start + DOT_ROWS)
        wide_BD, bits_BD = wide_ND[block], bits_ND[block]
        bits_BD[...] = vec_ND[block].view(np.int16)  # the sign in all upper bits
        bits_BD <<= np.uint32(13)
        bits_BD &= np.uint32(0x8FFFE000)
        wide_BD *= _BIAS
    return wide_ND


def dots(a_ND: Floats, b_ND: Floats) -> Float64s:
    """float64 dot of each row of `a` with the same row of `b`: shape (N,). Exact for stored rows, see above."""
    dot_N = np.empty(len(a_ND))
    for start in range(0, len(a_ND), DOT_ROWS):
        block = slice(start, start + DOT_ROWS)
        dot_N[block] = np.vecdot(_float64(a_ND[block]), _float64(b_ND[block]))
    return dot_N


def norms(vec_ND: Floats) -> Float64s:
    """L2 norm of each row, in float64: float64, shape (N,). Exact up to the square root for stored float16 rows."""
    norm_N = np.empty(len(vec_ND))
    for start in range(0, len(vec_ND), DOT_ROWS):
        block_BD = _float64(vec_ND[start : start + DOT_ROWS])
        norm_N[start : start + DOT_ROWS] = np.sqrt(np.vecdot(block_BD, block_BD))
    return norm_N


def row_cosine(a_ND: Float16s, b_ND: Float16s) -> Float32s:
    """Cosine of each row of `a` with the same row of `b`, as it is stored and compared.

    The float64 dot of the stored rows is exact, so a row's cosine does not depend on the rows beside it.

    Args:
        a_ND: float16, shape (N, D), unit rows.
        b_ND: float16, shape (N, D), unit rows.

    Returns:
        float32, shape (N,), in [-1, 1]; NaN where a row is zero.
    """
    with np.errstate(invalid="ignore"):
        return (dots(a_ND, b_ND) / (norms(a_ND) * norms(b_ND))).astype(np.float32)


def all_cosines(a_ND: Floats, b_MD: Floats) -> Float32s:
    """Cosine of every row of `a` with every row of `b`: float32, shape (N, M), the same bits as `row_cosine`.

    Memory is N x M float64: for blocks.
    """
    dot_NM = _float64(a_ND) @ _float64(b_MD).T
    dot_NM /= norms(a_ND)[:, None] * norms(b_MD)
    return dot_NM.astype(np.float32)


def _float64(vec_ND: Floats) -> Float64s:
    return (widened(vec_ND) if vec_ND.dtype == np.float16 else vec_ND).astype(np.float64, copy=False)


def first_largest(value_P: Floats, row_P: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each row's largest value stands, the first among equals.

    Args:
        value_P: float32 or float64, shape (P,).
        row_P: int64, shape (P,), ascending from 0 without gaps: the row of each value.

    Returns:
        int64, shape (N,): a place in `value_P` for each row.
    """
    begin_N = np.flatnonzero(np.diff(row_P, prepend=-1))
    largest_N = np.maximum.reduceat(value_P, begin_N)
    equal = np.flatnonzero(value_P == largest_N[row_P])
    return equal[np.flatnonzero(np.diff(row_P[equal], prepend=-1))]


def ordered_bits(value_N: Floats) -> NDArray[np.unsignedinteger]:
    """Unsigned integers in the order of the floats, with -0.0 equal to 0.0.

    Args:
        value_N: float32 or float64, shape (N,), not NaN.

    Returns:
        uint32 for float32, uint64 for float64, shape (N,).
    """
    uint = np.dtype(f"u{value_N.dtype.itemsize}").type
    sign = uint(1 << (8 * value_N.dtype.itemsize - 1))
    bits_N: NDArray[np.unsignedinteger] = (value_N + value_N.dtype.type(0)).view(uint)
    flip_N = (bits_N.view(f"i{value_N.dtype.itemsize}") >> (8 * value_N.dtype.itemsize - 1)).view(uint)
    flip_N |= sign  # all bits of a negative value, the sign of another
    bits_N ^= flip_N
    return bits_N


def from_ordered_bits(bits_N: NDArray[np.unsignedinteger]) -> Floats:
    """The floats that `ordered_bits` was given: float32 for uint32, float64 for uint64."""
    sign = bits_N.dtype.type(1 << (8 * bits_N.dtype.itemsize - 1))
    value_N: Floats = np.where(bits_N & sign, bits_N ^ sign, ~bits_N).view(f"f{bits_N.dtype.itemsize}")
    return value_N


def uid_words(uid_N: Uint8s | NDArray[np.bytes_] | bytes) -> tuple[Uint64s, Uint64s]:
    """Split 16-byte uids into two words that sort as the uid's hex digits do.

    Args:
        uid_N: uint8 of shape (N, 16), S16 of shape (N,), or 16 N bytes.

    Returns:
        uint64, shape (N,), twice: the first and the last 8 bytes, big-endian.
    """
    flat = np.frombuffer(uid_N, np.uint8) if isinstance(uid_N, bytes) else np.ascontiguousarray(uid_N).view(np.uint8)
    word_N2 = flat.reshape(-1, 16).view(">u8").astype(np.uint64)
    return word_N2[:, 0], word_N2[:, 1]


def draw(seed: int, step: str, uids_hex: Sequence[str]) -> Uint64s:
    """hash(seed, step, uid) of each uid, the only source of randomness; the lower is drawn first.

    Args:
        seed: the recipe's seed.
        step: position and name of the step, as in `03-random`.
        uids_hex: 32 lower-case hex digits each.

    Returns:
        uint64, shape (N,): first 8 bytes, big-endian, of sha256("SEED/NN-NAME/UID").
    """
    digests = b"".join(hashlib.sha256(f"{seed}/{step}/{uid}".encode()).digest()[:8] for uid in uids_hex)
    return np.frombuffer(digests, ">u8").astype(np.uint64)
