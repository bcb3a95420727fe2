"""Two ways to do the same work, timed in turn: the rows of bench.json.

A ratio is always "higher is better": our rate over the other's, or a limit over what we took of it.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

RUNS = 5


@dataclass(frozen=True)
class Row:
    """One measured line.

    Attributes:
        name: what was done, with its size.
        against: the peer or the limit.
        ratio: median of the ratios of the paired runs.
        target: that the ratio should reach.
        unit: of `ours` and `theirs`.
        ours, theirs: medians.
        low, high: smallest and largest ratio of the paired runs.
        runs: pairs measured.
    """

    name: str
    against: str
    ratio: float
    target: float
    unit: str
    ours: float
    theirs: float
    low: float
    high: float
    runs: int


def compare(
    name: str,
    against: str,
    target: float,
    unit: str,
    amount: float,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    runs: int = RUNS,
) -> Row:
    """Time both in turn, ours first in every other pair, after one run of each that does not count.

    Args:
        name, against, target, unit: see Row; `unit` is that of `amount` per second.
        amount: of work that one call does.
        ours, theirs: the same work, done once a call.
        runs: pairs; 1 also drops the warm-up, for work of minutes.
    """
    if runs > 1:
        ours(), theirs()
    pairs = []
    for run in range(runs):
        if run % 2:
            other, own = seconds(theirs), seconds(ours)
        else:
            own, other = seconds(ours), seconds(theirs)
        pairs.append((amount / own, amount / other))
    return paired(name, against, target, unit, pairs)


def paired(name: str, against: str, target: float, unit: str, pairs: Sequence[tuple[float, float]]) -> Row:
    """A row from rates measured side by side, (ours, theirs) of each pair."""
    ratios = [own / other for own, other in pairs]
    own, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Row(
        *(name, against, statistics.median(ratios), target, unit, own, other),
        *(min(ratios), max(ratios), len(pairs)),
    )


def within(name: str, limit: float, unit: str, measured: Sequence[float]) -> Row:
    """A row for a cost that has to stay below a limit: the ratio is limit / cost, its target 1."""
    ratios = [limit / max(value, 1e-3 * limit) for value in measured]  # of a thousandth or nothing: 1000
    return Row(
        *(name, f"at most {limit:g} {unit}", statistics.median(ratios), 1.0, unit),
        *(statistics.median(measured), limit, min(ratios), max(ratios), len(ratios)),
    )


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_rss_bytes() -> int:
    """Most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # for Linux hands getrusage's peak on to what a process starts
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def alone(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, int]:
    """What work gives in a process of its own, and the most memory that process held: bytes."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        result = process.submit(work, *args, **kwargs).result()
        return result, process.submit(peak_rss_bytes).result()
