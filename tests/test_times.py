"""times.json: what all starts of a run took, kept while it goes on; other work in the same directory is not counted."""

from __future__ import annotations

import json
import uuid
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
from tests.pools import datacomp_pool, webdataset_pool
from tests.runs import datacomp


@dataclass
class Impatient(Quiet):
    """Ends a stage once so many of its parts are done."""

    stage: str = ""
    parts: int = 0
    end: type[BaseException] = KeyboardInterrupt
    now: str = ""

    def start(self, title: str, done: int, total: int) -> None:
        self.now = title

    def advance(self, rows: int) -> None:
        self.parts -= self.now == self.stage
        if self.now == self.stage and self.parts == 0:
            raise self.end


def start(directory: Path, plain: dict[str, Any], progress: Quiet | None = None) -> dict[str, Any]:
    """One start of a run; what times.json tells after it."""
    run = Run(Root(str(directory / "store")), Root(str(directory)), Serial(), Machine(), progress or Quiet(), times_s=0)
    try:
        curate(run, recipe_of(plain), group_units=2)
    except (KeyboardInterrupt, MemoryError):
        assert not (directory / "checksums.sha256").exists()
    told: dict[str, Any] = json.loads((directory / "times.json").read_text())
    return told


def parts(told: dict[str, Any]) -> Counter[str]:
    made = Counter[str]()
    for entry in told["stages"]:
        made[entry["stage"]] += entry["parts"]
    return made


@pytest.mark.parametrize(("end", "kept"), [(KeyboardInterrupt, 3), (MemoryError, 2)])
def test_a_run_that_was_interrupted_tells_what_all_of_its_starts_took(
    end: type[BaseException],
    kept: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = {**datacomp(datacomp_pool(tmp_path / "pool", 4, 60, 1)), "select": [{"cut": {"score": "l14", "keep": 0.5}}]}
    run = tmp_path / "run"

    first = start(run, plain, Impatient("precomputed", 3, end))
    assert parts(first) == {"read": 4, "precomputed": kept}
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "\nso far: 2 stages computed in " in shown and "it keeps" not in shown

    second = start(run, plain)
    assert second["stages"][:2] == first["stages"]
    assert parts(second)["precomputed"] == kept + 1
    lost = {"precomputed": 1} if kept == 2 else {}  # the third was made, but its time was not kept
    assert second["found"] == lost
    (took,) = (entry for entry in second["stages"][2:] if entry["stage"] == "precomputed")
    assert took["parts"] == 1
    report = json.loads((run / "report/report.json").read_text())["times"]
    assert report["found"] == lost
    assert {stage["stage"]: stage["parts"] for stage in report["stages"]} == parts(second)
    hours = sum(entry["core_hours"] for entry in second["stages"])
    assert report["taken"]["core_hours"] == hours > sum(entry["core_hours"] for entry in first["stages"])
    assert start(run, plain) == second

    other = start(run, {**plain, "select": [{"cut": {"score": "l14", "keep": 0.25}}]})
    assert other["found"] == {"read": 4, "precomputed": 4}
    assert not {"read", "precomputed"} & set(parts(other))


def test_times_of_other_work_are_not_shown_as_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = datacomp_pool(tmp_path / "pool", 3, 60, 1)
    start(tmp_path / "run", datacomp(pool))
    first = str(min(pool.glob("*.parquet")))
    less = {**datacomp(pool), "select": [{"random": {"keep": 9}}], "seed": 1}
    told = start(tmp_path / "run", {**less, "pool": {**less["pool"], "path": [first]}})
    assert told["found"] == {"read": 1, "precomputed": 1}
    (tmp_path / "run/times.json").unlink()
    again = start(tmp_path / "run", {**less, "pool": {**less["pool"], "path": [first]}})
    assert again["stages"] == []  # what it took is lost, and nothing was done anew
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "0 stages computed in 0.0 s, over all starts" in capsys.readouterr().out


def test_parts_that_a_remote_read_makes_at_once_are_not_said_to_be_found(tmp_path: Path) -> None:
    pool, remote = webdataset_pool(tmp_path / "pool", 2, 5, 1), Root(f"memory://{uuid.uuid4().hex}")
    for path in pool.iterdir():
        remote.write(path.name, path.read_bytes())
    plain = {
        "pool": {"format": "webdataset", "path": remote.url},
        "models": {name: {"weights": "tiny"} for name in ("one", "other")},
        "select": [{"cut": {"score": "one", "keep": 0.5}}],
        "limits": {"max_unreadable": 1},
    }
    told = start(tmp_path / "run", plain)
    assert parts(told)["read"] == 2 and "embed" not in parts(told)
    assert told["found"] == {}


@pytest.mark.parametrize("left", [b"", b"[", b"[]", b"3", b'{"work": "other"}', b'{"stages": [{}]}'])
def test_times_that_cannot_be_read_are_begun_anew(left: bytes, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/times.json").write_bytes(left)
    told = start(tmp_path / "run", datacomp(datacomp_pool(tmp_path / "pool", 1, 20, 1)))
    assert parts(told)["read"] == 1
