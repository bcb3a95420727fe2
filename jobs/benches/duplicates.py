"""The largest cosine to an earlier row inside clusters, against the product that it cannot do without, and the peer's.

The limit is the product of each cluster's upper triangle, n^2 / 2 cosines, in float32 and in bfloat16 where the
processor is faster at it. Beside each stands how many rows that product alone would decide otherwise: none, where it is
the limit of work that keeps the decisions. The peer is the dense form of SemDeDup's code: the whole matrix in float32,
its upper triangle, the maximum of each column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from jobs.benches.cores import Pairs, on_every_core
from jobs.benches.measure import RUNS, Row, paired, seconds
from pipeline.machine import bf16_flags, keep_freed_memory
from pipeline.select.dedup import repeats
from pipeline.vectors import Float16s, unit16

ROWS, DIMS, CLUSTERS = 100_000, 512, 12
COPIES = 0.2  # of the rows: another row of their cluster, changed to a cosine of 0.9 to 1
PRECISIONS = (torch.float32, torch.bfloat16) if bf16_flags() else (torch.float32,)
EPSILON = 0.05  # of the decisions
GEMM_ROWS = 4096


def measure(scratch: Path) -> Iterator[Row]:
    """Rows of bench.json."""
    name = f"duplicates in {CLUSTERS} clusters of {ROWS // CLUSTERS:,} x {DIMS}"
    for dtype in PRECISIONS:
        against = f"the triangle's product in {dtype}, which decides {flips(dtype)} rows otherwise"
        pairs = on_every_core(partial(beside_the_product, dtype))
        yield paired(name, against.replace("torch.", ""), 0.7, "cosines/s", pairs)
    yield paired(name, "SemDeDup's dense form (torch, float32)", 1.5, "cosines/s", on_every_core(beside_the_dense_form))


def flips(dtype: torch.dtype) -> int:
    """Rows of all clusters that the bare product's largest cosine keeps where the exact one drops, or drops instead."""
    found = 0
    for vec_ND in clusters_of(0, 1):
        low = torch.nn.functional.normalize(torch.from_numpy(vec_ND).float()).to(dtype)
        bare_N = torch.tril(low @ low.T, diagonal=-1).max(dim=1)[0].double().numpy()
        found += int(((bare_N > 1 - EPSILON) != (repeats(vec_ND)[0] > 1 - EPSILON)).sum())
    return found


def beside_the_product(dtype: torch.dtype, number: int, cores: int) -> Pairs:
    """Cosines per second of one core on its clusters: ours, and of the product alone."""
    clusters = clusters_of(number, cores)
    pairs = []
    for _ in range(RUNS):
        limit = gemm_rate(dtype) / (2 * DIMS)
        pairs.append((rate(repeats, clusters), limit))
    return pairs


def beside_the_dense_form(number: int, cores: int) -> Pairs:
    """The same beside the peer."""
    clusters = clusters_of(number, cores)
    return [(rate(repeats, clusters), rate(dense, clusters)) for _ in range(RUNS)]


def rate(work: Callable[[Float16s], object], clusters: list[Float16s]) -> float:
    """Cosines of rows with earlier ones per second."""
    return sum(len(vec_ND) ** 2 / 2 for vec_ND in clusters) / seconds(lambda: [work(vec_ND) for vec_ND in clusters])


def clusters_of(number: int, cores: int) -> list[Float16s]:
    """Every cluster of so many that falls to one core, whose process keeps freed memory as a worker does."""
    keep_freed_memory()
    return [cluster(seed, ROWS // CLUSTERS) for seed in range(number, CLUSTERS, cores)]


def cluster(seed: int, rows: int) -> Float16s:
    """float16 (rows, DIMS): unit rows around one direction, in families, some nearly equal."""
    rng = np.random.default_rng(seed)
    family_FD = rng.normal(size=(1, DIMS)) + rng.normal(size=(60, DIMS))
    vec_ND = family_FD[rng.integers(60, size=rows)] + rng.normal(size=(rows, DIMS))
    copy_C = rng.choice(rows, int(COPIES * rows), replace=False)
    distance_C = rng.uniform(0, 0.8, (len(copy_C), 1))
    vec_ND[copy_C] = vec_ND[rng.integers(rows, size=len(copy_C))] + distance_C * rng.normal(size=(len(copy_C), DIMS))
    return unit16(vec_ND)[0]


def dense(vec_ND: Float16s) -> torch.Tensor:
    """As semdedup.py does it: the largest cosine to an earlier row, 0 at least."""
    unit = torch.from_numpy(vec_ND).float()
    return torch.triu(unit @ unit.T, diagonal=1).max(dim=0)[0]


def gemm_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large product, median of 5."""
    a = torch.randn(GEMM_ROWS, DIMS).to(dtype)
    out = torch.empty(GEMM_ROWS, GEMM_ROWS, dtype=dtype)
    times = sorted(seconds(lambda: torch.mm(a, a.T, out=out)) for _ in range(6))
    return 2 * GEMM_ROWS**2 * DIMS / times[2]
