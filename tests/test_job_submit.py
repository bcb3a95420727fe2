"""A job submitted to a head with a dashboard and a token, as on a cluster; and a driver that is interrupted."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from jobs import cli
from jobs.entry import INTERRUPTED
from pipeline.errors import UserError
from pipeline.machine import Machine
from tests.pools import datacomp_pool

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

SCRIPT = """
from pipeline.machine import Machine
from pipeline.ray_executor import RayExecutor
from toy_workers import Environment

executor = RayExecutor(Machine(threads=1))
answers = sorted(executor.each(Environment(), ["RAY_AUTH_MODE", "OMP_NUM_THREADS"]))
executor.close()
print("answers", answers)
"""

SLEEPER = """
import sys
from jobs.entry import main
from pipeline.machine import Machine
from pipeline.ray_executor import RayExecutor
from tests.toy_workers import Fatal

def sleep(marks: str) -> int:
    executor = RayExecutor(Machine(threads=1, workers=2))
    try:
        list(executor.each(Fatal(marks), [("sleep", 600.0), ("sleep", 601.0)]))
    finally:
        executor.close()
    return 0

sys.exit(main([sleep]))
"""


JOINER = """
import sys
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.ray_executor import RayExecutor

try:
    RayExecutor(Machine(threads=1), sys.argv[1]).close()
    print("joined")
except UserError as error:
    print(error)
"""


def free_port() -> int:
    """A free one of those that neither Linux nor Ray gives out by itself, so that it is still free when it is used."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def status(url: str, token: str | None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a user with an empty home and a token in the environment, whatever Ray this process itself has used."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    home = tmp_path / "home"
    home.mkdir()
    return kept | {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def head(environment: dict[str, str]) -> Iterator[tuple[str, dict[str, str], str]]:
    """URL of the dashboard, environment with the token, and address of a head of two CPUs.

    It has a process group of its own, which is all that is ended afterwards.
    """
    environment = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    port, dashboard = free_port(), free_port()
    # Not in pytest's folder: the path of a Unix socket has at most 107 characters.
    folder = Path("/tmp") / f"ray-{os.getpid()}-{secrets.token_hex(2)}"
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--temp-dir={folder}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--object-store-memory=100000000"),
        *(f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"),
    ]
    with subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            url = f"http://127.0.0.1:{dashboard}"
            wait_for(lambda: status(f"{url}/api/version", environment["RAY_AUTH_TOKEN"]) == 200, 90)
            yield url, environment, f"127.0.0.1:{port}"
        finally:
            process.terminate()  # --block ends what it started
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.goal("S-e")
def test_a_submitted_job_runs_and_nobody_gets_in_without_the_token(
    head: tuple[str, dict[str, str], str], tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    url, environment, _ = head
    for path in ("/api/version", "/api/jobs/"):
        assert status(url + path, None) in (401, 403)
        assert status(url + path, "0" * 64) in (401, 403)
        assert status(url + path, environment["RAY_AUTH_TOKEN"]) == 200
    record_property("figure", "dashboard: 401 or 403 without the token or with another, 200 with it; a job runs")
    job = tmp_path / "job"
    shutil.copytree(ROOT / "pipeline", job / "pipeline", ignore=shutil.ignore_patterns("tiny", "__pycache__"))
    shutil.copy(ROOT / "tests" / "toy_workers.py", job)
    (job / "script.py").write_text(SCRIPT)
    submit = [
        str(BIN / "ray"),
        "job",
        "submit",
        "--address",
        url,
        "--working-dir",
        str(job),
        "--",
        "python",
        "script.py",
    ]
    done = subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "answers [(0, 'token'), (1, '1')]" in done.stdout


@pytest.mark.goal("S-e")
@pytest.mark.campaign
def test_a_driver_with_another_token_is_refused(
    head: tuple[str, dict[str, str], str], record_property: pytest.RecordProperty
) -> None:
    _, environment, address = head
    answers = {}
    for token in (environment["RAY_AUTH_TOKEN"], "0" * 64):
        command = [sys.executable, "-c", JOINER, address]
        joined = subprocess.run(
            command, cwd=ROOT, env=environment | {"RAY_AUTH_TOKEN": token}, capture_output=True, text=True, timeout=120
        )
        answers[token] = joined.stdout.splitlines()[-1]
    right, wrong = answers.values()
    assert right == "joined"
    assert wrong.startswith(f"RAY_ADDRESS: {address}: ") and wrong.endswith("is RAY_AUTH_TOKEN the cluster's?")
    record_property("figure", "gRPC: a driver with another token does not get into the cluster")


def test_an_interrupted_driver_ends_within_five_seconds_and_leaves_no_token_behind(
    environment: dict[str, str], tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    command = [sys.executable, "-c", SLEEPER, str(marks)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as driver:
        wait_for(lambda: len(list(marks.iterdir())) == 2, 90)
        began = time.monotonic()
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate(timeout=30)
        assert time.monotonic() - began < 5
    assert driver.returncode == INTERRUPTED, errors
    assert list(Path(environment["HOME"]).rglob("*")) == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "no Ray cluster answers"),
        ("http://127.0.0.1:8265", "not host:port of a head; to a dashboard, use `ray job submit`"),
        ("somewhere", "not host:port of a head"),
    ],
)
def test_an_address_without_a_cluster_is_the_users_mistake(address: str, message: str) -> None:
    from pipeline.ray_executor import RayExecutor

    with pytest.raises(UserError, match=rf"^RAY_ADDRESS: {address}: {message}"):
        RayExecutor(Machine(), address)


def test_the_documented_command_curates_on_a_cluster_what_serial_curates_here(
    head: tuple[str, dict[str, str], str], tmp_path: Path
) -> None:
    url, environment, _ = head
    datacomp_pool(tmp_path / "pool", 3, 40, seed=5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"pool: {{format: datacomp, path: {tmp_path / 'pool'}}}\n"
        "models: {l14: {image: l14_img, text: l14_txt}}\n"
        "select: [{dedup: {space: l14, epsilon: 0.05}}, {cut: {score: l14, keep: 0.5}}]\n"
        "limits: {max_unreadable: 1}\n"
    )
    machine = tmp_path / "machine.yaml"
    machine.write_text("{threads: 1, workers: 2}\n")
    options = [str(recipe), "--machine", str(machine), "--run"]
    command = [str(BIN / "ray"), "job", "submit", "--address", url, "--working-dir", ".", "--"]
    command += ["python", "-m", "jobs.curate", *options, str(tmp_path / "cluster")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cli.main(["run", *options, str(tmp_path / "here"), "--executor", "serial"]) == 0

    def files(folder: Path) -> dict[str, bytes]:
        ours = (p for p in folder.rglob("*") if p.is_file() and "report" not in p.parts)
        skipped = ("times.json", "checksums.sha256")
        return {str(p.relative_to(folder)): p.read_bytes() for p in ours if p.name not in skipped}

    assert files(tmp_path / "cluster") == files(tmp_path / "here")
