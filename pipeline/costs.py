"""What work takes: seconds by phase in, what bounds it out; hours, bytes and requests in, money out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.machine import Prices

GB = 10**9

PHASES = ("read", "decode", "image", "text", "write")
"""Of embedding a unit: seconds of the worker's own thread, but `decode`: processor seconds wherever they were spent."""


def bound(seconds: Mapping[str, float], workers: int, decoders: int) -> tuple[str, int]:
    """What embedding waits for most, and how many more cores would help it.

    The model: a worker reads and runs the image tower in turn while its decoders decode beside it; captions and writing
    follow. So its units take max(read + image, decode / decoders) + text + write, or the sum of all without decoders.
    What is done in the shadow of something longer bounds nothing. More cores help until decoding is in the shadow of
    reading and the image tower; from there on only more workers do.

    Args:
        seconds: of all workers, by phase (PHASES); a phase that is missing took none.
        workers: that the seconds are of, at least 1.
        decoders: threads that decode beside each worker; 0: it decodes in line.

    Returns:
        `reading`, `decoding`, `forward passes` or `writing`, the earlier among equals; and the cores to add in all.
    """
    read, decode, image, text, write = _of_phases(seconds)
    beside = read + image
    waited = {"reading": read, "decoding": decode, "forward passes": image + text, "writing": write}
    if decoders and decode / decoders > beside:
        waited |= {"reading": 0.0, "decoding": decode / decoders, "forward passes": text}
    elif decoders:
        waited["decoding"] = 0.0
    needed = math.ceil(decode / beside) if beside else decoders + (decode > 0)
    return max(waited, key=lambda name: waited[name]), max(0, needed - decoders) * workers


def embedding_seconds(seconds: Mapping[str, float], decoders: int) -> float:
    """How long one worker takes for work of so many seconds in each phase, by the model of `bound`."""
    read, decode, image, text, write = _of_phases(seconds)
    return (max(read + image, decode / decoders) if decoders else read + image + decode) + text + write


def _of_phases(seconds: Mapping[str, float]) -> list[float]:
    return [seconds.get(phase, 0.0) for phase in PHASES]


def verdict(seconds: Mapping[str, float], workers: int, decoders: int) -> str:
    """`bound` as a line for people."""
    name, more_cores = bound(seconds, workers, decoders)
    if more_cores:
        return f"bound by {name}; {more_cores} more core{'s' if more_cores > 1 else ''} to decode would help"
    faster = f"one more worker would make it {1 + 1 / workers:.3g} times as fast"
    return f"bound by {name}; more cores to decode would not help, {faster}"


@dataclass(frozen=True)
class Took:
    """What one task took.

    Attributes:
        worker: stands for the process that did it.
        seconds: from its start to its end.
        phases: of them, by phase (PHASES), where something was embedded.
    """

    worker: str
    seconds: float
    phases: Mapping[str, float]


@dataclass
class Spent:
    """What the tasks of a stage have taken so far."""

    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    workers: set[str] = field(default_factory=set)

    def add(self, took: Took) -> None:
        self.seconds += took.seconds
        self.workers.add(took.worker)
        for phase, seconds in took.phases.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds


def money(
    prices: Prices,
    core_hours: float = 0.0,
    gpu_hours: float = 0.0,
    stored_bytes: float = 0.0,
    egress_bytes: float = 0.0,
    requests: float = 0.0,
) -> dict[str, float]:
    """What each kind of use costs, in the prices' currency; storage for one month."""
    return {
        "cores": prices.cpu_core_hour * core_hours,
        "GPUs": prices.gpu_hour * gpu_hours,
        "storage, a month": prices.storage_gb_month * stored_bytes / GB,
        "egress": prices.egress_gb * egress_bytes / GB,
        "requests": prices.per_million_requests * requests / 10**6,
    }


def held_hours(stages: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Core-hours and GPU-hours of the stages in times.json."""
    entries = list(stages)
    core_hours, gpu_hours = (sum(entry[name] for entry in entries) for name in ("core_hours", "gpu_hours"))
    return core_hours, gpu_hours


def size(amount: float) -> str:
    """So many bytes, for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.3g} TB" if amount < 1000 else f"{amount:,.0f} TB"
