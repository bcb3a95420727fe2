"""Rows in are rows out and rows dropped: held in each unit, each stage and the run, by checks that raise."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.curate import alive_after
from pipeline.errors import SchemaError
from pipeline.formats.reading import Reading
from pipeline.parts import Dataset, File, Part
from pipeline.read import check
from pipeline.record import load_record, receipts_of
from pipeline.schema import ALIVE, PROBLEMS, SAMPLE_PROBLEMS, SAMPLES, STATE
from pipeline.state import drop, made
from pipeline.storage import Root
from pipeline.write import kept_rows
from tests.runs import datacomp_run

pytestmark = pytest.mark.goal("R7")

REASONS = {"columns.clip_l14_similarity_score", "duplicate", "low_score", "over_quota", "not_drawn"}
"""All that the rules of tests.runs.datacomp say of its pool, beside the problems of samples."""


def state(*dropped_by: int) -> pa.Table:
    rows = [{"dropped_by": number, "reason": None if number == ALIVE else "low_score"} for number in dropped_by]
    return pa.Table.from_pylist(rows, schema=STATE)


class Committed:
    """The rows of one part, at hand."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def table(self, columns: list[str]) -> pa.Table:
        return self._table.select(columns)


def counted(stage: str, rows: int, **facts: Any) -> Dataset:
    return Dataset(stage, "", (Part("", (File("", "", 0, rows, json.dumps(facts)),)),))


def test_a_unit_whose_damaged_row_has_no_line_is_refused() -> None:
    samples = pa.Table.from_pylist([{"uid": bytes(16), "key": "a", "problem": "missing_image"}], schema=SAMPLES)
    line = {"key": "a", "offset": 0, "reason": "missing_image", "detail": None}
    told = Reading(samples, pa.table({"x": [1]}), pa.Table.from_pylist([line], schema=PROBLEMS))
    check(told)
    with pytest.raises(SchemaError, match="a has the problem missing_image, and no line that tells it"):
        check(replace(told, problems=PROBLEMS.empty_table()))


def test_a_stage_that_loses_a_row_is_refused() -> None:
    before = state(0, 0, 0)
    after = drop(before, 1, np.array([True, False, False]), "low_score")
    facts = made(before, after, [1, 2]).facts
    assert (facts["entered"], facts["alive"], facts["dropped"]) == (3, 2, {"low_score": 1})
    with pytest.raises(SchemaError, match="3 rows in, 2 out, 3 listed"):
        made(before, after.slice(1), [1, 2])


def test_a_run_whose_counts_do_not_add_up_is_refused() -> None:
    begun = counted("begin", 9, entered=8, alive=8, dropped={})
    cut = counted("cut", 9, entered=8, alive=5, dropped={"low_score": 2, "no_score": 1})
    assert alive_after(9, [begun, cut]) == [8, 5]
    for wrong, message in (
        (counted("cut", 8, entered=8, alive=5, dropped={"low_score": 3}), "cut: 8 of 9 rows"),
        (counted("cut", 9, entered=8, alive=5, dropped={"low_score": 2}), "8 entered, 5 left, 2 dropped"),
        (counted("cut", 9, entered=7, alive=5, dropped={"low_score": 2}), "7 entered, 5 left, 2 dropped"),
    ):
        with pytest.raises(SchemaError, match=message):
            alive_after(9, [begun, wrong])


def test_an_output_shard_with_fewer_rows_than_are_due_is_refused() -> None:
    place = {"state_first": 0, "skip": 1, "take": 2}
    rows = Committed(state(0, 1, 0, 0))
    assert [kept.rows.tolist() for kept in kept_rows([2, 2], rows, place)] == [[0, 1]]
    with pytest.raises(SchemaError, match="2 kept rows where 3 are due"):
        list(kept_rows([2, 2], rows, place | {"take": 3}))


def test_every_stage_of_a_run_accounts_for_every_row(tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    run = datacomp_run(tmp_path)
    record = load_record(Root(str(run)))
    listed = record.funnel[0][1]
    balanced = 0
    for manifest in record.manifests:
        receipts = list(receipts_of(Root(f"{run}/store"), manifest))
        if "entered" in receipts[0]["facts"]:
            for facts in (receipt["facts"] for receipt in receipts):
                assert facts["entered"] == facts["alive"] + sum(facts["dropped"].values()), manifest
            assert sum(receipt["files"]["state"]["rows"] for receipt in receipts) == listed, manifest
            balanced += 1
    rows = pq.read_table(run / "decisions").to_pylist()
    dropped = Counter(row["step"] for row in rows)
    left = len(rows)
    for step, entered, after in record.funnel:
        assert (entered, after) == (left, left - dropped[step]), step
        left = after
    assert left == sum(row["kept"] for row in rows)
    assert {row["reason"] for row in rows if row["reason"]} - {*SAMPLE_PROBLEMS} == REASONS
    record_property(
        "figure", f"{listed} rows = {left} kept + {dropped.total() - dropped[None]} dropped; {balanced} stages balance"
    )
