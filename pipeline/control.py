"""The control of every step: what a random subset of the same size would have been. Rows in, means and coverage out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.tally import Drawn
from pipeline.vectors import draw


def controls(drawn: Drawn, steps: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """Compare what each step kept, and the whole path, with as many rows of lowest hash among those that entered.

    Args:
        drawn: the rows to look at.
        steps: `NN-NAME` of each, in order.
        seed: the recipe's; the hash is that of `random-control/NN-NAME`, and `random-control/pool` for the end.

    Returns:
        Step, or `pool` for the whole path -> entered, kept (rows looked at); scores: name -> mean of those that
        entered, were kept, were drawn at random; clusters: how many held rows, and hold rows after either.
    """
    compared = {
        name: _compare(drawn, drawn.number >= at, drawn.number > at, seed, name) for at, name in enumerate(steps, 1)
    }
    kept = drawn.number > len(steps)
    return compared | {"pool": _compare(drawn, np.ones(len(kept), bool), kept, seed, "pool")}


def lowest(hash_M: np.ndarray, rows: int) -> np.ndarray:
    """Positions of the `rows` lowest hashes, the earlier first among equals."""
    return np.argsort(hash_M, kind="stable")[:rows]


def _compare(drawn: Drawn, entered: np.ndarray, kept: np.ndarray, seed: int, name: str) -> dict[str, Any]:
    into, out = np.flatnonzero(entered), np.flatnonzero(kept)
    hash_M = draw(seed, f"random-control/{name}", [drawn.uid[i] for i in into])
    control = into[lowest(hash_M, len(out))]
    scores = {
        score: {"entered": _mean(value[into]), "kept": _mean(value[out]), "random": _mean(value[control])}
        for score, value in drawn.scores.items()
    }
    found: dict[str, Any] = {"entered": len(into), "kept": len(out), "scores": scores}
    if name in drawn.clusters:
        cluster = drawn.clusters[name]
        found["clusters"] = {
            "entered": _distinct(cluster[into]),
            "kept": _distinct(cluster[out]),
            "random": _distinct(cluster[control]),
        }
    return found


def _mean(value: np.ndarray) -> float | None:
    finite = value[np.isfinite(value)]
    return float(finite.mean()) if len(finite) else None


def _distinct(cluster: np.ndarray) -> int:
    return len(np.unique(cluster[cluster >= 0]))
