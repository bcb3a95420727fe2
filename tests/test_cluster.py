"""A cluster that loses nodes and messages, and units that never end: the same bytes, and the rest finishes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from pipeline import ray_executor
from pipeline.errors import RunError
from pipeline.executor import Failure, Serial
from pipeline.machine import Machine
from pipeline.parts import given
from pipeline.ray_executor import IN_FLIGHT, OBJECT_STORE_BYTES, RayExecutor, _Call
from pipeline.run import PartWorker, Run
from pipeline.storage import Root
from tests.cluster import UNITS, Slow, numbers
from tests.crash import Curation
from tests.pools import datacomp_pool
from tests.toy_workers import Environment, Process, Square
from tests.trees import tree

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
CHAOS = {"*": {"num_failures": -1, "req_failure_prob": 2, "resp_failure_prob": 2, "in_flight_failure_prob": 1}}
"""Per cent of Ray's remote procedure calls that fail: on the way, on the way back, or after a part of the way."""


def child(*arguments: str, **environment: str) -> str:
    """Run a module in a process of its own, with no Ray settings but these; what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=kept | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.goal("R3")
def test_a_lost_node_costs_what_it_had_in_hand_and_a_new_one_is_used(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    token = secrets.token_hex(32)
    printed = child("tests.cluster", str(tmp_path / "run"), str(marks), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))  # Ray prints, too
    (tmp_path / "serial").mkdir()  # beside `exchanged`, which is there by now
    machine = Machine(scratch=str(tmp_path / "serial"))
    run = Run(Root(str(tmp_path / "clean/store")), Root(str(tmp_path / "clean")), Serial(), machine)
    made = run.map(Slow(), numbers(UNITS))["rows"]
    content = "".join(file.sha256 for part in made.parts for file in part.files)
    assert found["content"] == hashlib.sha256(content.encode()).hexdigest()
    assert found["nodes"] == 4, "three of them are alive"
    again = found["begun"] - UNITS
    assert 0 <= again <= IN_FLIGHT
    record_property("figure", f"{UNITS} units on 2 nodes, 1 killed, 1 added: same bytes, {again} units begun twice")


@pytest.mark.goal("R4")
def test_calls_of_ray_that_fail_change_nothing(tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    pool = datacomp_pool(tmp_path / "pool", 6, 20, 1)
    Curation(pool)(tmp_path / "clean")
    began = time.monotonic()
    for last in (False, False, True):
        try:
            child("tests.crash", str(pool), str(tmp_path / "run"), RAY_testing_rpc_failure=json.dumps(CHAOS))
            break
        except AssertionError:
            # Ray's own start makes such calls, too, and may give up on them: once more, as long as no run began.
            if last or (tmp_path / "run").exists():
                raise
    seconds = time.monotonic() - began
    assert tree(tmp_path / "run") == tree(tmp_path / "clean")
    record_property("figure", f"2 % of requests and of answers lost, 1 % in flight: same bytes in {seconds:.0f} s")


@pytest.mark.parametrize(
    ("error", "times", "cause"),
    [
        (ActorUnavailableError("cut off", None), 10, "its worker could not be reached 10 times: .*cut off"),
        (ActorDiedError(), 3, "worker died 3 times: "),
    ],
)
def test_a_lost_message_is_not_held_against_a_task_as_a_death_is(error: RayError, times: int, cause: str) -> None:
    call = _Call(PartWorker("memory://a", "memory://b", Machine()), ["task"])
    assert call.waiting()
    for _ in range(times - 1):
        job = call.again.popleft()
        job.lost(error)
        assert (list(call.again), list(call.done)) == ([job], [])
    call.again.popleft().lost(error)
    [(position, failure)] = call.done
    assert (position, list(call.again), call.open) == (0, [], 0)
    assert isinstance(failure, Failure) and re.match(cause, failure.cause)


def test_an_actor_that_does_not_start_is_given_up_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_executor, "START_S", 1.0)
    holder = RayExecutor(Machine(workers=1))
    try:
        assert dict(holder.each(Square(str(tmp_path)), [2])) == {0: 4}  # it keeps its actor, and the only core
        crew = holder._crews[False]
        room = Timer(4.0, lambda: crew.dismiss(crew.hands[0]))
        room.start()
        assert dict(RayExecutor(Machine(workers=1)).each(Square(str(tmp_path)), [3])) == {0: 9}
        room.join()
    finally:
        holder.close()
    given_up = [r for r in caplog.records if r.getMessage().startswith("a worker has not started within 1 s")]
    assert 2 <= len(given_up) <= 20


def test_work_for_gpus_goes_to_an_actor_for_each_and_the_others_see_none() -> None:
    """GPUs as Ray counts them: none has to be there."""
    ray.init(address="local", num_cpus=1, num_gpus=2, object_store_memory=OBJECT_STORE_BYTES, log_to_driver=False)
    try:
        executor, seen = RayExecutor(Machine(workers=1)), ["CUDA_VISIBLE_DEVICES"] * 2
        first, second = dict(executor.each(Process(), [8.0, 0.0], gpu=True)).values()
        assert first != second
        assert sorted(dict(executor.each(Environment(8.0), seen, gpu=True)).values()) == ["0", "1"]
        (other,) = dict(executor.each(Process(), [0.0])).values()
        assert other not in (first, second)
        assert dict(executor.each(Environment(), seen)) == {0: "", 1: ""}
        executor.close()
        without = RayExecutor(Machine(workers=1, device="cpu"))
        assert dict(without.each(Environment(), seen, gpu=True)) == {0: "", 1: ""}
        few = RayExecutor(Machine(workers=1, gpus=1))
        assert len(set(dict(few.each(Process(), [0.5, 0.5], gpu=True)).values())) == 1
        few.close()
        without.close()
    finally:
        ray.shutdown()


@pytest.mark.goal("R15")
def test_a_unit_that_never_ends_is_killed_tried_elsewhere_and_named_and_the_rest_is_committed(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    deadline_s = 8.0  # a worker imports what it needs within the deadline of its first unit
    machine = Machine(workers=2, unit_deadline_s=deadline_s, scratch=str(tmp_path))
    executor = RayExecutor(machine)
    try:
        units = given([{"number": number} for number in (0, 1, -1, 3, 4, 5)])
        run = Run(Root(str(tmp_path / "run/store")), Root(str(tmp_path / "run")), executor, machine)
        began = time.monotonic()
        with pytest.raises(RunError, match=rf"took longer than {deadline_s:g} s \(unit_deadline_s\), 2 times"):
            run.map(Slow(), units)
        seconds = time.monotonic() - began
    finally:
        executor.close()
    assert 2 * deadline_s < seconds < 5 * deadline_s
    assert len(list((tmp_path / "run/store/receipts/slow").rglob("*.json"))) == 5
    assert len(list(tmp_path.glob("-1-*"))) == 2
    record_property("figure", f"asleep: killed twice at {deadline_s:g} s, named after {seconds:.0f} s, 5 others done")
