"""`kill -9` at random moments, again and again, until the work is done; then the files are compared with a clean run's.

What is killed is started here, as a fork of a server that has imported everything, and killed by its own process id.
Also `python -m tests.crash POOL DIRECTORY`: the run under test on a local Ray.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import faiss  # noqa: F401  # here, so that forks of this process have it

from pipeline.curate import curate
from pipeline.executor import Executor, Serial
from pipeline.lease import leased
from pipeline.machine import Machine
from pipeline.recipe import recipe_of
from pipeline.run import MANIFESTS, Run
from pipeline.storage import Root
from tests.runs import datacomp

LONGEST = 0.4
"""Of a clean run's duration: the latest moment of a kill, so that a run is killed several times before it is done."""


@dataclass
class Tally:
    """What came of it.

    Attributes:
        kills: processes that died of SIGKILL.
        finished: times that the work was done in the end.
        wrong: of these, with other files than a clean run's, each with the names of these files.
        stages: how many stages were finished, at each kill.
    """

    kills: int = 0
    finished: int = 0
    wrong: list[str] = field(default_factory=list)
    stages: set[int] = field(default_factory=set)

    def compare(self, name: str, found: dict[str, bytes], expected: dict[str, bytes]) -> None:
        other = sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))
        self.wrong += [f"{name}: {', '.join(other)}"] if other else []

    def __str__(self) -> str:
        spread = f" after {min(self.stages)} to {max(self.stages)} finished stages" if any(self.stages) else ""
        return f"{self.kills} kills{spread}, {self.finished} runs finished, {len(self.wrong)} with wrong bytes"


def campaign(
    work: Callable[[Path], None], content: Callable[[Path], dict[str, bytes]], folder: Path, kills: int, seed: int
) -> Tally:
    """Kill the work so many times; as often as it is done, start anew in an empty directory.

    Args:
        work: does everything there is to do in a directory, or goes on with it.
        content: the files of it that count.
        folder: for the directories.
        kills: at least so many.
        seed: of the moments.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.crash"])
    moments = random.Random(seed)
    for name in ("warm", "clean"):
        began = time.monotonic()
        clean = server.Process(target=work, args=(folder / name,))
        clean.start()
        clean.join()
        assert clean.exitcode == 0
    duration = time.monotonic() - began
    expected = content(folder / "clean")
    tally = Tally()
    while tally.kills < kills:
        directory = folder / f"{tally.finished:03d}"
        while True:
            process = server.Process(target=work, args=(directory,))
            process.start()
            process.join(moments.uniform(0, LONGEST * duration) if tally.kills < kills else None)
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, f"ended with {process.exitcode} by itself"
            tally.kills += 1
            tally.stages.add(len(list((directory / "store" / MANIFESTS).glob("*"))))
        tally.finished += 1
        tally.compare(directory.name, content(directory), expected)
        shutil.rmtree(directory)
    return tally


def curated(pool: Path, directory: Path, executor: Executor) -> None:
    """The run under test: every rule, four units to a part."""
    machine = Machine(workers=2)
    run = Run(Root(f"{directory}/store"), Root(str(directory)), executor, machine)
    with leased(run.store, run.directory):
        curate(run, recipe_of(datacomp(pool)), group_units=4)


@dataclass(frozen=True)
class Curation:
    """`curated` without Ray; what it says goes to a file beside its directory."""

    pool: Path

    def __call__(self, directory: Path) -> None:
        directory.parent.mkdir(parents=True, exist_ok=True)
        said = os.open(directory.parent / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 2)
        curated(self.pool, directory, Serial())


@dataclass(frozen=True)
class Naive:
    """The negative control: files written in place, and a file that exists taken for done."""

    files: int = 40

    def __call__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for number in range(self.files):
            path = directory / f"{number:03d}.bin"
            if path.exists():
                continue
            with open(path, "wb") as file:
                for block in range(20):
                    file.write(sha256(f"{number}/{block}".encode()).digest() * 2000)
                    time.sleep(0.0005)


def everything(directory: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def descendants(process: int, name: str) -> list[int]:
    """Ids of the processes that a process of ours has started, and theirs, with a word in their command."""
    children: dict[int, list[int]] = {}
    commands: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(folder.name)] = (folder / "cmdline").read_text().partition("\0")[0]
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found, below = [], [process]
    while below:
        below = [child for pid in below for child in children.get(pid, [])]
        found += [pid for pid in below if name in commands[pid]]
    return found


if __name__ == "__main__":
    from pipeline.ray_executor import RayExecutor

    ray = RayExecutor(Machine(workers=2))
    try:
        curated(Path(sys.argv[1]), Path(sys.argv[2]), ray)
    finally:
        ray.close()
