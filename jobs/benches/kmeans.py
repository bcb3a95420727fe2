"""Training spherical k-means, against `faiss.Kmeans` as its users call it: same rows, seed, iterations and threads.

The lowest ratio of the objectives, the mean cosine of all rows to their nearest centroid, stands in the row's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np

from jobs.benches.assign import families
from jobs.benches.measure import Row, paired, seconds
from pipeline.kmeans import nearest, on_grid, train
from pipeline.vectors import Float16s, Float32s

ROWS, DIMS, ITERATIONS = 200_000, 512, 10
RUNS = {500: 3, 4000: 1}
"""Pairs by number of clusters: a minute or two each at 4000."""


def measure(scratch: Path) -> Iterator[Row]:
    """Rows of bench.json."""
    vec_ND = families(ROWS)
    unit_ND = vec_ND.astype(np.float32)
    threads = os.cpu_count() or 1
    faiss.omp_set_num_threads(threads)
    train(vec_ND[:50_000], 500, 2, 0, threads)  # loads what is loaded once, torch too
    for k, runs in RUNS.items():
        pairs, quality = [], 2.0
        for run in range(runs):
            ours: list[Float32s] = []
            own_s = seconds(lambda: ours.append(train(vec_ND, k, ITERATIONS, run, threads)[0]))  # noqa: B023
            kmeans = faiss.Kmeans(
                *(DIMS, k),
                niter=ITERATIONS,
                spherical=True,
                seed=run,
                min_points_per_centroid=1,
                max_points_per_centroid=ROWS,
            )
            other_s = seconds(lambda: kmeans.train(unit_ND))  # noqa: B023
            theirs = objective(vec_ND, on_grid(np.asarray(kmeans.centroids)))
            quality = min(quality, objective(vec_ND, ours[0]) / theirs)
            pairs.append((ROWS * ITERATIONS / own_s, ROWS * ITERATIONS / other_s))
        name = f"k-means, {ROWS:,} x {DIMS}, k = {k}, {ITERATIONS} iterations, at {quality:.4f} of the objective"
        target = 2.0 if quality >= 0.9995 else 3.0
        yield paired(name, "faiss.Kmeans", target, "rows x iterations/s", pairs)


def objective(vec_ND: Float16s, centroid_KD: Float32s) -> float:
    """Mean cosine to the nearest centroid."""
    return 1 - float(nearest(vec_ND, centroid_KD)[1].mean(dtype=np.float64))
