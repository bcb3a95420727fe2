"""One run at a time in a directory: a live holder is respected, a dead one is not."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from pipeline.errors import UserError
from pipeline.lease import LEASES, leased
from pipeline.parts import canonical
from pipeline.storage import Root


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    return Root(str(tmp_path / "run/store") if request.param == "local" else f"memory://{uuid.uuid4().hex}/store")


def left(store: Root, directory: Root, host: str, pid: int) -> str:
    """A lease that a run left behind; its path."""
    with leased(store, directory):
        (path,) = store.list(LEASES)
    store.write(path, canonical({"host": host, "pid": pid, "run": "x", "beat": 3}))
    return path


def test_a_lease_is_there_while_a_run_lasts_and_gone_afterwards(store: Root, tmp_path: Path) -> None:
    directory = Root(str(tmp_path / "run"))
    with leased(store, directory, beat_s=0.05):
        (path,) = store.list(LEASES)
        first = store.read(path)
        end = time.monotonic() + 10
        while store.read(path) == first:
            assert time.monotonic() < end, "no sign of life"
            time.sleep(0.02)
    assert store.list(LEASES) == {}
    with pytest.raises(RuntimeError), leased(store, directory):
        raise RuntimeError
    assert store.list(LEASES) == {}


def test_a_run_whose_holder_lives_on_another_host_is_refused_by_name(store: Root, tmp_path: Path) -> None:
    directory = Root(str(tmp_path / "run"))
    path = left(store, directory, "elsewhere", 77)
    over = threading.Event()

    def live() -> None:
        beat = 3
        while not over.wait(0.05):
            beat += 1
            store.write(path, canonical({"host": "elsewhere", "pid": 77, "run": "x", "beat": beat}))

    other = threading.Thread(target=live)
    other.start()
    try:
        with (
            pytest.raises(UserError, match=r"run: another run writes here \(process 77 on elsewhere\); wait, or name"),
            leased(store, directory, watch_s=5),
        ):
            raise AssertionError("two at once")
    finally:
        over.set()
        other.join()
    assert list(store.list(LEASES)) == [path]


@pytest.mark.parametrize(
    ("host", "pid"),
    [("elsewhere", 1), (platform.node(), 2**22 + 1), (platform.node(), os.getpid())],
    ids=["another host", "a process that is gone", "a process that took its id"],
)
def test_a_holder_that_gives_no_sign_of_life_is_followed(store: Root, tmp_path: Path, host: str, pid: int) -> None:
    directory = Root(str(tmp_path / "run"))
    path = left(store, directory, host, pid)
    with leased(store, directory, watch_s=0.2):
        assert b'"beat":0' in store.read(path)
    assert store.list(LEASES) == {}


def test_a_torn_lease_counts_for_nothing(store: Root, tmp_path: Path) -> None:
    directory = Root(str(tmp_path / "run"))
    store.write(left(store, directory, "elsewhere", 1), b'{"host":')
    with leased(store, directory):
        assert len(store.list(LEASES)) == 1


def test_runs_of_other_directories_share_a_store(store: Root, tmp_path: Path) -> None:
    with leased(store, Root(str(tmp_path / "a"))), leased(store, Root(str(tmp_path / "b"))):
        assert len(store.list(LEASES)) == 2


HOLD = """
import sys
from pipeline.errors import UserError
from pipeline.lease import leased
from pipeline.storage import Root

print("ready", flush=True)
sys.stdin.readline()
try:
    with leased(Root(sys.argv[1]), Root(sys.argv[2]), beat_s=0.1):
        print("held", flush=True)
        sys.stdin.readline()
except UserError:
    print("refused", flush=True)
"""


def test_of_several_runs_that_find_a_dead_holder_one_follows_it(tmp_path: Path) -> None:
    store, directory = Root(str(tmp_path / "run/store")), Root(str(tmp_path / "run"))
    path = left(store, directory, platform.node(), 2**22 + 1)
    command = [sys.executable, "-c", HOLD, store.url, directory.url]
    with ExitStack() as stack:
        runs = [
            stack.enter_context(Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=Path(__file__).parents[1]))
            for _ in range(4)
        ]
        pipes = [(run.stdin, run.stdout) for run in runs if run.stdin and run.stdout]
        assert [out.readline() for _, out in pipes] == ["ready\n"] * 4
        for into, _ in pipes:
            print(file=into, flush=True)
        assert sorted(out.readline() for _, out in pipes) == ["held\n"] + ["refused\n"] * 3
        assert list(store.list(LEASES)) == [path]
        for into, _ in pipes:
            into.close()
    assert store.list(LEASES) == {}


def test_who_was_followed_leaves_the_lease_of_its_successor_alone(store: Root, tmp_path: Path) -> None:
    directory = Root(str(tmp_path / "run"))
    with leased(store, directory, beat_s=0.05):
        (path,) = store.list(LEASES)
        theirs = canonical({"host": "elsewhere", "pid": 1, "run": "y", "beat": 0})
        while store.read(path) != theirs:  # a sign of life that was on its way may come after it
            store.write(path, theirs)
            time.sleep(0.3)
    assert store.read(path) == theirs
