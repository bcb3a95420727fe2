"""One contract, and each executor held to it; then what only an executor with other processes can promise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.executor import Executor, Failure, Serial
from pipeline.machine import Machine
from tests.toy_workers import Broken, Environment, Fatal, Process, Square

DEADLINE_S = 6.0


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    from pipeline.ray_executor import RayExecutor

    executor = RayExecutor(Machine(threads=1, workers=2, unit_deadline_s=DEADLINE_S))
    yield executor
    executor.close()


@pytest.fixture(params=["serial", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "ray":
        yield request.getfixturevalue("ray_executor")
    else:
        serial = Serial()
        yield serial
        serial.close()


def test_every_task_is_answered_once_under_its_position(executor: Executor, tmp_path: Path) -> None:
    answers = list(executor.each(Square(str(tmp_path)), range(50)))
    assert sorted(answers) == [(n, n * n) for n in range(50)]


def test_without_tasks_nothing_is_answered(executor: Executor, tmp_path: Path) -> None:
    assert list(executor.each(Square(str(tmp_path)), [])) == []


def test_a_failure_is_a_value_and_the_rest_finishes(executor: Executor, tmp_path: Path) -> None:
    answers = dict(executor.each(Square(str(tmp_path)), [1, {}, 3, "memory", 5]))
    assert answers == {
        0: 1,
        1: Failure("TypeError: unsupported operand type(s) for *: 'dict' and 'dict'"),
        2: 9,
        3: Failure("MemoryError: batch of 64 images"),
        4: 25,
    }


def test_a_mistake_of_the_user_is_told_from_other_failures(executor: Executor, tmp_path: Path) -> None:
    answers = dict(executor.each(Square(str(tmp_path)), ["user", 2]))
    assert answers == {0: Failure("recipe: select.0.cut.keep must be positive", user=True), 1: 4}


def test_a_worker_that_cannot_be_opened_fails_its_tasks(executor: Executor) -> None:
    failure = Failure("models.clip: no weights at /nowhere", user=True)
    assert dict(executor.each(Broken(), [1, 2])) == {0: failure, 1: failure}


def test_tasks_are_taken_as_they_are_needed(executor: Executor, tmp_path: Path) -> None:
    taken: list[int] = []
    endless = (taken.append(n) or n for n in itertools.count())  # type: ignore[func-returns-value]
    answers = executor.each(Square(str(tmp_path)), endless)
    for answered in range(1, 31):
        position, result = next(answers)
        assert result == position**2
        assert len(taken) - answered <= 2 * 2 + 2 + 1, "two for each of two workers, their last answers, and one more"
    answers.close()  # type: ignore[attr-defined]
    assert dict(executor.each(Square(str(tmp_path)), [7])) == {0: 49}


def test_the_tasks_own_error_reaches_the_caller(executor: Executor, tmp_path: Path) -> None:
    def listing() -> Iterator[int]:
        yield 1
        raise OSError("the pool cannot be listed")

    with pytest.raises(OSError, match="the pool cannot be listed"):
        list(executor.each(Square(str(tmp_path)), listing()))
    assert dict(executor.each(Square(str(tmp_path)), [7])) == {0: 49}


def test_a_worker_is_opened_once_in_a_process_and_shared_by_equal_values(executor: Executor, tmp_path: Path) -> None:
    for name in ("a", "b", "a", "b"):
        for _ in range(2):
            list(executor.each(Square(str(tmp_path), name), range(20)))
    by_process = [path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir()]
    assert len(by_process) == len(set(by_process)), "the same worker was opened twice in a process"
    assert len({name.rsplit("-", 1)[1] for name in by_process}) <= 2, "processes were not shared"


def test_a_call_inside_another_one_keeps_both_apart(executor: Executor, tmp_path: Path) -> None:
    worker = Square(str(tmp_path))
    inner = []
    outer = []
    for position, result in executor.each(worker, range(20)):
        outer.append((position, result))
        inner.append(dict(executor.each(worker, [100 + position])))
    assert sorted(outer) == [(n, n * n) for n in range(20)]
    assert inner == [{0: (100 + position) ** 2} for position, _ in outer]


def test_a_gpu_is_not_needed(executor: Executor, tmp_path: Path) -> None:
    assert dict(executor.each(Square(str(tmp_path)), [3], gpu=True)) == {0: 9}


@pytest.mark.goal("S-a")
@pytest.mark.parametrize("name", ["RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA", "RAY_ALLOW_UNSAFE_ANYTHING"])
def test_a_variable_that_has_ray_unpickle_input_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from pipeline.ray_executor import RayExecutor

    monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=f"^{name}: unset it"):
        RayExecutor(Machine(threads=1, workers=1))


@pytest.mark.ray
def test_a_task_that_kills_its_process_three_times_is_named_and_the_rest_finishes(
    ray_executor: Executor, tmp_path: Path
) -> None:
    tasks: list[Any] = [("answer", float(n)) for n in range(12)]
    tasks[1] = ("die", 1.0)
    tasks[5] = ("die once", 5.0)
    answers = dict(ray_executor.each(Fatal(str(tmp_path)), tasks))
    dead = answers.pop(1)
    assert isinstance(dead, Failure)
    assert dead.cause.startswith("worker died 3 times: ") and not dead.user
    assert answers == {n: float(n) for n in range(12) if n != 1}
    # An answer that dies on its way with its process costs the task before, too: it is done again, and the fatal one
    # once more. Hence the bounds.
    assert len(list(tmp_path.glob("die-1.0-*"))) in (3, 4)
    assert len(list(tmp_path.glob("die once-*"))) in (2, 3)
    assert len(list(tmp_path.glob("answer-*"))) <= 10 + 2, "a task was done twice that was not to blame"


@pytest.mark.ray
def test_a_task_beyond_the_deadline_is_killed_tried_once_more_and_named(ray_executor: Executor, tmp_path: Path) -> None:
    tasks = [("answer", 0.0), ("sleep", 600.0), ("answer", 2.0), ("sleep once", 500.0), ("sleep", 1.0), ("answer", 5.0)]
    answers = dict(ray_executor.each(Fatal(str(tmp_path)), tasks))
    assert answers == {
        0: 0.0,
        1: Failure(f"took longer than {DEADLINE_S:g} s (unit_deadline_s), 2 times"),
        2: 2.0,
        3: 500.0,
        4: 1.0,
        5: 5.0,
    }
    assert len(list(tmp_path.glob("sleep-600.0-*"))) == 2
    assert len(list(tmp_path.glob("answer-*"))) == 3


@pytest.mark.ray
def test_no_actor_has_two_tasks_while_another_has_none(ray_executor: Executor) -> None:
    started = dict(ray_executor.each(Process(), [5.0, 5.0]))  # one may have to start, after a test that killed it
    assert started[0] != started[1]
    for _ in range(4):
        answers = dict(ray_executor.each(Process(), [2.0, 2.0]))
        assert answers[0] != answers[1]
    answers = dict(ray_executor.each(Process(), [3.0, 0.05, 0.05, 0.05]))
    assert answers[1] == answers[2] == answers[3] != answers[0]


@pytest.mark.ray
def test_tasks_that_wait_behind_others_are_not_late(ray_executor: Executor, tmp_path: Path) -> None:
    tasks = [("sleep", 0.6 * DEADLINE_S + n / 100) for n in range(4)]
    assert dict(ray_executor.each(Fatal(str(tmp_path)), tasks)) == {n: tasks[n][1] for n in range(4)}
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.ray
def test_workers_compute_with_the_threads_of_the_machine_and_see_no_gpu(ray_executor: Executor) -> None:
    assert dict(ray_executor.each(Environment(), ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"])) == {0: "1", 1: ""}
