"""Runs that are killed, and runs that are told to stop: what they leave is gone on with, to the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jobs.entry import INTERRUPTED, TERMINATED
from tests.crash import Curation, Naive, Tally, campaign, descendants, everything
from tests.pools import datacomp_pool
from tests.runs import datacomp
from tests.trees import tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[1]
UNITS, ROWS = 12, 20


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datacomp_pool(tmp_path_factory.mktemp("crash") / "pool", UNITS, ROWS, 1)


@pytest.fixture
def seed() -> int:
    """Printed by pytest where the test fails, and part of the figure."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return seed


@pytest.mark.goal("R1")
@pytest.mark.parametrize("kills", [25, pytest.param(180, marks=pytest.mark.campaign)])
def test_a_run_killed_again_and_again_ends_in_the_bytes_of_a_clean_one(
    pool: Path, tmp_path: Path, kills: int, seed: int, record_property: pytest.RecordProperty
) -> None:
    tally = campaign(Curation(pool), tree, tmp_path, kills, seed)
    record_property("figure", f"serial: {tally}, seed {seed}")
    assert tally.kills >= kills and not tally.wrong, tally.wrong
    assert max(tally.stages) - min(tally.stages) >= 10, f"not all over the run: {tally}"


@pytest.mark.goal("R1")
def test_the_same_kills_find_a_naive_writer_wrong(
    tmp_path: Path, seed: int, record_property: pytest.RecordProperty
) -> None:
    tally = campaign(Naive(), everything, tmp_path, 25, seed)
    record_property("figure", f"negative control: {tally}")
    assert tally.wrong, tally


@pytest.mark.ray
@pytest.mark.goal("R1")
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.campaign)])
def test_a_run_on_ray_ends_in_the_same_bytes_whichever_of_its_processes_is_killed(
    pool: Path, tmp_path: Path, kills: int, seed: int, record_property: pytest.RecordProperty
) -> None:
    Curation(pool)(tmp_path / "clean")
    expected = tree(tmp_path / "clean")
    moments = random.Random(seed)
    tally, victims = Tally(), dict.fromkeys(("driver", "worker", "raylet"), 0)
    while tally.kills < kills:
        directory = tmp_path / f"{tally.finished:03d}"
        while True:
            command = [sys.executable, "-m", "tests.crash", str(pool), str(directory)]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
                while not descendants(driver.pid, "ray::_Actor") and driver.poll() is None:
                    time.sleep(0.2)
                while driver.poll() is None and tally.kills < kills:
                    time.sleep(moments.uniform(0, 3))
                    victim = list(victims)[tally.kills % 3]
                    name = {"driver": "", "worker": "ray::_Actor", "raylet": "raylet/raylet"}[victim]
                    try:
                        found = descendants(driver.pid, name) if name else [driver.pid]
                        os.kill(moments.choice(found), signal.SIGKILL)
                    except (ProcessLookupError, IndexError):
                        continue  # it has ended meanwhile, or is between two workers
                    tally.kills += 1
                    victims[victim] += 1
                code = driver.wait(300)
            if code == 0:
                break
        tally.finished += 1
        tally.compare(directory.name, tree(directory), expected)
    record_property("figure", f"Ray: {tally} ({', '.join(f'{n} {v}' for v, n in victims.items())}), seed {seed}")
    assert not tally.wrong and min(victims.values()) > 0, (tally.wrong, victims)


@pytest.mark.goal("R16")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, INTERRUPTED)])
@pytest.mark.parametrize("executor", ["serial", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_run_told_to_stop_is_gone_in_five_seconds_and_gone_on_with(
    pool: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    executor: str,
    record_property: pytest.RecordProperty,
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(datacomp(pool)))
    base = [sys.executable, "-m", "jobs.curate", str(recipe), "--executor", executor, "--run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    clean = subprocess.run([*base, str(tmp_path / "clean")], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert clean.returncode == 0, clean.stderr
    command = [*base, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment) as stopped:
        while not list((tmp_path / "run/store/manifests").glob("judge/*")):
            assert stopped.poll() is None
            time.sleep(0.01)
        began = time.monotonic()
        stopped.send_signal(number)
        _, errors = stopped.communicate(timeout=30)
        seconds = time.monotonic() - began
    assert stopped.returncode == code, errors
    assert seconds < 5
    assert errors.splitlines()[-1].endswith("what is committed stays; the same command goes on from there")
    assert not (tmp_path / "run/checksums.sha256").exists(), "it was done before it was told"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert "read: " not in again.stderr, "what was committed is made again"
    assert tree(tmp_path / "run") == tree(tmp_path / "clean")
    record_property(
        "figure", f"{executor}: {number.name} after {seconds:.1f} s with exit code {code}, then the same bytes"
    )
