"""What selection has decided so far: one row per listed sample, carried from step to step.

In: the state before a step, and which of the living rows it drops. Out: the state after it, and why for those alone. A
dropped row never changes again, and every row is there in every state, so the counts add up by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrow import valid
from pipeline.errors import SchemaError
from pipeline.machine import Machine
from pipeline.schema import ALIVE, DROPPED, PROBLEM, STATE
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
    before: pa.Table,
    number: int,
    drop_N: np.ndarray,
    lengths: Sequence[int],
    reason: str | pa.Array,
    value: pa.Array | None = None,
    threshold: float | pa.Array | None = None,
    duplicate_of: pa.Array | None = None,
) -> Made:
    """What a step makes of a group: the state after it, why it dropped what it dropped, and the counts.

    Args:
        before: schema.STATE, N rows.
        number: the step's position in the recipe, from 1; PROBLEM for reading.
        drop_N: bool (N,): rows that it drops; M of them.
        lengths: rows of each unit of the group.
        reason: one for all, or string or dictionary (M,).
        value: float64 (M,) or None: what was compared.
        threshold: float64, one for all or (M,), or None.
        duplicate_of: binary(16) (M,) or None.

    Returns:
        `state` (schema.STATE, N rows) and `dropped` (schema.DROPPED, M rows).

    Raises:
        SchemaError: a row is dropped that is not alive, or the lengths differ.
    """
    by_N = before.column("dropped_by").to_numpy()
    alive_N = by_N == ALIVE
    if not len(drop_N) == len(by_N) == sum(lengths):
        raise SchemaError(f"step {number}: {len(by_N)} rows in, {len(drop_N)} judged, {sum(lengths)} listed")
    if (drop_N & ~alive_N).any():
        raise SchemaError(f"step {number} drops rows that are not alive")
    dropped = dropped_table(int(drop_N.sum()), reason, value, threshold, duplicate_of)
    left_N = alive_N & ~drop_N
    counts = dropped.column("reason").value_counts().to_pylist()
    units = pairwise(np.cumsum([0, *lengths]))
    facts = {
        "entered": int(alive_N.sum()),
        "alive": int(left_N.sum()),
        "dropped": dict(sorted((c["values"], c["counts"]) for c in counts)),
        "alive_by_unit": [int(left_N[a:b].sum()) for a, b in units],
    }
    after = pa.table([np.where(drop_N, np.uint8(number), by_N)], schema=STATE)
    return Made({"state": after, "dropped": dropped}, facts)


def dropped_table(
    rows: int,
    reason: str | pa.Array,
    value: pa.Array | None = None,
    threshold: float | pa.Array | None = None,
    duplicate_of: pa.Array | None = None,
) -> pa.Table:
    """schema.DROPPED of so many rows, from the arguments of `drop`.

    Raises:
        SchemaError: a column has more or fewer.
    """

    def column(given: Any, kind: pa.DataType) -> pa.Array:
        if given is None:
            return pa.nulls(rows, kind)
        if isinstance(given, pa.Array):
            return given
        if pa.types.is_dictionary(kind):
            return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), [given])
        return pa.repeat(pa.scalar(given, kind), rows)

    if isinstance(reason, pa.StringArray):
        reason = reason.dictionary_encode()
    given = (reason, value, threshold, duplicate_of)
    columns = [column(values, field.type) for values, field in zip(given, DROPPED, strict=True)]
    if any(len(c) != rows or c.type != field.type for c, field in zip(columns, DROPPED, strict=True)):
        found = ", ".join(f"{len(c)} of {c.type}" for c in columns)
        raise SchemaError(f"{rows} rows are dropped, and told of: {found}")
    return pa.table(columns, schema=DROPPED)


def reasons(by_N: np.ndarray, dropped: Sequence[pa.Table]) -> pa.Table:
    """Why each row was dropped.

    Args:
        by_N: uint8 (N,), the last state's.
        dropped: schema.DROPPED of `Begin`, then of each step from 1.

    Returns:
        N rows with the columns of schema.DROPPED, the reason as string; null for rows that are alive.

    Raises:
        SchemaError: a step tells of more or fewer rows than it dropped.
    """
    at_N, first = np.full(len(by_N), -1, np.int64), 0
    for number, table in zip((PROBLEM, *range(1, len(dropped))), dropped, strict=True):
        rows = np.flatnonzero(by_N == number)
        if len(rows) != table.num_rows:
            raise SchemaError(f"step {number} dropped {len(rows)} rows, and says why of {table.num_rows}")
        at_N[rows] = np.arange(first, first + len(rows))
        first += len(rows)
    at = pa.array(at_N, mask=at_N < 0)
    texts = (table.set_column(0, "reason", table.column("reason").cast(pa.string())) for table in dropped)
    return pa.concat_tables(texts).combine_chunks().take(at)


@dataclass(frozen=True)
class Begin:
    """The state before the first step: rows with a problem are dropped at once, all others are alive."""

    name: ClassVar[str] = "begin"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ("state", "dropped")
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.begin

    def begin(self, samples: Rows, *scores: Rows) -> Made:
        """Take the problem that reading found, else the first that a model's scores show."""
        problem = samples.table(["problem"]).column("problem")
        for rows in scores:
            problem = pc.coalesce(problem, rows.table(["problem"]).column("problem"))
        bad_N = valid(problem)
        everyone = pa.table([np.full(len(bad_N), ALIVE, np.uint8)], schema=STATE)
        return drop(everyone, PROBLEM, bad_N, samples.lengths, problem.drop_null().combine_chunks())
