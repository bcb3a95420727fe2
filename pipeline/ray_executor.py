"""Tasks on the actors of a Ray cluster: the only module that imports ray.

In: workers and tasks, small values both. Out: for each task what the worker returned, or a Failure. No bulk data passes
through Ray: workers read and write storage themselves, so nothing is lost with a node but the tasks it was doing.

An actor does the tasks that it holds in order, one at a time. So the first of them is the one that runs: it alone is
blamed when the actor dies, and it alone can be late.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from pipeline.errors import RunError, UserError
from pipeline.executor import Failure, Worker, attempt
from pipeline.machine import Machine

IN_FLIGHT = 2
"""Tasks that an actor holds: the one it does, and the next, so that it need not wait for the driver."""

ATTEMPTS = 3
"""Actors that one task may cost; and failed starts in a row, for each actor wanted, before a run is given up."""

LOST_ATTEMPTS = 10
"""Times that a message to or from a task's actor may be lost: unlike a death, it is hardly the task's doing."""

LATE_ATTEMPTS = 2
"""Times that a task may exceed unit_deadline_s."""

START_S = 600.0
"""Until an actor that has not started is given up for another: where a message of its start was lost, it never will.
Hundreds that import from one slow disk take minutes."""

WAIT_S = 1.0
"""Longest sleep of the driver: how exact a deadline is."""

LOOK_S = 10.0
"""Between looks at the cluster for room for more actors."""

REPORT_S = 60.0
"""Between lines in the log that say what is waited for."""

CONNECT_S = 10.0
"""For the head of a cluster to answer."""

OBJECT_STORE_BYTES = 100 * 2**20
"""Of a local Ray. It wants 75 MiB at least; where /dev/shm is smaller it takes the disk, which is as good here."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
)
"""Read when a library is first imported, hence set before an actor's process starts."""

UNPICKLING = re.compile(r"RAY_\w*(AUTOLOAD|ALLOW_UNSAFE)\w*")
"""Variables with which Ray unpickles what a parquet file says."""

log = logging.getLogger(__name__)


@lru_cache(maxsize=2)
def _opened(worker: Worker) -> Callable[[Any], Any]:
    """The worker's function, prepared once per process; few are kept, for they may hold models."""
    return worker.open()


def _do(worker: Worker, task: Any) -> Any:
    return _opened(worker)(task)


class _Actor:
    """One process of the cluster, good for any worker."""

    def ready(self) -> None:
        """Answered once the process runs."""

    def do(self, worker: Worker, task: Any) -> Any | Failure:
        return attempt(partial(_do, worker), task)


@dataclass(eq=False)
class _Job:
    """A task of a call, and what it has cost so far."""

    call: _Call
    position: int
    task: Any
    deaths: int = 0
    late: int = 0
    unreached: int = 0

    def end(self, result: Any | Failure) -> None:
        self.call.open -= 1
        self.call.done.append((self.position, result))

    def lost(self, error: RayError) -> None:
        """Note what became of its actor, and do it once more, or give it up."""
        if isinstance(error, ActorUnavailableError):  # it may be alive, and doing the task
            self.unreached += 1
            self._again(f"its worker could not be reached {self.unreached} times: {_line(error)}")
        else:
            self.deaths += 1
            self._again(f"worker died {self.deaths} times: {_line(error)}")

    def overdue(self, deadline_s: float) -> None:
        """Note that it took too long, and do it once more, or give it up."""
        self.late += 1
        self._again(f"took longer than {deadline_s:g} s (unit_deadline_s), {self.late} times")

    def _again(self, cause: str) -> None:
        once_more = self.late < LATE_ATTEMPTS and self.deaths + self.late < ATTEMPTS
        if once_more and self.unreached < LOST_ATTEMPTS:
            self.call.again.append(self)
        else:
            self.end(Failure(cause))


class _Call:
    """One call of `each`: what is to be done, and what is done and not yet handed over."""

    def __init__(self, worker: Worker, tasks: Iterable[Any]) -> None:
        self.worker = worker
        self.open = 0
        self.again: deque[_Job] = deque()
        self.done: deque[tuple[int, Any | Failure]] = deque()
        self._new = (_Job(self, position, task) for position, task in enumerate(tasks))

    def waiting(self, jobs: int = 1) -> bool:
        """Whether there are so many jobs to give out; looks no further ahead."""
        for job in islice(self._new, max(0, jobs - len(self.again))):
            self.open += 1
            self.again.append(job)
        return len(self.again) >= jobs


@dataclass(eq=False)
class _Hand:
    """An actor and what it holds, in order: calls of `do` with their job, and of `ready` with None."""

    actor: Any
    held: deque[tuple[Any, _Job | None]] = field(default_factory=deque)
    since: float = 0.0
    """When the first of them became the first (monotonic seconds)."""
    started: bool = False

    def hold(self, ref: Any, job: _Job | None) -> None:
        if not self.held:
            self.since = time.monotonic()
        self.held.append((ref, job))

    def drop(self) -> tuple[Any, _Job | None]:
        """Take the first, which is done; the next one's clock starts."""
        self.since = time.monotonic()
        return self.held.popleft()


@dataclass(eq=False)
class _Crew:
    """All actors of one kind."""

    gpu: bool
    hands: list[_Hand] = field(default_factory=list)
    look: float = 0.0
    """When to look again for room for more actors (monotonic seconds)."""
    report: float = 0.0
    """When to say next what is waited for (monotonic seconds)."""
    stillborn: int = 0
    """Actors that failed to start since the last one that did."""

    def call_up(self) -> None:
        """Ask idle actors for a sign of life, so that no task is blamed for one that died meanwhile."""
        self.report = time.monotonic() + REPORT_S
        for hand in self.hands:
            if not hand.held:
                hand.hold(hand.actor.ready.remote(), None)

    def give(self, call: _Call) -> None:
        """One job to every actor, then a second one, as long as every actor has one and there is another for each.

        The last jobs go to whoever is done first: a second one would wait behind the first while others idle.
        """
        able = [hand for hand in self.hands if hand.started and not any(job is None for _, job in hand.held)]
        for held in range(IN_FLIGHT if len(able) == len(self.hands) else 1):
            for hand in able:
                if len(hand.held) == held and call.waiting(1 + held * len(self.hands)):
                    job = call.again.popleft()
                    hand.hold(hand.actor.do.remote(call.worker, job.task), job)

    def answered(self) -> list[_Hand]:
        """Wait a moment for actors that are done with the first they hold."""
        first = {hand.held[0][0]: hand for hand in self.hands if hand.held}
        if not first:
            time.sleep(WAIT_S)
            return []
        ray.wait(list(first), num_returns=1, timeout=WAIT_S, fetch_local=False)
        done, _ = ray.wait(list(first), num_returns=len(first), timeout=0, fetch_local=False)
        return [first[ref] for ref in done]

    def dismiss(self, hand: _Hand) -> None:
        """End an actor; what it had not begun is done by others, ahead of new tasks."""
        ray.kill(hand.actor)
        self.hands.remove(hand)
        if hand.started:
            self.look = 0.0
        for _, job in hand.held:
            if job:
                job.call.again.append(job)


class RayExecutor:
    """Tasks on a Ray cluster, or on a Ray of this machine that starts and ends with the executor.

    Args:
        machine: the number of actors, the threads of each, and the deadline of a task.
        address: host:port of a cluster's head. None: RAY_ADDRESS; where that is not set, a local Ray is started.

    Raises:
        UserError: no cluster of this Ray's version answers at the address, or it refuses the token; a variable is set
            that would have Ray unpickle input.
    """

    def __init__(self, machine: Machine, address: str | None = None) -> None:
        for name in sorted(filter(UNPICKLING.fullmatch, os.environ)):
            raise UserError(f"{name}: unset it: with it Ray executes what is pickled in a parquet file")
        self._machine = machine
        self._crews = {gpu: _Crew(gpu) for gpu in (False, True)}
        self._ours = not ray.is_initialized()
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        on_sigterm = signal.getsignal(signal.SIGTERM)
        if self._ours and address == "local":
            _start(machine)
        elif self._ours:
            _connect(address)
        if signal.getsignal(signal.SIGTERM) is not on_sigterm:  # Ray's own would end us with its own exit code
            signal.signal(signal.SIGTERM, on_sigterm or signal.SIG_DFL)

    def each(self, worker: Worker, tasks: Iterable[Any], gpu: bool = False) -> Iterator[tuple[int, Any | Failure]]:
        """See Executor.each.

        Raises:
            RunError: no actor is left, and new ones die again and again while they start.
        """
        call, crew = _Call(worker, tasks), self._crews[gpu and self._wanted(gpu=True) > 0]
        crew.call_up()
        try:
            while call.waiting() or call.open:
                self._hire(crew)
                crew.give(call)
                self._collect(crew)
                while call.done:
                    yield call.done.popleft()
        finally:
            # Only where the caller stopped early is anything still held: it is not wanted any more, nor waited for.
            for hand in [h for h in crew.hands if any(job and job.call is call for _, job in h.held)]:
                crew.dismiss(hand)

    def close(self) -> None:
        """End the actors, and the local Ray or the connection that this executor made."""
        for crew in self._crews.values():
            while crew.hands and ray.is_initialized():
                crew.dismiss(crew.hands[-1])
            crew.hands.clear()
        if self._ours:
            ray.shutdown()

    def _wanted(self, gpu: bool) -> int:
        """How many actors the machine file asks for, or the cluster has room for."""
        if gpu and self._machine.device == "cpu":
            return 0
        asked = self._machine.gpus if gpu else self._machine.workers
        if asked is not None:
            return asked
        has = ray.cluster_resources()
        return int(has.get("GPU", 0)) if gpu else int(has.get("CPU", 0)) // self._machine.threads

    def _hire(self, crew: _Crew) -> None:
        """Start the actors that are missing; one at least, which tells an autoscaler what is needed."""
        now = time.monotonic()
        if now >= crew.look:
            crew.look = now + LOOK_S
            for _ in range(max(1, self._wanted(crew.gpu)) - len(crew.hands)):
                hand = _Hand(self._actor(crew.gpu))
                hand.hold(hand.actor.ready.remote(), None)
                crew.hands.append(hand)
        if now >= crew.report:
            crew.report = now + REPORT_S
            running = sum(hand.started for hand in crew.hands)
            if running < len(crew.hands):
                kind = "GPU" if crew.gpu else "CPU"
                free = ray.available_resources().get(kind, 0)
                log.warning(
                    "%d of %d %s workers run; the others wait for the cluster, where %g %s are free",
                    *(running, len(crew.hands), kind, free, kind),
                )

    def _actor(self, gpu: bool) -> Any:
        variables = dict.fromkeys(THREAD_VARIABLES, str(self._machine.threads))
        if gpu:
            # No CPU is asked for: the CPU actors hold them all, and are idle while the GPUs work.
            needs = {"num_gpus": 1, "num_cpus": 0}
        else:
            needs = {"num_cpus": self._machine.threads}
            variables["CUDA_VISIBLE_DEVICES"] = ""
        return ray.remote(_Actor).options(**needs, max_restarts=0, runtime_env={"env_vars": variables}).remote()

    def _collect(self, crew: _Crew) -> None:
        """Take in what is done, what has died and what is late."""
        for hand in crew.answered():
            ref, job = hand.drop()
            answer = _answer(ref)
            if job and not isinstance(answer, RayError):
                job.end(answer)
            elif job:
                crew.dismiss(hand)
                job.lost(answer)
            elif answer is None:
                hand.started, crew.stillborn = True, 0
            else:
                crew.stillborn += not hand.started
                crew.dismiss(hand)
                if not crew.hands and crew.stillborn >= ATTEMPTS * max(1, self._wanted(crew.gpu)):
                    raise RunError(f"no Ray worker can be started: {_line(answer)}")
        for hand in [h for h in crew.hands if not h.started and time.monotonic() - h.since > START_S]:
            log.warning("a worker has not started within %g s: another is asked for", START_S)
            crew.dismiss(hand)
            crew.look = 0.0
        deadline_s = self._machine.unit_deadline_s
        for hand in [h for h in crew.hands if h.held and time.monotonic() - h.since > deadline_s]:
            job = hand.held[0][1]
            if job:
                hand.drop()
                crew.dismiss(hand)
                job.overdue(deadline_s)


def _start(machine: Machine) -> None:
    """A Ray of this machine for this process, without dashboard."""
    if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        # Ray would write one to ~/.ray, readable by others. This one is known to this process and its children only.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    logging.getLogger("ray").setLevel(logging.ERROR)
    workers = machine.workers or max(1, (os.cpu_count() or 1) // machine.threads)
    ray.init(
        address="local",
        num_cpus=workers * machine.threads,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _connect(address: str) -> None:
    """Join a cluster that somebody else started."""
    host, _, port = address.rpartition(":")
    if address != "auto" and not re.fullmatch(r"[^/]+:\d+", address):
        raise UserError(f"RAY_ADDRESS: {address}: not host:port of a head; to a dashboard, use `ray job submit`")
    try:
        # Ray itself tries for many minutes.
        if address != "auto":
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS: {address}: no Ray cluster answers: {error}") from None
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        log.warning("RAY_AUTH_MODE is not token: who reaches a Ray cluster without tokens can run any code on it")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        hint = "; is RAY_AUTH_MODE=token set, and is RAY_AUTH_TOKEN the cluster's?"
        raise UserError(f"RAY_ADDRESS: {address}: {_line(error)}{hint}") from None


def _answer(ref: Any) -> Any | Failure | RayError:
    """The result of a call that is done; a RayError where it could not be done, for its actor is gone."""
    try:
        return ray.get(ref)
    except RayTaskError as error:  # outside the attempt: something that cannot be imported or sent over there
        cause = error.cause or error
        return Failure(f"{type(cause).__name__}: {_line(cause)}")
    except RayError as error:
        return error


def _line(error: object) -> str:
    """Its text in one line: the start, which names what happened, and the end, where Ray puts the cause."""
    text = error.cause if isinstance(error, Failure) else str(error)
    line = " ".join(re.sub(r"\x1b\[\d*m", "", text).split())
    return line if len(line) <= 600 else f"{line[:300]} ... {line[-300:]}"
