"""Sharing a budget among clusters, against the quadratic program solver of the paper's code.

Several shares in a row are timed as one, for either: one of ours takes a millisecond, most of which is the first touch
of the memory that it works in, given back meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import osqp
from scipy import sparse

from jobs.benches.measure import Row, compare
from pipeline.select.density import allocate, softmax

CLUSTERS = 50_000
KEEP = 0.3
IN_A_ROW = 10
TOLERANCE = 1e-6
"""At which OSQP hits each quota to 1e-4 of a sample; at its default of 1e-3 the sum is off by thousands."""


def measure(scratch: Path) -> Iterator[Row]:
    """Rows of bench.json."""
    rng = np.random.default_rng(0)
    size_K = rng.geometric(1 / 5000, CLUSTERS).astype(np.int64)
    total = int(KEEP * size_K.sum())
    target_K = softmax(rng.gamma(9, 0.01, CLUSTERS), 0.1) * total
    low_K = np.minimum(1, size_K)
    quota_K = allocate(target_K, low_K, size_K, total)
    if quota_K.sum() != total or (quota_K < low_K).any() or (quota_K > size_K).any():
        raise AssertionError("the quotas are not what was asked for")
    solved_K = np.rint(program(target_K, low_K, size_K, total))
    against = f"OSQP to {TOLERANCE:g}, rounded: {int(solved_K.sum()) - total:+d} samples off"
    yield compare(
        *(f"share {total:,} samples among {CLUSTERS:,} clusters, exactly", against, 100.0, "clusters/s"),
        IN_A_ROW * CLUSTERS,
        lambda: [allocate(target_K, low_K, size_K, total) for _ in range(IN_A_ROW)],
        lambda: [program(target_K, low_K, size_K, total) for _ in range(IN_A_ROW)],
    )


def program(target_K: np.ndarray, low_K: np.ndarray, high_K: np.ndarray, total: int) -> np.ndarray:
    """min |x - target|^2 with sum(x) = total and low <= x <= high: float64 (K,)."""
    k = len(target_K)
    rows = sparse.vstack([np.ones((1, k)), sparse.eye(k)], format="csc")
    solver = osqp.OSQP()
    lower, upper = np.append(total, low_K).astype(float), np.append(total, high_K).astype(float)
    tolerances = {"eps_abs": TOLERANCE, "eps_rel": TOLERANCE}
    solver.setup(sparse.eye(k, format="csc"), -target_K, rows, lower, upper, verbose=False, **tolerances)
    solution: np.ndarray = solver.solve().x
    return solution
