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
from pipeline.schema import PROBLEMS, SAMPLE_PROBLEMS, SAMPLES, STATE
from pipeline.state import drop
from pipeline.step import Outcome
from pipeline.storage import Root
from pipeline.write import kept_rows
from tests.runs import datacomp_run

pytestmark = pytest.mark.goal("R7")

REASONS = {"columns.clip_l14_similarity_score", "duplicate", "low_score", "over_quota", "not_drawn"}
"""All that the rules of tests.runs.datacomp say of its pool, beside the problems of samples."""


def state(*dropped_by: int) -> pa.Table:
    return pa.table({"dropped_by": pa.array(dropped_by, pa.uint8())}, STATE)


class Committed:
    """The rows of one part, at hand."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def table(self, columns: list[str]) -> pa.Table:
        return self._table.select(columns)


def outcome(stage: str, rows: int, told: int, **facts: Any) -> Outcome:
    state, dropped = (
        Dataset(stage, "", (Part("", (File("", "", 0, found, json.dumps(facts)),)),)) for found in (rows, told)
    )
    return Outcome(state, dropped)


def test_a_unit_whose_damaged_row_has_no_line_is_refused() -> None:
    samples = pa.Table.from_pylist([{"uid": bytes(16), "key": "a", "problem": "missing_image"}], schema=SAMPLES)
    line = {"key": "a", "offset": 0, "reason": "missing_image", "detail": None}
    told = Reading(samples, pa.table({"x": [1]}), pa.Table.from_pylist([line], schema=PROBLEMS))
    check(told)
    with pytest.raises(SchemaError, match="a has the problem missing_image, and no line that tells it"):
        check(replace(told, problems=PROBLEMS.empty_table()))


def test_a_stage_that_loses_a_row_is_refused() -> None:
    before = state(0, 0, 0)
    facts = drop(before, 1, np.array([True, False, False]), [1, 2], "low_score").facts
    assert (facts["entered"], facts["alive"], facts["dropped"]) == (3, 2, {"low_score": 1})
    with pytest.raises(SchemaError, match="2 rows in, 3 judged, 3 listed"):
        drop(before.slice(1), 1, np.array([True, False, False]), [1, 2], "low_score")


def test_a_run_whose_counts_do_not_add_up_is_refused() -> None:
    begun = outcome("begin", 9, told=1, entered=9, alive=8, dropped={"bad_vector": 1})
    cut = outcome("cut", 9, told=3, entered=8, alive=5, dropped={"low_score": 2, "no_score": 1})
    assert alive_after(9, [begun, cut]) == [8, 5]
    for wrong, message in (
        (outcome("cut", 8, told=3, entered=8, alive=5, dropped={"low_score": 3}), "cut: 8 of 9 rows"),
        (outcome("cut", 9, told=2, entered=8, alive=5, dropped={"low_score": 2}), "8 entered, 5 left, 2 dropped"),
        (outcome("cut", 9, told=2, entered=7, alive=5, dropped={"low_score": 2}), "7 entered, 5 left, 2 dropped"),
        (outcome("cut", 9, told=2, entered=8, alive=5, dropped={"low_score": 3}), "5 left, 3 dropped, 2 told"),
    ):
        with pytest.raises(SchemaError, match=message):
            alive_after(9, [begun, wrong])
    with pytest.raises(SchemaError, match="9 entered, 8 left, 1 dropped, 2 told"):
        alive_after(9, [outcome("begin", 9, told=2, entered=9, alive=8, dropped={"bad_vector": 1}), cut])
    with pytest.raises(SchemaError, match="8 entered, 8 left, 0 dropped, 0 told"):
        alive_after(9, [outcome("begin", 9, told=0, entered=8, alive=8, dropped={}), cut])


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
            told = sum(receipt["files"]["dropped"]["rows"] for receipt in receipts)
            assert told == sum(sum(receipt["facts"]["dropped"].values()) for receipt in receipts), manifest
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
