"""What runs out or is refused: one clear message, the right exit code, and nothing half done."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jobs.entry import DONE, FAILED, WRONG
from pipeline.lease import LEASES
from tests.crash import Curation
from tests.pools import datacomp_pool
from tests.runs import datacomp
from tests.trees import tree

pytestmark = [pytest.mark.slow, pytest.mark.goal("R17")]

ROOT = Path(__file__).parents[1]

HOLDER = """
import sys, time
from pipeline.lease import leased
from pipeline.storage import Root
with leased(Root(sys.argv[1] + "/store"), Root(sys.argv[1]), beat_s=0.2):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(datacomp(datacomp_pool(folder / "pool", 3, 60, 1))))
    return path


def curated(recipe: Path, directory: Path | str, file_bytes: int | None = None) -> tuple[int, str]:
    """Exit code and last line of a serial run; no file may become longer than so many bytes."""

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    command = [sys.executable, "-m", "jobs.curate", str(recipe), "--run", str(directory), "--executor", "serial"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=limit)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, "\n".join(line for line in done.stderr.splitlines() if not line[:2].isdigit())


def test_a_file_that_cannot_be_written_to_its_end_is_named_and_never_committed(
    recipe: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    sizes = (500, 5_000, 9_000, 20_000)
    assert curated(recipe, tmp_path / "clean") == (DONE, "")
    for size in sizes:
        code, said = curated(recipe, tmp_path / "run", size)
        assert code == FAILED and "File too large" in said and str(tmp_path / "run") in said, said
        assert not list((tmp_path / "run").rglob(".tmp-*")) and not (tmp_path / "run/checksums.sha256").exists()
    assert curated(recipe, tmp_path / "run") == (DONE, "")
    assert tree(tmp_path / "run") == tree(tmp_path / "clean")
    record_property("figure", f"files cut at {', '.join(map(str, sizes))} bytes: exit 1 each, then the same bytes")


def test_a_folder_that_nobody_may_write_to_is_named(recipe: Path, record_property: pytest.RecordProperty) -> None:
    code, said = curated(recipe, "/sys/pairsieve")
    assert code == FAILED
    assert said.startswith("pairsieve: ") and "/sys/pairsieve" in said and len(said.splitlines()) == 1
    record_property("figure", f"read-only: exit {code}, {said}")


def test_a_second_run_in_a_directory_is_refused_and_goes_on_when_the_first_has_died(
    recipe: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    Curation(recipe.parent / "pool")(tmp_path / "clean")
    directory = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        began = time.monotonic()
        code, said = curated(recipe, directory)
        seconds = time.monotonic() - began
        first.send_signal(signal.SIGKILL)
    assert code == WRONG
    assert f"{directory}: another run writes here (process {first.pid} on " in said
    assert curated(recipe, directory)[0] == DONE
    assert list((directory / "store" / LEASES).iterdir()) == []
    record_property("figure", f"two at once: exit {code} after {seconds:.0f} s, done once the first was killed")
