"""Selection steps on tables at hand: rows in, the state that a rule leaves out, through a real run in memory."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.arrow import fixed
from pipeline.executor import Serial
from pipeline.machine import Machine
from pipeline.parts import Dataset, File, Part, given, to_parquet
from pipeline.run import Run
from pipeline.schema import PROBLEM, SAMPLES, SCORES, VECTORS, embeddings
from pipeline.stage import Made
from pipeline.state import Begin, dropped_table, reasons
from pipeline.step import Outcome, Step
from pipeline.storage import Root
from pipeline.vectors import row_cosine, unit16


class Told:
    """The rows of a part at hand, one table for each unit (stage.Rows)."""

    def __init__(self, *tables: pa.Table, given: dict[str, Any] | None = None) -> None:
        self.tables, self.given, self.lengths = tables, given or {}, [t.num_rows for t in tables]
        self.facts: list[dict[str, Any]] = [{} for _ in tables]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        return pa.concat_tables(self.pieces(columns))

    def pieces(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        return (t if columns is None else t.select(columns) for t in self.tables)


def memory_run() -> Run:
    """A run whose store and directory nobody else has."""
    root = f"memory://{uuid.uuid4().hex}"
    return Run(Root(f"{root}/store"), Root(f"{root}/run"), Serial(), Machine())


def stored(run: Run, tables: Sequence[pa.Table]) -> Dataset:
    """Tables as a dataset, one part each."""
    parts = []
    for table in tables:
        data = to_parquet(table, internal=True)
        sha256 = hashlib.sha256(data).hexdigest()
        run.store.write(sha256, data)
        parts.append(Part(sha256[:8], (File(sha256, sha256, len(data), table.num_rows),)))
    return Dataset("stored", "", tuple(parts))


def samples_of(*rows: dict[str, Any]) -> pa.Table:
    """schema.SAMPLES of one unit; a uid and a key are made up where a row has none."""
    made = []
    for number, row in enumerate(rows):
        content = hashlib.md5(repr((number, sorted(row.items()))).encode()).digest()
        made.append({"uid": content, "key": str(number), **row})
    return pa.Table.from_pylist(made, schema=SAMPLES)


def uids(*numbers: int) -> pa.Table:
    """schema.SAMPLES of one unit whose uids are small numbers."""
    return samples_of(*({"uid": number.to_bytes(16, "big")} for number in numbers))


def evidence_of(image_ND: np.ndarray, text_ND: np.ndarray | None = None) -> pa.Table:
    """schema.embeddings of one unit; float16 rows as they are, others made unit; without texts there is no score."""
    image, ok = _unit(image_ND)
    text, both = _unit(image_ND if text_ND is None else text_ND)
    score = pa.array(row_cosine(image, text), mask=~(ok & both))
    columns = {
        "image": fixed(image, ok),
        "text": fixed(text, both),
        "score": pa.nulls(len(image), pa.float32()) if text_ND is None else score,
        "problem": pa.nulls(len(image), pa.string()),
        "detail": pa.nulls(len(image), pa.string()),
    }
    return pa.table(columns, embeddings(image_ND.shape[1]))


def evidence(made: Made) -> pa.Table:
    """schema.embeddings of what a stage made."""
    vectors, scores = made.tables["vectors"], made.tables["scores"]
    assert (tuple(vectors.column_names), tuple(scores.column_names)) == (VECTORS, SCORES)
    return pa.table([*vectors.columns, *scores.columns], pa.schema([*vectors.schema, *scores.schema]))


def _unit(vec_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (vec_ND, vec_ND.any(axis=1)) if vec_ND.dtype == np.float16 else unit16(vec_ND)


def scores_of(*scores: float | None) -> pa.Table:
    """schema.embeddings of one unit of which only the scores matter."""
    table = evidence_of(np.ones((len(scores), 2)))
    return table.set_column(2, "score", pa.array(scores, pa.float32()))


def step_of(
    run: Run,
    samples: Sequence[pa.Table],
    columns: Sequence[pa.Table] | None = None,
    evidence: dict[str, Sequence[pa.Table]] | None = None,
    group_units: int = 1,
    seed: int = 0,
    number: int = 1,
    name: str = "01-rule",
) -> Step:
    """The first step of a recipe over some units, of which `group_units` make a part."""
    bare = [pa.table({"none": pa.nulls(len(table), pa.string())}) for table in samples]
    groups = stored(run, samples).grouped(group_units)
    begun = run.map(Begin(), groups)
    places = given([{"first_unit": i * group_units, "group": i} for i in range(len(groups))])
    vectors, scores = (
        {
            m: stored(run, [t.select(names) for t in tables]).grouped(group_units)
            for m, tables in (evidence or {}).items()
        }
        for names in (VECTORS, SCORES)
    )
    own = stored(run, columns or bare).grouped(group_units)
    return Step(number, name, seed, run, groups, own, vectors, scores, begun["state"], places, groups.num_rows)


def state_of(step: Step, outcome: Outcome) -> pa.Table:
    """What a step decided of every row of the pool; the reason is `earlier` for what was dropped before."""
    by_N = table_of(step, outcome.state).column("dropped_by").to_numpy()
    earlier = [dropped_table(int((by_N == by).sum()), "earlier") for by in (PROBLEM, *range(1, step.number))]
    why = reasons(by_N, [*earlier, table_of(step, outcome.dropped)])
    return why.add_column(0, "dropped_by", pa.array(by_N))


def table_of(step: Step, dataset: Dataset) -> pa.Table:
    """All rows of a dataset."""
    return pa.concat_tables([step.run.rows(part).table() for part in dataset.parts])


def kept(step: Step, outcome: Outcome) -> list[int]:
    """Positions in the pool of the rows that a step leaves alive."""
    return np.flatnonzero(state_of(step, outcome).column("dropped_by").to_numpy() == 0).tolist()


def verdicts(step: Step, outcome: Outcome) -> list[tuple[Any, ...]]:
    """(reason, value, threshold) of every row of the pool."""
    rows = state_of(step, outcome).to_pylist()
    return [(row["reason"], row["value"], row["threshold"]) for row in rows]
