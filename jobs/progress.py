"""How far a run is: a bar on a terminal, one plain line per interval elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

INTERVAL_S = 30.0


class Bar:
    """A progress bar for each stage (run.Progress)."""

    def __init__(self) -> None:
        columns = [TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn()]
        times = [TextColumn("{task.fields[rows]:,} rows"), TimeElapsedColumn(), TimeRemainingColumn()]
        remark = TextColumn("{task.fields[remark]}")
        self._progress = Progress(*columns, *times, remark, console=Console(stderr=True), transient=True)

    def start(self, stage: str, done: int, total: int) -> None:
        self._rows = 0
        self._task = self._progress.add_task(stage, completed=done, total=total, rows=0, remark="")
        self._progress.start()

    def advance(self, rows: int) -> None:
        self._rows += rows
        self._progress.update(self._task, advance=1, rows=self._rows)

    def remark(self, text: str) -> None:
        self._progress.update(self._task, remark=text)

    def stop(self) -> None:
        self._progress.stop()
        self._progress.remove_task(self._task)


class Lines:
    """A line for each stage every so many seconds (run.Progress)."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s

    def start(self, stage: str, done: int, total: int) -> None:
        self._stage, self._done, self._total, self._rows, self._remark = stage, done, total, 0, ""
        self._started = self._said = time.monotonic()

    def advance(self, rows: int) -> None:
        self._done += 1
        self._rows += rows
        now = time.monotonic()
        if now - self._said >= self._interval_s:
            rate = self._rows / (now - self._started)
            counts = (self._stage, self._done, self._total, self._rows, rate)
            log.info("%s: %d of %d parts, %d rows, %.0f rows/s%s", *counts, self._remark)
            self._said = now

    def remark(self, text: str) -> None:
        self._remark = f"; {text}"

    def stop(self) -> None:
        return


def progress() -> Bar | Lines:
    """What suits standard error."""
    return Bar() if sys.stderr.isatty() else Lines()
