"""Density-based pruning: clusters and their sizes in, how many samples each cluster keeps out."""

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.vectors import Bools, Float32s, Float64s, norms

CELLS = 2**22  # cosines held at a time: 32 MiB
FUZZ = 1e-9  # of a sample: a real-valued quota nearer than this to an integer is that integer


def d_inter(centroid_KD: Float32s, live_K: Bools, neighbours: int) -> Float64s:
    """Mean distance, 1 - cosine, of each live centroid to its nearest other live centroids.

    A centroid leaves itself out by its id, so centroids that coincide are at distance 0 from each other.

    Args:
        centroid_KD: float32, shape (K, D), unit rows.
        live_K: bool, shape (K,): clusters that have members.
        neighbours: centroids in the mean, at least 1; all others where there are fewer.

    Returns:
        float64, shape (K,), in [0, 2]: NaN where a cluster is not live, 0 where only one is.

    Source: DBP, arXiv:2401.04578, section 3 (d_inter; l = 20).
    """
    mean_K = np.full(len(centroid_KD), np.nan)
    live = np.flatnonzero(live_K)
    count = min(neighbours, len(live) - 1)
    if count < 1:
        mean_K[live] = 0
        return mean_K
    vec_LD = centroid_KD[live].astype(np.float64)
    norm_L = norms(vec_LD)
    block_rows = max(1, CELLS // len(live))
    for start in range(0, len(live), block_rows):
        # Divided after the product, which is exact for centroids on the grid of `kmeans` and so in any order of sums.
        distance_BL = vec_LD[start : start + block_rows] @ vec_LD.T
        distance_BL /= norm_L[start : start + block_rows, None] * norm_L
        np.subtract(1, distance_BL, out=distance_BL)
        own_B = np.arange(len(distance_BL))
        distance_BL[own_B, start + own_B] = np.inf
        nearest_BL = np.partition(distance_BL, count - 1, axis=1)[:, :count]
        mean_K[live[start + own_B]] = np.maximum(np.sort(nearest_BL, axis=1), 0).mean(axis=1)
    return mean_K


def softmax(complexity_K: Float64s, temperature: float) -> Float64s:
    """Probability of each cluster, exp(complexity / temperature) over the sum of all.

    Args:
        complexity_K: float64, shape (K,): NaN for a cluster without members.
        temperature: above 0; the lower, the more the complex clusters get.

    Returns:
        float64, shape (K,): sums to 1 over the clusters with a complexity, NaN for the others.

    Source: DBP, arXiv:2401.04578, section 3 (temperature 0.1).
    """
    weight_K: Float64s = np.exp((complexity_K - np.nanmax(complexity_K)) / temperature)
    weight_K /= np.nansum(weight_K)
    return weight_K


def project(
    target_K: Float64s, low_K: NDArray[np.int64], high_K: NDArray[np.int64], total: int
) -> tuple[Float64s, float]:
    """The quotas nearest to the targets, by least squares, that keep the bounds and sum to `total`.

    They are clip(target + shift, low, high) for the one shift that makes the sum right: the Karush-Kuhn-Tucker
    condition of the quadratic program that the paper solves numerically.

    Args:
        target_K: float64, shape (K,); of no account, and NaN allowed, where low and high are equal.
        low_K: int64, shape (K,), at most `high_K`.
        high_K: int64, shape (K,).
        total: from the sum of `low_K` to the sum of `high_K`.

    Returns:
        float64, shape (K,): the quotas; and the shift.

    Raises:
        ValueError: no quotas within the bounds sum to `total`.

    Source: DBP, arXiv:2401.04578, equation 3.
    """
    least, most = int(low_K.sum()), int(high_K.sum())
    if not least <= total <= most:
        raise ValueError(f"cannot share {total} samples: the clusters take {least} at least and {most} at most")
    free_K = low_K < high_K
    target_F, low_F, high_F = target_K[free_K], low_K[free_K], high_K[free_K]
    total_F = total - int(low_K[~free_K].sum())
    quota_K = low_K.astype(np.float64)
    if not free_K.any():
        return quota_K, 0.0

    # The sum over the clusters grows with the shift and bends where a cluster leaves `low` or reaches `high`.
    leaves_F, reaches_F = low_F - target_F, high_F - target_F
    bend = np.unique(np.concatenate([leaves_F, reaches_F]))
    below, above = 0, len(bend) - 1
    while above - below > 1:
        middle = (below + above) // 2
        if np.clip(target_F + bend[middle], low_F, high_F).sum() <= total_F:
            below = middle
        else:
            above = middle
    inside_F = (leaves_F <= bend[below]) & (bend[above] <= reaches_F)
    capped_F = reaches_F <= bend[below]
    fixed = int(high_F[capped_F].sum()) + int(low_F[~capped_F & ~inside_F].sum())
    shift = float(bend[below])
    if inside_F.any():
        shift = (total_F - fixed - math.fsum(target_F[inside_F])) / int(inside_F.sum())
    quota_K[free_K] = np.clip(target_F + shift, low_F, high_F)
    return quota_K, shift


def allocate(target_K: Float64s, low_K: NDArray[np.int64], high_K: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Whole quotas that sum to `total`: the projection, rounded by largest remainder, ties to the lowest cluster.

    Args:
        target_K: float64, shape (K,), as for `project`.
        low_K: int64, shape (K,), at most `high_K`.
        high_K: int64, shape (K,).
        total: from the sum of `low_K` to the sum of `high_K`.

    Returns:
        int64, shape (K,): within the bounds.

    Raises:
        ValueError: no quotas within the bounds sum to `total`.
    """
    real_K, _ = project(target_K, low_K, high_K, total)
    whole_K = np.rint(real_K)
    fuzzy_K = np.abs(real_K - whole_K) <= np.maximum(FUZZ, 8 * np.spacing(real_K))
    quota_K = np.where(fuzzy_K, whole_K, np.floor(real_K)).astype(np.int64)
    # Remainders are compared in steps of FUZZ, so that equal ones tie whatever their last bits are.
    remainder_K = np.where(fuzzy_K, 0, np.rint((real_K - quota_K) / FUZZ))
    quota_K[np.argsort(-remainder_K, kind="stable")[: total - int(quota_K.sum())]] += 1
    return quota_K
