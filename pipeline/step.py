"""Where a selection rule stands: what it may read, how much it may keep, and what it hands on.

A rule is a frozen dataclass in select/ whose fields are the recipe's keys, with `apply(step) -> Outcome`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, ConfigDict

from pipeline.parts import Dataset
from pipeline.run import Run
from pipeline.stage import Rows

log = logging.getLogger(__name__)

RULE = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Of every rule's dataclass: unknown keys, values of another type and numbers that are none are refused."""


def _keep(value: int | float) -> int | float:
    if (
        isinstance(value, bool)
        or (isinstance(value, int) and value < 2)
        or (isinstance(value, float) and not 0 < value <= 1)
    ):
        raise ValueError("keep is a fraction in (0, 1] or a whole number of at least 2")
    return value


Keep: TypeAlias = Annotated[int | float, AfterValidator(_keep)]
"""How much to keep: a fraction of the base, or a number of samples."""

Base: TypeAlias = Literal["survivors", "pool"]
"""What a fraction is of: the rows that entered the step, or every listed sample."""


def asked(keep: int | float, base: int) -> int:
    """Samples that `keep` asks for: floor(decimal value as written x base), or the number itself."""
    return keep if isinstance(keep, int) else math.floor(Decimal(str(keep)) * base)


@dataclass(frozen=True)
class Outcome:
    """What a rule hands on.

    Attributes:
        state: the state after it (schema.STATE), one part per group.
        dropped: why, for the rows that it dropped (schema.DROPPED); as many parts.
        assign: evidence for each row that entered (columns `at`, `cluster`, `distance`, ...), one part per group.
        files: small evidence: name below select/NN-NAME/ -> bytes.
        health: plain values for the report.
    """

    state: Dataset
    dropped: Dataset
    assign: Dataset | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One position in the recipe's list. All datasets have one part for each group of units.

    Attributes:
        number: position from 1.
        name: `NN-NAME`.
        seed: the recipe's.
        run: does the work.
        samples: schema.SAMPLES.
        columns: the pool's own metadata.
        vectors: model -> schema.VECTORS.
        scores: model -> schema.SCORES.
        state: schema.STATE before this step.
        places: given {"first_unit": ordinal of the group's first unit}.
        listed: rows of the whole pool.
    """

    number: int
    name: str
    seed: int
    run: Run
    samples: Dataset
    columns: Dataset
    vectors: Mapping[str, Dataset]
    scores: Mapping[str, Dataset]
    state: Dataset
    places: Dataset
    listed: int

    @property
    def survivors(self) -> int:
        """Rows alive before this step."""
        return sum(f["alive"] for f in self.state.facts())

    def base(self, of: Base) -> int:
        """Rows that a fraction is of."""
        return self.listed if of == "pool" else self.survivors

    def budget(self, keep: int | float, of: Base) -> int:
        """Rows to keep: what is asked for, or all of the survivors where it is more, with a warning."""
        want, have = asked(keep, self.base(of)), self.survivors
        if want > have:
            log.warning("%s: %d samples asked for, %d are left: all are kept", self.name, want, have)
        return min(want, have)

    def space(self, name: str) -> tuple[Dataset, str]:
        """The vectors and their column that a recipe's `space` names: MODEL, or MODEL.text."""
        model, _, side = name.partition(".")
        return self.vectors[model], side or "image"


def places_in(samples: Rows, place: Rows, at_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rows of a group stand in the pool: uint32 (M,), the ordinal of each one's unit, and of the row in it.

    Args:
        samples: of the group; only its lengths are asked for.
        place: of the group.
        at_M: int64, positions in the group.
    """
    ends = np.cumsum(np.asarray(samples.lengths, np.int64))
    unit_M = np.searchsorted(ends, at_M, side="right")
    row_M = at_M - np.concatenate([[0], ends])[unit_M]
    return (unit_M + place.given["first_unit"]).astype(np.uint32), row_M.astype(np.uint32)


def table_numbers(table: pa.Table, name: str) -> np.ndarray:
    """A metadata column as float64 (N,), NaN where it is missing, null or not a number."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    column = table.column(name)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.array([_number(v) for v in column.to_pylist()], np.float64)
    kinds = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    if any(is_kind(column.type) for is_kind in kinds):
        return np.asarray(pc.cast(column, pa.float64(), safe=False), np.float64)
    return np.full(table.num_rows, np.nan)


def _number(text: str | None) -> float:
    try:
        return float(text) if text is not None else math.nan
    except ValueError:
        return math.nan


def table_texts(table: pa.Table, name: str) -> list[str | None]:
    """A metadata column as text, None where it is missing or null."""
    if name not in table.column_names:
        return [None] * table.num_rows
    return [None if v is None else as_text(v) for v in table.column(name).to_pylist()]


def as_text(value: Any) -> str:
    """One metadata value as it is compared with a recipe's.

    true and false in lower case; whole numbers without a point, since a null makes pandas store them as floats; all
    else as str gives it.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
