"""What is said while a run goes on."""

from __future__ import annotations

import logging

import pytest

from jobs.progress import Bar, Lines


def test_lines_count_parts_and_rows_and_say_what_bounds_the_stage(caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines(interval_s=0)
    with caplog.at_level(logging.INFO, "jobs.progress"):
        lines.start("embed", 2, 5)
        lines.advance(100)
        lines.remark("bound by decoding")
        lines.advance(100)
        lines.stop()
        lines.start("write", 0, 1)
        lines.advance(7)
    first, second, third = caplog.messages
    assert first.startswith("embed: 3 of 5 parts, 100 rows, ")
    assert first.endswith(" rows/s")
    assert second.startswith("embed: 4 of 5 parts, 200 rows, ")
    assert second.endswith(" rows/s; bound by decoding")
    assert third.endswith(" rows/s")  # of another stage nothing is known


def test_nothing_is_said_before_the_interval_is_over(caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines(interval_s=60)
    with caplog.at_level(logging.INFO, "jobs.progress"):
        lines.start("embed", 0, 2)
        lines.advance(100)
    assert not caplog.messages


def test_a_bar_shows_what_bounds_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    bar.start("embed", 0, 2)
    bar.remark("bound by decoding")
    bar.advance(100)
    (task,) = bar._progress.tasks
    assert (task.completed, task.fields["rows"], task.fields["remark"]) == (1, 100, "bound by decoding")
    bar.stop()
