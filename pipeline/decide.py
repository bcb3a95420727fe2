"""The written record: a decision for every listed sample, the evidence of each clustering, and every problem found.

In: groups of units with their final state. Out: parquet files of the run directory, one of each kind for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrow import hex_column
from pipeline.errors import SchemaError
from pipeline.machine import Machine
from pipeline.parts import to_parquet
from pipeline.schema import ALIVE, PROBLEM, PROBLEMS
from pipeline.stage import Function, Made, Rows, Sink
from pipeline.state import reasons
from pipeline.step import table_numbers, table_texts

READ = "00-read"
"""The step that drops rows with a problem."""


def parquet_file(table: pa.Table, bloom: Sequence[str] = ()) -> Callable[[Sink], None]:
    """What writes a table as a parquet file."""

    def write(out: Sink) -> None:
        out.write(to_parquet(table, bloom))

    return write


def shards_of(labels: Rows, lengths: Sequence[int]) -> pa.Array:
    """The shard of each row of a group: string (N,)."""
    shards = pa.array(labels.given["shards"], pa.string())
    return shards.take(pa.array(np.repeat(np.arange(len(lengths)), lengths)))


@dataclass(frozen=True)
class Decide:
    """One row per listed sample: kept, or dropped with step, reason, value and threshold.

    Attributes:
        steps: `NN-NAME` of each step, in order.
        models: names of the models whose score is a column; their scores follow the state.
        columns: name and type (float64 or string) of the pool's columns that a step used.
    """

    steps: tuple[str, ...]
    models: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]

    name: ClassVar[str] = "decide"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.decide

    def decide(self, samples: Rows, columns: Rows, state: Rows, labels: Rows, *others: Rows) -> Made:
        """The group's part of decisions/.

        Args:
            samples, columns, state: of the group, the state after the last step.
            labels: of the group.
            others: what reading and each step dropped (schema.DROPPED), then the scores of each model.

        Raises:
            SchemaError: the state and the samples have different rows.
        """
        listed, by_N = samples.table(["uid", "key", "problem"]), state.table().column("dropped_by").to_numpy()
        if listed.num_rows != len(by_N):
            raise SchemaError(f"{listed.num_rows} samples listed, {len(by_N)} decided")
        dropped, scores = others[: 1 + len(self.steps)], others[1 + len(self.steps) :]
        why = reasons(by_N, [rows.table() for rows in dropped])
        names = pa.array([None, *self.steps, READ], pa.string())
        step = names.take(pa.array(np.where(by_N == PROBLEM, len(self.steps) + 1, by_N).astype(np.int64)))
        problem = pc.if_else(pa.array(by_N == PROBLEM), why.column("reason"), pa.scalar(None, pa.string()))
        table = {
            "uid": hex_column(listed.column("uid")),
            "shard": shards_of(labels, samples.lengths),
            "key": listed.column("key"),
            "problem": problem,
            "kept": pa.array(by_N == ALIVE),
            "step": step,
            "reason": why.column("reason"),
            "value": why.column("value"),
            "threshold": why.column("threshold"),
            "duplicate_of": hex_column(why.column("duplicate_of")),
        }
        for model, rows in zip(self.models, scores, strict=True):
            table[f"score_{model}"] = rows.table(["score"]).column("score")
        pieces = list(columns.pieces()) if self.columns else []
        for name, kind in self.columns:
            table[name] = pa.concat_arrays([used_column(piece, name, kind) for piece in pieces])
        return Made({}, exports={labels.given["path"]: parquet_file(pa.table(table), bloom=["uid"])})


def used_column(table: pa.Table, name: str, kind: str) -> pa.Array:
    """A metadata column as the decisions hold it: float64 or string, null where it is missing or has another type."""
    if kind == "double":
        return pa.array(table_numbers(table, name), pa.float64(), from_pandas=True)
    return pa.array(table_texts(table, name), pa.string())


@dataclass(frozen=True)
class ShowAssignment:
    """select/NN-NAME/assign: the cluster of every survivor that entered a step, by uid, shard and key."""

    name: ClassVar[str] = "show_assignment"
    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.show

    def show(self, assign: Rows, samples: Rows, labels: Rows) -> Made:
        table, listed = assign.table(), samples.table(["uid", "key"])
        at = table.column("at").combine_chunks()
        columns = {
            "uid": hex_column(listed.column("uid")).take(at),
            "shard": shards_of(labels, samples.lengths).take(at),
            "key": listed.column("key").take(at),
            "cluster": table.column("cluster"),
            "distance": table.column("distance"),
        }
        if "max_cosine" in table.column_names:
            columns["max_cosine"] = table.column("max_cosine")
            columns["duplicate_of"] = hex_column(table.column("duplicate_of"))
        return Made({}, exports={labels.given["path"]: parquet_file(pa.table(columns), bloom=["uid"])})


@dataclass(frozen=True)
class ShowProblems:
    """problems/: every damaged sample or shard that reading, decoding or the vectors showed."""

    name: ClassVar[str] = "show_problems"
    version: ClassVar[int] = 2
    outputs: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True

    def build(self, machine: Machine) -> Function:
        return self.show

    def show(self, problems: Rows, samples: Rows, labels: Rows, *scores: Rows) -> Made:
        shards = labels.given["shards"]
        tables = [_labelled(piece, shard) for piece, shard in zip(problems.pieces(), shards, strict=True)]
        seen = [rows.pieces(["problem", "detail"]) for rows in scores]
        for listed, shard in zip(samples.pieces(["key", "image"]), shards, strict=True):
            found = [next(pieces) for pieces in seen]
            if found:
                problem = pc.coalesce(*(f.column("problem") for f in found))
                detail = pc.coalesce(*(f.column("detail") for f in found))
                offset = pc.struct_field(listed.column("image"), "offset")
                lines = pa.table([listed.column("key"), offset, problem, detail], schema=PROBLEMS)
                tables.append(_labelled(lines.filter(pc.is_valid(problem)), shard))
        return Made({}, exports={labels.given["path"]: parquet_file(pa.concat_tables(tables))})


def _labelled(problems: pa.Table, shard: str) -> pa.Table:
    return problems.add_column(0, "shard", pa.array([shard] * problems.num_rows, pa.string()))
