"""Exact assignment to the nearest centroid, against the float32 product that it cannot do without.

The limit is the processor's own float32 rate for that product, measured before each run on the same cores. k-means asks
for the labels alone, the stages of a recipe for each row's float64 distance, too. Both have to be those that float64
products of all rows with all centroids give, bit by bit; that is checked here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from jobs.benches.cores import Pairs, on_every_core
from jobs.benches.measure import RUNS, Row, paired, seconds
from pipeline.kmeans import clusters_of, nearest, on_grid, partial_sums, recentre
from pipeline.machine import bf16_flags, keep_freed_memory
from pipeline.vectors import Float16s, Float32s, norms, unit16

ROWS, DIMS = 200_000, 512
CLUSTERS = (500, 4000)
FAMILIES = 3000
GEMM_ROWS, CHECKED_ROWS = 4096, 1024


def measure(scratch: Path) -> Iterator[Row]:
    """Rows of bench.json."""
    for k in CLUSTERS:
        for bf16 in (False, True) if bf16_flags() else (False,):
            name = f"assign {ROWS:,} x {DIMS} to {k} centroids, {'bfloat16' if bf16 else 'float32'} first"
            for work, what in ((clusters_of, "labels"), (nearest, "labels and distances")):
                pairs = on_every_core(partial(rates, k, bf16, work))
                yield paired(f"{name}, {what}", "float32 GEMM peak", 1.4 if bf16 else 0.85, "rows/s", pairs)


def rates(k: int, bf16: bool, work: Callable[..., object], number: int, cores: int) -> Pairs:
    """Rows per second of one core: ours, and of the product alone."""
    keep_freed_memory()  # as a worker does
    vec_ND = families(ROWS // cores, number)
    centroid_KD = mean_of_some(vec_ND, k)
    check(vec_ND, centroid_KD, bf16)
    pairs = []
    for _ in range(RUNS):
        peak = float32_rows(centroid_KD)
        pairs.append((len(vec_ND) / seconds(lambda: work(vec_ND, centroid_KD, bf16=bf16)), peak))
    return pairs


def check(vec_ND: Float16s, centroid_KD: Float32s, bf16: bool) -> None:
    """See that every row's cluster and distance are those of float64 products alone."""
    cluster_N, distance_N = nearest(vec_ND, centroid_KD, bf16=bf16)
    same_N = cluster_N == clusters_of(vec_ND, centroid_KD, bf16=bf16)
    centroid_DK, norm_K = centroid_KD.T.astype(np.float64), norms(centroid_KD)
    for start in range(0, len(vec_ND), CHECKED_ROWS):
        block = slice(start, start + CHECKED_ROWS)
        cos_BK = vec_ND[block].astype(np.float64) @ centroid_DK / (norms(vec_ND[block])[:, None] * norm_K)
        same_N[block] &= cluster_N[block] == cos_BK.argmax(axis=1)
        same_N[block] &= distance_N[block] == np.maximum(1 - cos_BK.max(axis=1), 0).astype(np.float32)
    if not same_N.all():
        raise AssertionError(f"{(~same_N).sum()} of {len(same_N)} rows are assigned otherwise than by float64 products")


def families(rows: int, seed: int = 0) -> Float16s:
    """float16 (rows, DIMS): unit rows around FAMILIES directions."""
    rng = np.random.default_rng(seed)
    family_FD = rng.standard_normal((FAMILIES, DIMS), np.float32)
    noise_ND = rng.standard_normal((rows, DIMS), np.float32)
    return unit16(family_FD[rng.integers(FAMILIES, size=rows)] + np.float32(0.9) * noise_ND)[0]


def mean_of_some(vec_ND: Float16s, k: int) -> Float32s:
    """Centroids as they are after two Lloyd steps on a few rows."""
    some_MD = vec_ND[: max(10 * k, 20_000)]
    centroid_KD = on_grid(some_MD[:k])
    for _ in range(2):
        centroid_KD = recentre(*partial_sums(some_MD, clusters_of(some_MD, centroid_KD), k), centroid_KD)
    return centroid_KD


def float32_rows(centroid_KD: Float32s) -> float:
    """Rows per second of the product alone, in large blocks whose result is thrown away."""
    vec_BD = np.ones((GEMM_ROWS, DIMS), np.float32)
    centroid_DK = centroid_KD.T
    dot_BK = np.empty((GEMM_ROWS, len(centroid_KD)), np.float32)
    times = sorted(seconds(lambda: np.matmul(vec_BD, centroid_DK, out=dot_BK)) for _ in range(6))
    return GEMM_ROWS / times[2]
