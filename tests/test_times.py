"""times.json: what all starts of a run took, kept while it goes on; other work in the same directory is not counted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipeline.curate import curate
from pipeline.executor import Serial
from pipeline.machine import Machine
from pipeline.recipe import recipe_of
from pipeline.run import Quiet, Run
from pipeline.storage import Root
from tests.pools import datacomp_pool
from tests.runs import datacomp


@dataclass
class Impatient(Quiet):
    """Interrupts a stage once so many of its parts are done."""

    stage: str = ""
    parts: int = 0
    now: str = ""

    def start(self, title: str, done: int, total: int) -> None:
        self.now = title

    def advance(self, rows: int) -> None:
        self.parts -= self.now == self.stage
        if self.now == self.stage and self.parts == 0:
            raise KeyboardInterrupt


def start(directory: Path, plain: dict[str, Any], progress: Quiet | None = None) -> dict[str, Any]:
    """One start of a run; what times.json tells after it."""
    run = Run(Root(str(directory / "store")), Root(str(directory)), Serial(), Machine(), progress or Quiet())
    try:
        curate(run, recipe_of(plain), group_units=2)
    except KeyboardInterrupt:
        assert not (directory / "checksums.sha256").exists()
    told: dict[str, Any] = json.loads((directory / "times.json").read_text())
    return told


def parts(told: dict[str, Any]) -> Counter[str]:
    made = Counter[str]()
    for entry in told["stages"]:
        made[entry["stage"]] += entry["parts"]
    return made


def test_a_run_that_was_interrupted_tells_what_all_of_its_starts_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.run.TIMES_S", 0)
    plain = {**datacomp(datacomp_pool(tmp_path / "pool", 4, 60, 1)), "select": [{"cut": {"score": "l14", "keep": 0.5}}]}
    run = tmp_path / "run"

    first = start(run, plain, Impatient("precomputed", 3))
    assert parts(first) == {"read": 4, "precomputed": 2}
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "\nso far: 2 stages computed in " in shown and "it keeps" not in shown

    second = start(run, plain)
    assert second["stages"][:2] == first["stages"]
    assert parts(second)["precomputed"] == 3  # the third of four was made, but its time was not kept
    assert second["found"] == {"precomputed": 1}
    report = json.loads((run / "report/report.json").read_text())["times"]
    assert report["found"] == {"precomputed": 1}
    assert {stage["stage"]: stage["parts"] for stage in report["stages"]} == parts(second)
    hours = sum(entry["core_hours"] for entry in second["stages"])
    assert report["taken"]["core_hours"] == hours > sum(entry["core_hours"] for entry in first["stages"])
    assert start(run, plain) == second

    other = start(run, {**plain, "select": [{"cut": {"score": "l14", "keep": 0.25}}]})
    assert other["found"] == {"read": 4, "precomputed": 4}
    assert not {"read", "precomputed"} & set(parts(other))


@pytest.mark.parametrize("left", [b"", b"[", b'{"stages": []}'])
def test_times_that_cannot_be_read_are_begun_anew(left: bytes, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/times.json").write_bytes(left)
    told = start(tmp_path / "run", datacomp(datacomp_pool(tmp_path / "pool", 1, 20, 1)))
    assert parts(told)["read"] == 1
