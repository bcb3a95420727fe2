"""`make trust`, also `python -m jobs.trust`: every promise about crashes, storage and hostile input, measured here.

A goal is measured by the tests that carry its id (`@pytest.mark.goal("R1")`); what they record as `figure` is shown.
Runs in a checkout, where the tests are, and two tests at a time.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer

from jobs.entry import DONE, FAILED, main
from pipeline.errors import UserError

GOALS = {
    "R1": "kill -9 at random moments: never a wrong byte",
    "R2": "workers, order, prefetch, serial or Ray: the same bytes",
    "R3": "a node lost and one added: the same bytes, little done twice",
    "R4": "RPCs that fail: the same bytes",
    "R5": "storage that fails: the same bytes, or an error that names the place",
    "R6": "simulated schedules: each unit committed once, its bytes as recorded",
    "R7": "accounting: rows in = rows out + dropped",
    "R8": "damaged pools: exact counts for each reason",
    "R9": "a finished run resumes without reading data",
    "R10": "torn and foreign files are never read",
    "R11": "k-means sums are exact in any order",
    "R12": "k-means is as good as float64 Lloyd",
    "R13": "quantiles are exact",
    "R14": "memory does not grow with the shard",
    "R15": "nothing hangs: every unit ends by its deadline",
    "R16": "SIGTERM and SIGINT: gone in 5 s, gone on with later",
    "R17": "disk full, read-only, two runs at once: one clear message",
    "R18": "other parameters never get old results",
    "S-a": "nothing of a pool is ever executed",
    "S-b": "no secret in any file or message",
    "S-c": "no name leaves the root",
    "S-d": "nothing active in the report",
    "S-e": "Ray answers nobody without the token",
    "S-f": "shipped cluster files are valid and strict",
    "S-g": "image bombs are dropped in 1 s and 1 GiB",
    "S-h": "doctor refuses versions known to be vulnerable",
}


@dataclass
class Goals:
    """What the tests of each goal came to; a plugin of pytest.

    Attributes:
        asked: ids of the goals to measure.
        of_test: node id -> those that it measures.
        tests: node ids of those to run.
        passed: goal -> tests that held.
        failed: goal -> node ids of tests that did not.
        figures: goal -> node ids, each with what was measured.
        seconds: goal -> time taken.
    """

    asked: list[str]
    of_test: dict[str, list[str]] = field(default_factory=dict)
    tests: list[str] = field(default_factory=list)
    passed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    figures: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            measured = [goal for mark in item.iter_markers("goal") for goal in mark.args]
            self.of_test[item.nodeid] = [goal for goal in measured if goal in self.asked]
        large = {_function(item) for item in items if item.get_closest_marker("campaign")}
        items[:] = [
            item
            for item in items
            if self.of_test[item.nodeid] and (item.get_closest_marker("campaign") or _function(item) not in large)
        ]
        self.tests = [item.nodeid for item in items]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for goal in self.of_test.get(report.nodeid, []):
            self.seconds[goal] += report.duration
            if report.failed:
                self.failed[goal].append(report.nodeid)
            elif report.when == "call":
                self.passed[goal] += 1
                found = [str(value) for name, value in report.user_properties if name == "figure"]
                self.figures[goal] += [(report.nodeid, figure) for figure in found]

    def line(self, goal: str) -> str:
        """One goal: its id, whether it holds, what it says, tests, seconds and figures."""
        state = "ok" if self.holds(goal) else "FAILED" if self.failed[goal] else "NOT MEASURED"
        about = f"{self.passed[goal]} tests, {self.seconds[goal]:.0f} s"
        figures = [figure for _, figure in sorted(self.figures[goal])]
        failed = [f"failed: {test}" for test in dict.fromkeys(self.failed[goal])]
        return "\n            ".join([f"{goal:<4} {state:<6} {GOALS[goal]} ({about})", *figures, *failed])

    def holds(self, goal: str) -> bool:
        """Whether it was measured and no test of it failed."""
        return self.passed[goal] > 0 and not self.failed[goal]


def _function(item: pytest.Item) -> str:
    """A test without its parameters: where it comes in two sizes, the small one is for CI."""
    return item.nodeid.partition("[")[0]


def trust(
    goals: Annotated[list[str] | None, typer.Argument(help="Ids such as R1; all by default.")] = None,
) -> int:
    """Measure the goals and print a line for each."""
    for goal in goals or ():
        if goal not in GOALS:
            raise UserError(f"no goal is called {goal}; there are {', '.join(GOALS)}")
    found = Goals(goals or list(GOALS))
    began = time.monotonic()
    code = pytest.main(["--collect-only", "-qq", "--no-summary", "-m", "goal"], plugins=[found])
    if code == pytest.ExitCode.OK:
        parallel = ["-n", "2", "--dist", "worksteal"]
        code = pytest.main(["-m", "goal", "--tb=short", "--no-header", *parallel, *found.tests], plugins=[found])
    print("\n".join(found.line(goal) for goal in found.asked))
    held = sum(found.holds(goal) for goal in found.asked)
    print(f"{held} of {len(found.asked)} goals hold, measured in {(time.monotonic() - began) / 60:.0f} min")
    return DONE if held == len(found.asked) and code == pytest.ExitCode.OK else FAILED


if __name__ == "__main__":
    sys.exit(main([trust]))
