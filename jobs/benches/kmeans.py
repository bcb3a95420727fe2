"""Training spherical k-means, against `faiss.Kmeans` as its users call it: same rows, seed, iterations and threads.

As many iterations, and fewer, each with its time and its objective: the mean cosine of all rows to their nearest
centroid.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import faiss
import numpy as np

from jobs.benches.assign import families
from jobs.benches.measure import RUNS, Row, paired, seconds
from pipeline.kmeans import nearest, on_grid, train
from pipeline.vectors import Float16s, Float32s

ROWS, DIMS, ITERATIONS = 200_000, 512, 10
TARGETS = {ITERATIONS: (2.0, 0.9995), 6: (3.0, 0.997)}
"""By our iterations: how many times as fast, at which part of the objective."""

CLUSTERS = (500, 4000)


def measure(scratch: Path) -> Iterator[Row]:
    """Rows of bench.json."""
    vec_ND = families(ROWS)
    unit_ND = vec_ND.astype(np.float32)
    threads = os.cpu_count() or 1
    faiss.omp_set_num_threads(threads)
    train(vec_ND[:50_000], 500, 2, 0, threads)  # loads what is loaded once, torch too
    for k in CLUSTERS:
        speeds: dict[int, list[tuple[float, float]]] = {ours: [] for ours in TARGETS}
        objectives: dict[int, list[tuple[float, float]]] = {ours: [] for ours in TARGETS}
        for run in range(RUNS):
            kmeans = faiss.Kmeans(
                *(DIMS, k),
                niter=ITERATIONS,
                spherical=True,
                seed=run,
                min_points_per_centroid=1,
                max_points_per_centroid=ROWS,
            )
            other_s = seconds(partial(kmeans.train, unit_ND))
            theirs = objective(vec_ND, on_grid(np.asarray(kmeans.centroids)))
            for ours in TARGETS:
                started = time.perf_counter()
                centroid_KD, _ = train(vec_ND, k, ours, run, threads)
                speeds[ours].append((3600 / (time.perf_counter() - started), 3600 / other_s))
                objectives[ours].append((objective(vec_ND, centroid_KD), theirs))
        for ours, (times, part) in TARGETS.items():
            name = f"k-means, {ROWS:,} x {DIMS}, k = {k}, {ours} iterations"
            against = f"faiss.Kmeans, {ITERATIONS} iterations"
            yield paired(name, against, times, "trainings/h", speeds[ours])
            yield paired(f"objective of {name}", against, part, "mean cosine", objectives[ours])


def objective(vec_ND: Float16s, centroid_KD: Float32s) -> float:
    """Mean cosine to the nearest centroid."""
    return 1 - float(nearest(vec_ND, centroid_KD)[1].mean(dtype=np.float64))
