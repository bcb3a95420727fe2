"""The same work on every core at once, one thread each, as the workers of conf/machines/laptop.yaml do it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Pairs = Sequence[tuple[float, float]]


def on_every_core(work: Callable[[int, int], Pairs]) -> list[tuple[float, float]]:
    """Run `work(number, cores)` in a process for each core; its pairs of rates (ours, theirs) summed over them."""
    cores = os.cpu_count() or 1
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))  # read as the libraries are loaded
    try:
        with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as processes:
            found = list(processes.map(work, range(cores), [cores] * cores))
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return [(sum(own for own, _ in run), sum(other for _, other in run)) for run in zip(*found, strict=True)]
