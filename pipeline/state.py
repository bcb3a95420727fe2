"""What selection has decided so far: one row per listed sample, carried from step to step.

In: the state before a step, and which of the living rows it drops. Out: the state after it. A dropped row never changes
again, and every row is there in every state, so the counts add up by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SchemaError
from pipeline.machine import Machine
from pipeline.schema import ALIVE, PROBLEM, STATE, UID
from pipeline.stage import Function, Made, Rows


@dataclass(frozen=True)
class Verdict:
    """What a rule that looks at one row at a time says of each.

    Attributes:
        reason: string (N,), null where the row is kept.
        value: float64 (N,), what was measured; null where there is nothing to measure.
        threshold: float64 (N,), what it was compared with; null likewise.
        failing: every condition of the rule -> bool (N,), whether the row fails it, also where an earlier one already
            dropped it; for the report's overlaps.
    """

    reason: pa.Array
    value: pa.Array
    threshold: pa.Array
    failing: dict[str, np.ndarray] = field(default_factory=dict)


def alive(state: pa.Table) -> np.ndarray:
    """bool (N,): rows that no step has dropped."""
    return np.asarray(state.column("dropped_by").to_numpy() == ALIVE)


def drop(
    state: pa.Table,
    number: int,
    drop_N: np.ndarray,
    reason: str | pa.Array,
    value: pa.Array | None = None,
    threshold: pa.Array | pa.Scalar | None = None,
    duplicate_of: pa.Array | None = None,
) -> pa.Table:
    """The state after a step.

    Args:
        state: schema.STATE, N rows.
        number: the step's position in the recipe, from 1.
        drop_N: bool (N,): rows that it drops.
        reason: one for all, or string (N,).
        value: float64 (N,) or None: what was compared.
        threshold: float64 (N,), one for all, or None.
        duplicate_of: binary(16) (N,) or None.

    Raises:
        SchemaError: a row is dropped that is not alive, or the lengths differ.
    """
    if len(drop_N) != state.num_rows or (drop_N & ~alive(state)).any():
        raise SchemaError(f"step {number} drops rows that are not alive, or {len(drop_N)} of {state.num_rows} rows")
    mask = pa.array(drop_N)
    reason = pa.scalar(reason, pa.string()) if isinstance(reason, str) else reason

    def where(new: pa.Array | pa.Scalar | None, name: str) -> pa.ChunkedArray:
        return state.column(name) if new is None else pc.if_else(mask, new, state.column(name))

    columns = [
        pc.if_else(mask, pa.scalar(number, pa.uint8()), state.column("dropped_by")),
        where(reason, "reason"),
        where(value, "value"),
        where(threshold, "threshold"),
        where(duplicate_of, "duplicate_of"),
    ]
    return pa.table(columns, schema=STATE)


def made(before: pa.Table, after: pa.Table, lengths: Sequence[int]) -> Made:
    """A state as the output of a stage, with the counts that the rest of the run needs.

    Args:
        before: the state that the step was given.
        after: the state that it gives.
        lengths: rows of each unit of the group.

    Raises:
        SchemaError: a row was lost or gained.
    """
    if not before.num_rows == after.num_rows == sum(lengths):
        raise SchemaError(f"{before.num_rows} rows in, {after.num_rows} out, {sum(lengths)} listed")
    alive_N = alive(after)
    ends = np.cumsum([0, *lengths])
    new_N = alive(before) & ~alive_N
    reasons = after.column("reason").filter(pa.array(new_N)).value_counts().to_pylist()
    facts = {
        "entered": int(alive(before).sum()),
        "alive": int(alive_N.sum()),
        "dropped": dict(sorted((r["values"], r["counts"]) for r in reasons)),
        "alive_by_unit": [int(alive_N[a:b].sum()) for a, b in pairwise(ends)],
    }
    return Made({"state": after}, facts)


@dataclass(frozen=True)
class Begin:
    """The state before the first step: rows with a problem are dropped at once, all others are alive."""

    name: ClassVar[str] = "begin"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ("state",)
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.begin

    def begin(self, samples: Rows, *scores: Rows) -> Made:
        """Take the problem that reading found, else the first that a model's scores show."""
        problem = samples.table(["problem"]).column("problem")
        for rows in scores:
            problem = pc.coalesce(problem, rows.table(["problem"]).column("problem"))
        n = len(problem)
        dropped_by = pc.if_else(pc.is_valid(problem), pa.scalar(PROBLEM, pa.uint8()), pa.scalar(ALIVE, pa.uint8()))
        state = pa.table(
            [dropped_by, problem, pa.nulls(n, pa.float64()), pa.nulls(n, pa.float64()), pa.nulls(n, UID)], schema=STATE
        )
        return made(state, state, samples.lengths)
