"""status tells done from under way from failed, by what the store holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.executor import Serial
from pipeline.machine import Machine
from pipeline.run import Run
from pipeline.status import StageStatus, status
from pipeline.storage import Root
from tests.runs import datacomp_run
from tests.test_run import pool, run_of
from tests.toy_stages import Lines, Times


def test_a_finished_run_is_done_in_every_stage(tmp_path: Path) -> None:
    run = datacomp_run(tmp_path)
    found = status(Root(str(run)), Root(str(run / "store")))
    assert found.finished
    assert {stage.state for stage in found.stages} == {"done"}
    assert next(stage for stage in found.stages if stage.stage == "read") == StageStatus("read", 1, 3, 0, ())
    assert found.times is not None
    assert "read" in [entry["stage"] for entry in found.times["stages"]]


def test_a_stage_without_its_manifest_is_under_way_and_one_with_failures_failed(tmp_path: Path) -> None:
    store = Root(str(tmp_path / "store"))
    run = run_of(store, tmp_path, segment_parts=2)
    numbers = run.read(Lines(), pool(tmp_path / "pool", 4))["numbers"]
    (tmp_path / "down-11").touch()
    with pytest.raises(RunError):
        run.map(Times(2), numbers)
    found = status(run.directory, store)
    assert not found.finished
    assert found.times is None
    lines, times = found.stages
    assert lines == StageStatus("lines", 1, 4, 0, ())
    assert (lines.state, times.state) == ("done", "failed")
    assert times == StageStatus("times", 0, 3, 3, (("001.txt", "OSError: the disk is full"),))

    store.delete("failed/times.json")
    assert status(run.directory, store).stages[1].state == "under way"
    (tmp_path / "down-11").unlink()
    Run(store, run.directory, Serial(), Machine(scratch=str(tmp_path))).map(Times(2), numbers)
    assert status(run.directory, store).stages[1] == StageStatus("times", 1, 4, 0, ())


def test_new_parts_of_a_grown_pool_are_under_way(tmp_path: Path) -> None:
    store = Root(str(tmp_path / "store"))
    run = run_of(store, tmp_path)
    run.map(Times(2), run.read(Lines(), pool(tmp_path / "pool", 2))["numbers"])
    numbers = run.read(Lines(), pool(tmp_path / "pool", 4))["numbers"]
    (tmp_path / "down-31").touch()
    with pytest.raises(RunError):
        run.map(Times(2), numbers)
    assert status(run.directory, store).stages[1].pending == 1


def test_an_empty_folder_has_no_stage(tmp_path: Path) -> None:
    found = status(Root(str(tmp_path / "run")), Root(str(tmp_path / "run/store")))
    assert (found.finished, found.holders, found.stages, found.times) == (False, (), (), None)
