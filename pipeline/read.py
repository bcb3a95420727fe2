"""The first stage: a unit of the pool in, its samples, its own columns and its problems out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from pipeline.errors import SchemaError
from pipeline.formats.reading import Reading
from pipeline.machine import Machine
from pipeline.pool import FORMATS
from pipeline.schema import PROBLEMS, SAMPLE_PROBLEMS, SAMPLES
from pipeline.stage import Files, Function, Made


@dataclass(frozen=True)
class Read:
    """List the samples of a unit.

    Attributes:
        format: of the pool, one of FORMATS.
    """

    format: str
    name: ClassVar[str] = "read"
    version: ClassVar[int] = 3
    outputs: ClassVar[tuple[str, ...]] = ("samples", "columns", "problems")
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        """A function from the unit's Files to the three tables of its Reading."""
        layout = FORMATS[self.format]

        def function(files: Files) -> Made:
            reading = layout.read(files)
            check(reading)
            return Made(
                {"samples": reading.samples, "columns": reading.columns, "problems": reading.problems}, facts(reading)
            )

        return function


def check(reading: Reading) -> None:
    """Hold a format to its promise.

    Raises:
        SchemaError: a schema differs, `samples` and `columns` are not aligned, a sample has no uid or key, or a
            problem is none of SAMPLE_PROBLEMS or has no line among `problems`.
    """
    for name, table, schema in (("samples", reading.samples, SAMPLES), ("problems", reading.problems, PROBLEMS)):
        if table.schema != schema:
            raise SchemaError(f"read: {name} has the schema {table.schema}, expected {schema}")
    if len(reading.samples) != len(reading.columns):
        raise SchemaError(f"read: {len(reading.samples)} samples, but {len(reading.columns)} rows of columns")
    for name in ("uid", "key"):
        if reading.samples[name].null_count:
            raise SchemaError(f"read: a sample without {name}")
    for reason in set(reading.samples["problem"].drop_null().to_pylist()).difference(SAMPLE_PROBLEMS):
        raise SchemaError(f"read: unknown problem {reason!r}")
    damaged = reading.samples.filter(reading.samples["problem"].is_valid())
    found = Counter(zip(damaged["key"].to_pylist(), damaged["problem"].to_pylist(), strict=True))
    told = Counter(zip(reading.problems["key"].to_pylist(), reading.problems["reason"].to_pylist(), strict=True))
    for key, reason in found - told:
        raise SchemaError(f"read: {key} has the problem {reason}, and no line that tells it")


def facts(reading: Reading) -> dict[str, object]:
    """Rows; rows with a problem, by reason; lines that name no sample: damage of the shard itself; column names."""
    reasons = Counter(reading.samples["problem"].drop_null().to_pylist())
    return {
        "rows": len(reading.samples),
        "problems": dict(sorted(reasons.items())),
        "shard_problems": reading.problems["key"].null_count,
        "columns": sorted(reading.columns.column_names),
    }
