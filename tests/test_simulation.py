"""The commit protocol under simulated schedules: attempts that take turns call by call, die, and arrive twice or late.

Each schedule follows from its seed. The store is an object store in memory; what runs is the product's own `commit`.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from pipeline.errors import PairsieveError
from pipeline.run import Receipt, commit, read_receipt
from pipeline.stage import Made
from pipeline.storage import Root
from tests.toy_stages import Guess, Times

UNITS = 3
ACTIONS = {"go on": 80, "die before": 6, "die after": 6, "twice": 4, "again later": 4}


class Killed(BaseException):
    """The process of an attempt is no more."""


class Attempt(threading.Thread):
    """Makes one unit; stands still before each call of its storage until it is its turn."""

    def __init__(self, store: Root, stage: Times, unit: int, number: int) -> None:
        super().__init__()
        self.store, self.stage, self.unit, self.number = store, stage, unit, number
        self.turn, self.paused = threading.Lock(), threading.Lock()
        self.turn.acquire()
        self.paused.acquire()
        self.action = "go on"
        self.over = False
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            make(self.store, self.stage, self.unit, self.number)
        except Killed:
            return
        except (OSError, PairsieveError) as error:
            self.error = error
        finally:
            self.over = True
            self.paused.release()

    def next(self, action: str) -> None:
        """Let it do one call."""
        self.action = action
        self.turn.release()
        self.paused.acquire()


def make(store: Root, stage: Times, unit: int, number: int) -> Receipt:
    """Rows of a unit; of a stage that is not exact, each attempt has others."""
    rows = [unit] * (unit + 1) if stage.exact else [number] * (unit + 1)
    made = Made({"products": pa.table({"product": rows})})
    return commit(store, store, stage, f"{unit:032x}", f"unit {unit}", made, None)


class Turns(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory; a call of an Attempt waits for its turn."""

    late: ClassVar[list[Callable[[], Any]]] = []
    cachable = False

    def _step(self, call: Callable[[], Any]) -> Any:
        attempt = threading.current_thread()
        if not isinstance(attempt, Attempt):
            return call()
        attempt.paused.release()
        attempt.turn.acquire()
        if attempt.action == "die before":
            raise Killed
        answer = call()
        if attempt.action == "die after":
            raise Killed
        if attempt.action == "twice":
            answer = call()
        if attempt.action == "again later":
            self.late.append(call)
        return answer

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        found: bytes = self._step(lambda: super(Turns, self).cat_file(path, start, end))
        return found

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        def put() -> None:
            name = self._strip_protocol(path)
            if mode == "create" and name in self.store:
                raise FileExistsError(path)
            MemoryFile(self, name, bytes(value)).commit()

        self._step(put)

    def rm_file(self, path: str) -> None:
        self._step(lambda: self.store.pop(self._strip_protocol(path), None))


@pytest.fixture
def memory() -> Iterator[type[Turns]]:
    before = fsspec.get_filesystem_class("memory")
    cores = os.sched_getaffinity(0)
    fsspec.register_implementation("memory", Turns, clobber=True)
    os.sched_setaffinity(0, {max(cores)})  # only one thread runs at a time: to hand over within a core is faster
    yield Turns
    os.sched_setaffinity(0, cores)
    Turns.store.clear()
    fsspec.register_implementation("memory", before, clobber=True)


def simulate(memory: type[Turns], stage: Times, seed: int) -> int:
    """Play a schedule, then go on with what is missing; how many attempts were killed."""
    memory.store.clear()
    memory.late.clear()
    chance = random.Random(seed)
    store = Root("memory://store")
    waiting = [Attempt(store, stage, n % UNITS, n) for n in range(UNITS + chance.randrange(1, 4))]
    chance.shuffle(waiting)
    running: list[Attempt] = []
    attempts = list(waiting)
    while waiting or running:
        if waiting and (not running or chance.random() < 0.3):
            running.append(waiting.pop())
            running[-1].start()
            running[-1].paused.acquire()
        elif memory.late and chance.random() < 0.2:
            arrive(memory.late.pop(chance.randrange(len(memory.late))))
        else:
            chance.choice(running).next(*chance.choices(list(ACTIONS), list(ACTIONS.values())))
        running = [attempt for attempt in running if not attempt.over]
    seen = {unit: receipt_of(store, stage, unit) for unit in range(UNITS)}
    for unit, receipt in seen.items():
        if receipt is None:
            make(store, stage, unit, 100 + unit)
    while memory.late:
        arrive(memory.late.pop())
    rows = 0
    for unit in range(UNITS):
        receipt = receipt_of(store, stage, unit)
        assert receipt is not None
        assert seen[unit] in (None, receipt), "a committed receipt has changed"
        for file in receipt["files"].values():
            assert hashlib.sha256(store.read(file["path"])).hexdigest() == file["sha256"]
            rows += file["rows"]
    assert rows == sum(unit + 1 for unit in range(UNITS))
    assert not [attempt.error for attempt in attempts if attempt.error]
    return sum(attempt.action.startswith("die") for attempt in attempts)


def receipt_of(store: Root, stage: Times, unit: int) -> Receipt | None:
    return read_receipt(store, stage, f"{unit:032x}")


def arrive(call: Callable[[], Any]) -> None:
    """A request that was under way is done now; nobody waits for its answer."""
    try:
        call()
    except FileExistsError:
        return


@pytest.mark.slow
@pytest.mark.goal("R6")
@pytest.mark.parametrize("seeds", [300, pytest.param(10_000, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("stage", [Times(2), Guess(2)], ids=["exact", "inexact"])
def test_every_schedule_commits_each_unit_once_with_the_bytes_that_its_receipt_names(
    memory: type[Turns], stage: Times, seeds: int, record_property: pytest.RecordProperty
) -> None:
    killed = sum(simulate(memory, stage, seed) for seed in range(seeds))
    assert killed > seeds / 3
    kind = "exact" if stage.exact else "inexact"
    record_property("figure", f"{seeds:,} schedules of an {kind} stage, {killed:,} attempts killed: 0 wrong")
