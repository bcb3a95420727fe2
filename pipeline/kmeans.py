"""Spherical k-means: rows of a sample in, unit centroids out; then exact assignment and exact means of any rows.

Centroids lie on the grid of multiples of 2^-24, as the stored float16 rows do, so every float64 dot between them is
exact (`pipeline.vectors`): assignment, distance and mean are the same bits for any block of rows, number of workers
and number of threads.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline import vectors
from pipeline.vectors import Float16s, Float32s, Float64s, Floats

GRID = 2.0**24
PLUS_PLUS_CLUSTERS = 1024  # k-means++ costs K passes over the sample, one centroid at a time
GEMM_CELLS = 2**24  # cosines held at a time: 64 MiB
DENSE = 8  # centroids per row that can be nearest, above which one float64 product is cheaper than pairs
SUM_ROWS = 4096


def train(
    sample_MD: Floats, k: int, iterations: int, seed: int, threads: int, gpu: bool = False
) -> tuple[Float32s, Float64s]:
    """Cluster a sample by cosine with FAISS; the same sample, seed and processor give the same bits.

    Fewer distinct rows than `k`, or fewer rows, leave centroids that coincide or that no row is nearest to.

    Args:
        sample_MD: float16 or float32, shape (M, D), unit rows, at least one.
        k: clusters, at least 1.
        iterations: Lloyd iterations, at least 1.
        seed: of the initial centroids.
        threads: that FAISS uses.
        gpu: use every GPU that this host has, where FAISS is a GPU build.

    Returns:
        float32, shape (k, D): unit centroids; and float64, shape (iterations,): mean of 1 - cosine to the nearest
        centroid at the start of each iteration (float32 sums: for the report only).

    Raises:
        ValueError: an empty sample.

    Source: SemDeDup, arXiv:2303.09540, section 3 (spherical k-means with FAISS).
    """
    import faiss

    if not len(sample_MD):
        raise ValueError("k-means needs at least one row")
    vec_MD = np.resize(sample_MD.astype(np.float32), (max(k, len(sample_MD)), sample_MD.shape[1]))
    vec_MD /= np.linalg.norm(vec_MD, axis=1, keepdims=True)
    plus_plus = k <= PLUS_PLUS_CLUSTERS
    kmeans = faiss.Kmeans(
        vec_MD.shape[1],
        k,
        niter=iterations,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(vec_MD),  # FAISS subsamples to 256 a centroid unless told
        gpu=gpu and faiss.get_num_gpus() > 0,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS if plus_plus else faiss.ClusteringInitMethod_RANDOM,
    )
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        kmeans.train(vec_MD)
    finally:
        faiss.omp_set_num_threads(before)
    centroid_KD = np.asarray(kmeans.centroids, np.float64)
    # FAISS ends early when nothing moves, and copies as many rows as clusters without an iteration.
    sum_I = np.asarray(kmeans.obj, np.float64) if k < len(vec_MD) else np.array([float(len(vec_MD))])
    cos_I = np.pad(sum_I, (0, iterations - len(sum_I)), mode="edge") / len(vec_MD)
    return recentre(centroid_KD, np.ones(k, np.int64), on_grid(vec_MD[:k])), 1 - cos_I


def on_grid(centroid_KD: Floats) -> Float32s:
    """Round unit rows to the nearest multiples of 2^-24, which float32 holds exactly: float32, shape (K, D)."""
    return (np.rint(centroid_KD.astype(np.float64) * GRID) / GRID).astype(np.float32)


def nearest(vec_ND: Float16s, centroid_KD: Float32s, block_rows: int = 8192) -> tuple[NDArray[np.int32], Float32s]:
    """Assign each row to the centroid of the largest float64 cosine, the lowest id among equals.

    A float32 product finds the centroids that can be nearest; those are compared in float64. The answer does not depend
    on `block_rows`.

    Args:
        vec_ND: float16, shape (N, D), stored unit rows.
        centroid_KD: float32, shape (K, D), unit rows on the grid.
        block_rows: rows compared at a time, at least 1; changes speed and memory only.

    Returns:
        int32, shape (N,): cluster; and float32, shape (N,): 1 - cosine to its centroid, in [0, 2].

    Raises:
        ValueError: a row without a direction.
    """
    clusters, dims = centroid_KD.shape
    cluster_N = np.empty(len(vec_ND), np.int32)
    distance_N = np.empty(len(vec_ND), np.float32)
    centroid64_KD = centroid_KD.astype(np.float64)
    norm_K = vectors.norms(centroid_KD)
    unit_DK = (centroid64_KD / norm_K[:, None]).astype(np.float32).T
    slack = 2 * (dims + 8) * 2.0**-24  # twice the most that a float32 dot of unit rows can be off
    block_rows = min(block_rows, max(256, GEMM_CELLS // clusters))
    for start in range(0, len(vec_ND), block_rows):
        vec_BD = vec_ND[start : start + block_rows].astype(np.float64)
        norm_B = vectors.norms(vec_BD)
        if not (norm_B > 0).all():
            raise ValueError(f"row {start + int(np.argmin(norm_B > 0))} has no direction and so no nearest centroid")
        dot_BK = vec_ND[start : start + block_rows].astype(np.float32) @ unit_DK
        near_C = np.flatnonzero(
            dot_BK >= dot_BK.max(axis=1, keepdims=True) - (slack * norm_B[:, None]).astype(np.float32)
        )
        if len(near_C) > DENSE * len(vec_BD):
            cos_BK = vec_BD @ centroid64_KD.T
            cos_BK /= norm_B[:, None] * norm_K
            cluster_B = cos_BK.argmax(axis=1)
            best_B = cos_BK[np.arange(len(vec_BD)), cluster_B]
        else:
            row_C, cluster_C = divmod(near_C, clusters)
            cos_C = np.einsum("cd,cd->c", vec_BD[row_C], centroid64_KD[cluster_C]) / (norm_B[row_C] * norm_K[cluster_C])
            first_B = vectors.first_largest(cos_C, row_C)
            cluster_B, best_B = cluster_C[first_B], cos_C[first_B]
        cluster_N[start : start + block_rows] = cluster_B
        distance_N[start : start + block_rows] = np.maximum(1 - best_B, 0)  # the quotient may round above 1
    return cluster_N, distance_N


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
    sum_KD = np.zeros((k, vec_ND.shape[1]))
    for start in range(0, len(vec_ND), SUM_ROWS):
        cluster_B = cluster_N[start : start + SUM_ROWS]
        order_B = np.argsort(cluster_B, kind="stable")
        ids, begin = np.unique(cluster_B[order_B], return_index=True)
        sum_KD[ids] += np.add.reduceat(vec_ND[start : start + SUM_ROWS][order_B].astype(np.float64), begin, axis=0)
    return sum_KD, np.bincount(cluster_N, minlength=k)


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
