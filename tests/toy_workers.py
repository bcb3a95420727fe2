"""Small workers for the tests of executors: importable, so that they can travel to another process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


@dataclass(frozen=True)
class Square:
    """Squares integers; other tasks are errors of one kind or another. Notes each opening in `opened`."""

    opened: str
    name: str = "square"

    def open(self) -> Callable[[Any], Any]:
        (Path(self.opened) / f"{self.name}-{os.getpid()}-{time.monotonic_ns()}").touch()
        return self.do

    def do(self, task: Any) -> Any:
        if task == "user":
            raise UserError("recipe: select.0.cut.keep must be positive")
        if task == "memory":
            raise MemoryError("batch of 64 images")
        return task * task


@dataclass(frozen=True)
class Broken:
    """Cannot be opened."""

    def open(self) -> Callable[[Any], Any]:
        raise UserError("models.clip: no weights at /nowhere")


@dataclass(frozen=True)
class Environment:
    """Tells the value of a variable as the worker's process sees it, after a while."""

    wait_s: float = 0.0

    def open(self) -> Callable[[Any], Any]:
        return self.tell

    def tell(self, name: str) -> str | None:
        time.sleep(self.wait_s)
        return os.environ.get(name)


@dataclass(frozen=True)
class Fatal:
    """Does what a task says to its own process: die at once, die the first time, sleep, or answer."""

    marks: str

    def open(self) -> Callable[[Any], Any]:
        return self.do

    def do(self, task: tuple[str, float]) -> float:
        verb, number = task
        mark = Path(self.marks) / f"{verb}-{number}-{time.monotonic_ns()}"
        earlier = list(mark.parent.glob(f"{verb}-{number}-*"))
        mark.touch()
        if verb == "die" or (verb == "die once" and not earlier):
            os.kill(os.getpid(), signal.SIGKILL)
        if verb == "sleep" or (verb == "sleep once" and not earlier):
            time.sleep(number)
        return number


@dataclass(frozen=True)
class Process:
    """Sleeps for as long as a task says; tells which process it was."""

    def open(self) -> Callable[[float], int]:
        return self.do

    def do(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()
