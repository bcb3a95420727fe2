"""The command line as a user sees it: exit codes, and one message without a traceback."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.cli import main
from pipeline.parts import digest
from pipeline.recipe import load_recipe
from tests.pools import datacomp_pool, webdataset_pool
from tests.runs import datacomp, webdataset

ROOT = Path(__file__).parents[1]


def write_recipe(folder: Path, recipe: dict[str, Any]) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.fixture
def recipe(written: tuple[str, Path]) -> str:
    return written[0]


@pytest.fixture
def short(tmp_path: Path) -> str:
    """A recipe of few stages."""
    return write_recipe(tmp_path, webdataset(webdataset_pool(tmp_path / "pool", 2, 20, 1)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe, and its finished run; to be copied by those who change it."""
    folder = tmp_path_factory.mktemp("written")
    recipe = write_recipe(folder, datacomp(datacomp_pool(folder / "pool", 2, 40, 1)))
    assert run(recipe, folder / "run") == 0
    return recipe, folder / "run"


@pytest.fixture
def finished(written: tuple[str, Path], tmp_path: Path) -> tuple[str, Path]:
    return written[0], Path(shutil.copytree(written[1], tmp_path / "finished"))


def run(recipe: str, directory: Path, *more: str) -> int:
    return main(["run", recipe, "--run", str(directory), "--executor", "serial", *more])


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    """The message of a command that must fail with a code."""
    assert main(argv) == code
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def digests(directory: Path) -> dict[str, str]:
    """Every file of a run directory that equal runs have in common."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).parts[0] not in ("store", "times.json", "report")
        if path.name != "checksums.sha256"  # it has the report's lines
    }


def test_a_run_prints_its_funnel_and_a_second_one_computes_nothing(
    short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    assert run(short, directory) == 0
    shown = capsys.readouterr().out
    assert "01-filter" in shown
    assert "18 of 38 samples kept" in shown
    assert str(directory / "report/index.html") in shown
    first = digests(directory)
    times = (directory / "times.json").read_bytes()
    assert json.loads(times)["stages"]
    assert run(short, directory) == 0
    assert (directory / "times.json").read_bytes() == times  # written anew only where something was computed
    assert digests(directory) == first


def test_an_unknown_key_is_named_with_the_nearest_one(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ("--set", "select.1.dedup.epsilom=0.1")
    message = refused(capsys, 2, "run", recipe, "--run", str(tmp_path / "run"), "--executor", "serial", *change)
    assert message == "pairsieve: recipe.select.1.dedup.epsilom: unknown key; did you mean 'epsilon'?\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("select", "--set select: expected KEY=VALUE"),
        ("select.9.cut.keep=0.5", "--set select.9.cut.keep: '9' is not an index of a list of 5"),
        ("select.2.cut.keep=1.5", "recipe.select.2.cut.keep: "),
        ("pool.format=webdatset", "recipe.pool.format: "),
        ("models.l14.image=b99_img", "b99_img"),
        ("pool.path=/nowhere/at/all", "/nowhere/at/all"),
    ],
)
def test_a_wrong_setting_is_named(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    message = refused(capsys, 2, "run", recipe, "--run", str(tmp_path / "run"), "--executor", "serial", "--set", change)
    assert said in message.splitlines()[-1]


@pytest.mark.parametrize("option", ["--run", "--store"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_run_or_store_that_is_a_file_is_named(
    short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, inside: bool
) -> None:
    (tmp_path / "file").write_text("mine")
    where = str(tmp_path / "file" / "deeper" if inside else tmp_path / "file")
    other = ("--run", str(tmp_path / "run")) if option == "--store" else ()
    message = refused(capsys, 2, "run", short, option, where, *other, "--executor", "serial")
    assert message == f"pairsieve: {option} {where}: a file is in its place\n"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert refused(capsys, 2, "run", missing) == f"pairsieve: {missing}: cannot be read: No such file or directory\n"


def test_a_machine_file_with_an_unknown_key_is_refused(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = tmp_path / "machine.yaml"
    machine.write_text("threds: 2\n")
    message = refused(capsys, 2, "run", recipe, "--machine", str(machine), "--run", str(tmp_path / "run"))
    assert "machine.threds: unknown key; did you mean 'threads'?" in message


def test_an_unknown_command_or_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such command 'rnu'. Did you mean 'run'?" in refused(capsys, 2, "rnu")
    assert "No such option: --exekutor" in refused(capsys, 2, "run", "x.yaml", "--exekutor", "serial")
    assert "Missing argument" in refused(capsys, 2, "run")


def test_every_command_of_the_contract_is_there_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "explain", "verify", "report", "status", "sample", "doctor", "train-filter", "gc", "plan"):
        assert main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith("Usage: pairsieve " + command)


def test_a_dry_run_prints_a_recipe_that_loads_back_and_writes_nothing(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, tmp_path / "run", "--dry-run", "--set", "seed=7") == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_recipe(tmp_path / "printed.yaml") == load_recipe(Path(recipe), ["seed=7"])
    assert "sample_per_cluster: 10000" in printed
    assert not (tmp_path / "run").exists()


def test_too_much_damage_ends_with_3_and_a_finished_run(
    short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(short, tmp_path / "run", "--set", "limits.max_unreadable=0.01") == 3
    shown = capsys.readouterr()
    assert "more input was damaged than the recipe's limits allow" in shown.err
    assert "problems: 2 samples, 0 of 2 shards" in shown.out
    assert (tmp_path / "run/checksums.sha256").exists()
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_runs_are_looked_at_by_the_other_commands(
    finished: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, directory = finished
    assert main(["verify", str(directory)]) == 0
    assert capsys.readouterr().out == "no difference\n"

    row = pq.read_table(directory / "decisions/00000000.parquet").to_pylist()[0]
    assert main(["explain", str(directory), row["uid"]]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{row['uid']} {row['shard']} {row['key']}: {'kept' if row['kept'] else 'dropped'}"
    assert shown[1].startswith("  caption: 'a picture of concept ")
    assert shown[4] == "  00-read: passed"
    assert "no sample of" in refused(capsys, 2, "explain", str(directory), "0" * 32)

    assert main(["status", str(directory)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "finished"
    assert any(line.split() == ["read", "1", "2", "done"] for line in shown)
    assert re.fullmatch(r"its workers held \S+ core-hours and 0 GPU-hours", shown[-3])
    assert re.fullmatch(r"it keeps [\d.]+ kB in its store and [\d.]+ kB beside it", shown[-2])
    assert "no run is here" in refused(capsys, 2, "status", str(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    for command in ("status", "verify", "report"):
        assert "run is here" in refused(capsys, 2, command, str(tmp_path / "file"))
    assert "no finished run is here" in refused(capsys, 2, "explain", str(tmp_path / "file"), row["uid"])

    assert main(["gc", str(directory / "store")]) == 0
    assert capsys.readouterr().out == "0 files, 0 bytes not referred to; --delete deletes them\n"

    data = bytearray((directory / "subset.npy").read_bytes())
    data[-1] ^= 1
    (directory / "subset.npy").write_bytes(bytes(data))
    assert main(["verify", str(directory)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "subset.npy: its bytes are not those of its checksum"
    assert shown[-1] == f"{len(shown) - 1} differences"


def test_gc_deletes_only_with_delete_and_only_what_no_run_uses(
    short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    for name, change in (("a", "seed=1"), ("b", "select.1.cut.keep=0.2")):
        assert run(short, tmp_path / name, "--store", str(store), "--set", change) == 0
    before = sum(path.is_file() for path in store.rglob("*"))
    capsys.readouterr()
    assert "--delete needs at least one --keep" in refused(capsys, 2, "gc", str(store), "--delete")
    assert "this is no store" in refused(capsys, 2, "gc", str(tmp_path / "pool"), "--delete")
    assert main(["gc", str(store), "--keep", str(tmp_path / "a")]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert sum(path.is_file() for path in store.rglob("*")) == before
    assert main(["gc", str(store), "--keep", str(tmp_path / "a"), "--delete"]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == listed[:-1]
    assert sum(path.is_file() for path in store.rglob("*")) == before - len(listed) + 1
    assert main(["verify", str(tmp_path / "a"), "--store", str(store)]) == 0
    assert main(["verify", str(tmp_path / "b"), "--store", str(store)]) == 1


def test_a_run_that_is_going_on_is_shown_and_its_store_is_left_alone(
    finished: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, directory = finished
    lease = f"leases/{digest(str(directory))}.json"
    holder = {"host": platform.node(), "pid": os.getppid(), "run": "x", "beat": 3}
    (directory / "store/leases").mkdir(exist_ok=True)
    (directory / "store" / lease).write_text(json.dumps(holder))
    assert main(["status", str(directory)]) == 0
    who = f"process {os.getppid()} on {platform.node()} ({lease})"
    assert capsys.readouterr().out.splitlines()[-1] == f"running: {who}"
    assert f"a run may be using this store: {who}" in refused(capsys, 2, "gc", str(directory / "store"), "--delete")
    (directory / "store" / lease).write_text(json.dumps({**holder, "pid": 2**22 + 1}))
    assert main(["gc", str(directory / "store"), "--delete"]) == 0
    assert main(["status", str(directory)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "finished"


def test_retrying_needs_an_unfinished_run(
    finished: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, directory = finished
    argv = ("run", recipe, "--executor", "serial", "--retry-failed", "--run")
    assert "holds no unfinished run; leave the flag out" in refused(capsys, 2, *argv, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    argv = (*argv, str(directory))
    assert "is finished, nothing failed" in refused(capsys, 2, *argv)
    (directory / "checksums.sha256").unlink()
    assert main(argv) == 0
    assert (directory / "checksums.sha256").exists()


def test_storage_that_fails_names_the_unit_and_a_retry_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = webdataset_pool(tmp_path / "pool", 3, 9, 1)
    recipe, directory = write_recipe(tmp_path, webdataset(pool)), tmp_path / "run"
    machine = tmp_path / "machine.yaml"
    machine.write_text(f"scratch: {tmp_path / 'scratch'}\n")
    subprocess.run(["gzip", str(pool / "00001.tar")], check=True)  # unpacked to the scratch folder, which is not there
    argv = ("run", recipe, "--run", str(directory), "--executor", "serial", "--machine", str(machine))
    message = refused(capsys, 1, *argv)
    assert "read: 1 of its parts could not be made; the others are committed, a rerun tries only these" in message
    assert "  00001.tar.gz: FileNotFoundError: " in message
    assert main(["status", str(directory)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["read", "0", "2", "failed"] for line in shown)
    assert any(line.startswith("failed: read: 00001.tar.gz: FileNotFoundError: ") for line in shown)
    assert shown[-1] == "not finished, and nobody is at it"
    (tmp_path / "scratch").mkdir()
    assert main([*argv, "--retry-failed"]) == 0
    stages = json.loads((directory / "times.json").read_text())["stages"]
    assert [entry["parts"] for entry in stages if entry["stage"] == "read"] == [2, 1]  # of both starts


def test_sample_wants_a_new_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("keep")
    assert "exists and is not an empty folder" in refused(capsys, 2, "sample", str(tmp_path))


def test_doctor_says_what_this_machine_computes_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = tmp_path / "machine.yaml"
    machine.write_text("{device: cpu, precision: float32}\n")
    code = main(["doctor", "--machine", str(machine)])
    shown = capsys.readouterr()
    assert "device: cpu, float32, cpu " in shown.out
    assert code == (1 if " fault  " in shown.out else 0)
    machine.write_text("{device: cpu, precision: fp16}\n")
    assert "not fit to run: device" in refused(capsys, 1, "doctor", "--machine", str(machine))


def started(recipe: str, directory: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "jobs.curate", recipe, "--run", str(directory), "--executor", "serial"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(tmp_path: Path, number: int, code: int) -> None:
    recipe = write_recipe(tmp_path, webdataset(webdataset_pool(tmp_path / "pool", 12, 12, 1)))
    directory = tmp_path / "run"
    process = started(recipe, directory)
    while process.poll() is None and len(list(directory.glob("store/receipts/read/*/*"))) < 3:
        time.sleep(0.005)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code
    assert "what is committed stays; the same command goes on from there" in message
    assert "Traceback" not in message
    assert not (directory / "checksums.sha256").exists()

    committed = {path: path.stat().st_mtime_ns for path in directory.glob("store/receipts/read/*/*")}
    assert run(recipe, directory) == 0
    assert {path: path.stat().st_mtime_ns for path in committed} == committed
    assert main(["verify", str(directory)]) == 0
    assert run(recipe, tmp_path / "other") == 0
    assert digests(tmp_path / "other") == digests(directory)


def test_a_real_process_says_one_line_for_a_mistake(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pool: {format: datacomp, path: /x}\nselct: []\n")
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "run", str(recipe)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pairsieve: recipe.selct: unknown key; did you mean 'select'?\n"
