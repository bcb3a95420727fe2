"""Spherical k-means: rows of a sample in, unit centroids out; then exact assignment and exact means of any rows.

Centroids lie on the grid of multiples of 2^-24, as the stored float16 rows do, so every float64 dot between them is
exact (`pipeline.vectors`): assignment, distance and mean are the same bits for any block of rows, number of workers
and number of threads.
"""

from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline import vectors
from pipeline.products import TILE, add_rows, candidates, each_alone, operand, pays
from pipeline.vectors import Float16s, Float32s, Float64s, Floats

GRID = 2.0**24
PLUS_PLUS_CLUSTERS = 1024  # k-means++ costs K passes over the sample, one centroid at a time
LAST = 5  # of so many iterations the last is over all rows
SOME = 2  # the others over one in so many,
FEW = 4  # or in so many, where these are
FEW_PER_CLUSTER = 250  # for each cluster: a quarter of 400 for each lost 0.3% of the objective, a half nothing
LEAST_PER_CLUSTER = 8  # rows that these have for each cluster at least, where there are
SPLIT = 2.0**-10
BLOCK_ROWS, LEAST_ROWS = 1024, 256  # 2 MiB of products of 500, as bfloat16 of twice the rows
GEMM_CELLS = 2**22  # products held at a time, 8 or 16 MiB, where that leaves LEAST_ROWS
SUM_ROWS = 1024  # 4 MiB of float64 at 512 dims
DENSE = 8  # centroids per row that can be nearest, above which one float64 product is cheaper than pairs


def train(
    sample_MD: Float16s, k: int, iterations: int, seed: int, threads: int, gpu: bool = False
) -> tuple[Float32s, Float64s]:
    """Cluster a sample by cosine; the same bits for any number of threads.

    FAISS chooses the first centroids, and on a GPU does all iterations but the last. The others are exact Lloyd steps:
    four fifths of them, in which centroids go most of their way, over some of the rows, the last over all.

    Fewer distinct rows than `k`, or fewer rows, leave centroids that coincide or that no row is nearest to.

    Args:
        sample_MD: float16, shape (M, D), stored unit rows, at least one.
        k: clusters, at least 1.
        iterations: Lloyd iterations, at least 1.
        seed: of the initial centroids.
        threads: that FAISS and the steps use.
        gpu: use every GPU that this host has, where FAISS is a GPU build.

    Returns:
        float32, shape (k, D): unit centroids; and float64, shape (steps,): mean of 1 - cosine to the nearest centroid
        at the start of each step over all rows, up to the rounding of the stored rows' lengths.

    Raises:
        ValueError: an empty sample.

    Source: SemDeDup, arXiv:2303.09540, section 3 (spherical k-means with FAISS).
    """
    import faiss

    if not len(sample_MD):
        raise ValueError("k-means needs at least one row")
    gpu = gpu and faiss.get_num_gpus() > 0
    first_SD = sample_MD[:: 1 if gpu else _most(len(sample_MD), k)]
    centroid_KD = _by_faiss(first_SD, k, iterations - 1 if gpu else 0, seed, threads, gpu)
    last = 1 if gpu else over_all(iterations)
    phases = [(stride(len(sample_MD), k), 0 if gpu else iterations - last), (1, last)]
    bf16 = pays(sample_MD.size * k)
    cluster_M = np.full(len(sample_MD), -1, np.int32)
    sum_KD, size_K = np.zeros(centroid_KD.shape), np.zeros(k, np.int64)
    distance_I = []
    with each_alone(threads, bf16) as pool:
        for phase, (every, count) in enumerate(phases):
            parts, clusters = (np.array_split(of_M[::every], threads if bf16 else 1) for of_M in (sample_MD, cluster_M))
            for step in range(count):
                for more_KD, more_K in pool.map(partial(_step, centroid_KD=centroid_KD, bf16=bf16), parts, clusters):
                    sum_KD += more_KD
                    size_K += more_K
                if phase:
                    # Whole numbers add up to the same in any order.
                    cos = int(np.rint(sum_KD * centroid_KD * 2.0**32).astype(np.int64).sum()) / 2.0**32
                    distance_I.append(1 - cos / len(sample_MD))
                centroid_KD = recentre(sum_KD, size_K, centroid_KD)
                if not phase or step < count - 1:
                    centroid_KD = split(centroid_KD, size_K)
    return centroid_KD, np.array(distance_I)


def over_all(iterations: int) -> int:
    """How many of the iterations, the last ones, are over all rows of a sample: a fifth, rounded, and one at least."""
    return max(1, round(iterations / LAST))


def stride(rows: int, k: int) -> int:
    """Of how many rows of a sample the first iterations take one.

    Args:
        rows: of the sample, at least 1.
        k: clusters, at least 1.
    """
    return min(FEW if rows >= FEW * FEW_PER_CLUSTER * k else SOME, _most(rows, k))


def _most(rows: int, k: int) -> int:
    """The stride that leaves each cluster LEAST_PER_CLUSTER rows; 1 where there are fewer."""
    return max(1, rows // (LEAST_PER_CLUSTER * k))


def _step(
    vec_ND: Float16s, cluster_N: NDArray[np.int32], centroid_KD: Float32s, bf16: bool
) -> tuple[Float64s, NDArray[np.int64]]:
    """Move rows to their nearest centroid, in place; what that adds to each cluster's sum and size.

    Args:
        cluster_N: int32, shape (N,): where each row counts so far; -1 for nowhere.
    """
    k = len(centroid_KD)
    before_N = cluster_N.copy()
    cluster_N[:] = clusters_of(vec_ND, centroid_KD, bf16=bf16)
    moved = np.flatnonzero(cluster_N != before_N)
    sum_KD, size_K = _sums(vec_ND, moved, cluster_N[moved], k, bf16)
    left = moved[before_N[moved] >= 0]
    if len(left):
        left_KD, left_K = _sums(vec_ND, left, before_N[left], k, bf16)
        sum_KD -= left_KD
        size_K -= left_K
    return sum_KD, size_K


def split(centroid_KD: Float32s, size_K: NDArray[np.int64]) -> Float32s:
    """Give each empty cluster half of the largest one, by moving both a little apart, as FAISS does.

    Args:
        centroid_KD: float32, shape (K, D), unit rows on the grid.
        size_K: int64, shape (K,).

    Returns:
        float32, shape (K, D), unit rows on the grid.
    """
    centroid_KD, size_K = centroid_KD.copy(), size_K.copy()
    apart_D = np.where(np.arange(centroid_KD.shape[1]) % 2, SPLIT, -SPLIT)
    for empty in np.flatnonzero(size_K == 0).tolist():
        largest = int(size_K.argmax())
        if size_K[largest] < 2:
            break
        both_2D = centroid_KD[largest] * np.stack([1 + apart_D, 1 - apart_D])
        centroid_KD[[largest, empty]] = on_grid(both_2D / vectors.norms(both_2D)[:, None])
        size_K[empty] = size_K[largest] // 2
        size_K[largest] -= size_K[empty]
    return centroid_KD


def _by_faiss(sample_MD: Float16s, k: int, iterations: int, seed: int, threads: int, gpu: bool) -> Float32s:
    """Unit centroids, on the grid, of at least one row: float32, shape (k, D)."""
    import faiss

    vec_MD = vectors.widened(sample_MD)
    if len(vec_MD) < k:
        vec_MD = np.resize(vec_MD, (k, vec_MD.shape[1]))
    vec_MD /= np.linalg.norm(vec_MD, axis=1, keepdims=True)
    plus_plus = k <= PLUS_PLUS_CLUSTERS
    kmeans = faiss.Kmeans(
        vec_MD.shape[1],
        k,
        niter=iterations,
        spherical=True,
        seed=seed & 0x7FFFFFFF,  # FAISS has an int32
        min_points_per_centroid=1,
        max_points_per_centroid=len(vec_MD),  # FAISS subsamples to 256 a centroid unless told
        gpu=gpu,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS if plus_plus else faiss.ClusteringInitMethod_RANDOM,
    )
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        kmeans.train(vec_MD)
    finally:
        faiss.omp_set_num_threads(before)
    return recentre(np.asarray(kmeans.centroids, np.float64), np.ones(k, np.int64), on_grid(vec_MD[:k]))


def on_grid(centroid_KD: Floats) -> Float32s:
    """Round unit rows to the nearest multiples of 2^-24, which float32 holds exactly: float32, shape (K, D)."""
    return (np.rint(centroid_KD.astype(np.float64) * GRID) / GRID).astype(np.float32)


def nearest(
    vec_ND: Float16s, centroid_KD: Float32s, block_rows: int = BLOCK_ROWS, bf16: bool | None = None
) -> tuple[NDArray[np.int32], Float32s]:
    """Assign each row to the centroid of the largest float64 cosine, the lowest id among equals.

    A fast product finds the centroids that can be nearest (`pipeline.products`); those are compared in float64. The
    answer does not depend on `block_rows` or `bf16`.

    Args:
        vec_ND: float16, shape (N, D), stored unit rows.
        centroid_KD: float32, shape (K, D), unit rows on the grid.
        block_rows: rows compared at a time, at least 1, of bfloat16 twice as many; changes speed and memory only.
        bf16: multiply bfloat16 first; None: where the processor is faster at it and the work is large.

    Returns:
        int32, shape (N,): cluster; and float32, shape (N,): 1 - cosine to its centroid, in [0, 2].

    Raises:
        ValueError: a row without a direction.
    """
    cluster_N, cos_N = _assigned(vec_ND, centroid_KD, block_rows, bf16, every=True)
    return cluster_N, np.maximum(1 - cos_N, 0).astype(np.float32)  # the quotient may round above 1


def clusters_of(
    vec_ND: Float16s, centroid_KD: Float32s, block_rows: int = BLOCK_ROWS, bf16: bool | None = None
) -> NDArray[np.int32]:
    """The clusters alone, as `nearest` gives them: int32, shape (N,)."""
    return _assigned(vec_ND, centroid_KD, block_rows, bf16, every=False)[0]


def _assigned(
    vec_ND: Float16s, centroid_KD: Float32s, block_rows: int, bf16: bool | None, every: bool
) -> tuple[NDArray[np.int32], Float64s]:
    """The cluster of each row; and its cosine, of every row or only where several centroids can be the nearest."""
    cluster_N, cos_N = np.empty(len(vec_ND), np.int32), np.full(len(vec_ND), np.nan)
    clusters, norm_K = len(centroid_KD), vectors.norms(centroid_KD)
    if bf16 is None:
        bf16 = pays(len(vec_ND) * centroid_KD.size)
    columns, rows = operand(centroid_KD, bf16), None
    block_rows = min(block_rows * (2 if bf16 else 1), max(LEAST_ROWS, GEMM_CELLS // clusters // TILE * TILE))
    scratch = np.empty(min(block_rows, len(vec_ND)) * clusters, np.float32)
    for start in range(0, len(vec_ND), block_rows):
        block = slice(start, start + block_rows)
        rows = operand(vec_ND[block], bf16, measured=False, into=rows)
        if not rows.norm.all():
            raise ValueError(f"row {start + int(np.argmin(rows.norm > 0))} has no direction and so no nearest centroid")
        place_P = candidates(rows, columns, scratch=scratch)
        if len(place_P) > DENSE * len(rows.vec):
            cos_BK = rows.vec.astype(np.float64) @ centroid_KD.T.astype(np.float64)
            cos_BK /= vectors.norms(rows.vec)[:, None] * norm_K
            cluster_N[block], cos_N[block] = cos_BK.argmax(axis=1), cos_BK.max(axis=1)
            continue
        row_P, cluster_P = np.divmod(place_P, clusters)
        begins_P = np.diff(row_P, prepend=-1) > 0
        cluster_N[block] = cluster_P[begins_P]
        at, vec_RD = np.arange(len(rows.vec)), rows.vec
        if not every:
            tied_P = ~(begins_P & np.append(begins_P[1:], True))
            cluster_P = cluster_P[tied_P]
            at, row_P = np.unique(row_P[tied_P], return_inverse=True)
            vec_RD = vec_RD[at]
        if len(at):
            cos_P = _cosines(vec_RD, row_P, centroid_KD, norm_K, cluster_P)
            # Of two cosines that round to the same float64, the lower id wins.
            nearest_R = vectors.first_largest(cos_P, row_P)
            cluster_N[block][at], cos_N[block][at] = cluster_P[nearest_R], cos_P[nearest_R]
    return cluster_N, cos_N


def _cosines(
    vec_RD: Float32s, row_P: NDArray[np.int64], centroid_KD: Float32s, norm_K: Float64s, cluster_P: NDArray[np.int64]
) -> Float64s:
    """float64 cosine of each pair of a row and a centroid: shape (P,); every row is in one at least.

    Args:
        row_P: int64, shape (P,), ascending from 0 without gaps.
    """
    dot_P, square_R = np.empty(len(row_P)), np.empty(len(vec_RD))
    begins_P = np.diff(row_P, prepend=-1) > 0
    begin_R, other_O = np.flatnonzero(begins_P), np.flatnonzero(~begins_P)
    vec_FD, centroid_FD = np.empty((2, vectors.DOT_ROWS, vec_RD.shape[1]))
    starts = range(0, len(vec_RD), vectors.DOT_ROWS)
    bounds = np.searchsorted(row_P[other_O], [*starts, len(vec_RD)]).tolist()
    for start, (first, last) in zip(starts, pairwise(bounds), strict=True):
        few = slice(start, start + vectors.DOT_ROWS)
        begin_F = begin_R[few]
        vec_FD, centroid_FD = vec_FD[: len(begin_F)], centroid_FD[: len(begin_F)]
        vec_FD[...], centroid_FD[...] = vec_RD[few], centroid_KD[cluster_P[begin_F]]
        square_R[few], dot_P[begin_F] = np.vecdot(vec_FD, vec_FD), np.vecdot(vec_FD, centroid_FD)
        for some in range(first, last, vectors.DOT_ROWS):  # while their rows are in a cache
            pair_O = other_O[some : min(some + vectors.DOT_ROWS, last)]
            other_OD = centroid_KD[cluster_P[pair_O]].astype(np.float64)
            dot_P[pair_O] = np.vecdot(vec_FD[row_P[pair_O] - start], other_OD)
    cos_P: Float64s = dot_P / (np.sqrt(square_R)[row_P] * norm_K[cluster_P])
    return cos_P


def partial_sums(vec_ND: Float16s, cluster_N: NDArray[np.int32], k: int) -> tuple[Float64s, NDArray[np.int64]]:
    """Sum the rows of each cluster; partial sums of any split of the rows add up to the same bits.

    float64 sums of float16 values are exact up to 2^29 rows of a cluster.

    Args:
        vec_ND: float16, shape (N, D), stored unit rows.
        cluster_N: int32, shape (N,), in [0, k).
        k: clusters.

    Returns:
        float64, shape (k, D): sums; and int64, shape (k,): sizes.
    """
    return _sums(vec_ND, np.arange(len(vec_ND)), cluster_N, k)


def _sums(
    vec_ND: Float16s, row_R: NDArray[np.int64], cluster_R: NDArray[np.int32], k: int, by_torch: bool = False
) -> tuple[Float64s, NDArray[np.int64]]:
    """`partial_sums` of some of the rows.

    Args:
        by_torch: as `products.add_rows`, in which threads do not wait for each other.
    """
    sum_KD = np.zeros((k, vec_ND.shape[1]))
    blocks = (slice(start, start + SUM_ROWS) for start in range(0, len(row_R), SUM_ROWS))
    if by_torch:
        for block in blocks:
            add_rows(sum_KD, cluster_R[block], vec_ND[row_R[block]])
    else:
        order_R = np.argsort(cluster_R, kind="stable")
        for block in blocks:
            order_B = order_R[block]
            cluster_B = cluster_R[order_B]
            wide_BD = vectors.widened(vec_ND[row_R[order_B]]).astype(np.float64)
            begins = np.flatnonzero(np.diff(cluster_B, prepend=-1)).tolist()
            for begin, end in pairwise([*begins, len(order_B)]):  # np.add.reduceat takes twice the time
                sum_KD[cluster_B[begin]] += np.ones(end - begin) @ wide_BD[begin:end]
    return sum_KD, np.bincount(cluster_R, minlength=k)


def recentre(sum_KD: Float64s, size_K: NDArray[np.int64], old_KD: Float32s) -> Float32s:
    """Unit mean direction of each cluster, on the grid; a cluster without one keeps its old centroid.

    Args:
        sum_KD: float64, shape (K, D), summed over all rows.
        size_K: int64, shape (K,).
        old_KD: float32, shape (K, D).

    Returns:
        float32, shape (K, D), unit rows.
    """
    norm_K = np.sqrt(np.einsum("kd,kd->k", sum_KD, sum_KD))
    moved_K = (size_K > 0) & (norm_K > 0)
    centroid_KD = old_KD.copy()
    centroid_KD[moved_K] = on_grid(sum_KD[moved_K] / norm_K[moved_K, None])
    return centroid_KD
