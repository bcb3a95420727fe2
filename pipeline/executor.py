"""The one seam to the outside: something that does tasks on workers and hands back what came of each.

Two implementations share the contract below: `Serial` here, and Ray in ray_executor.py, the only module that imports
ray. A failure is a value here and nowhere else: the other tasks finish, and the caller names the ones that did not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from pipeline.errors import SchemaError, UserError
from pipeline.storage import without_secrets


@dataclass(frozen=True)
class Failure:
    """A task that could not be done.

    Attributes:
        cause: type and text of the last error, one line.
        user: True where the user can mend it (a UserError); then `cause` is its text alone.
    """

    cause: str
    user: bool = False


class Worker(Protocol):
    """What a worker needs to start: a small frozen value that can travel to another process."""

    def open(self) -> Callable[[Any], Any]:
        """Prepare once per worker process; the function then does any number of tasks.

        An error here is that of the task it was opened for; the next task opens it again.
        """

    def __hash__(self) -> int:
        """Equal values share their workers."""


class Executor(Protocol):
    """Does tasks somewhere. Implementations differ in speed, never in what a task returns."""

    def each(self, worker: Worker, tasks: Iterable[Any], gpu: bool = False) -> Iterator[tuple[int, Any | Failure]]:
        """Do every task once, a bounded number at a time.

        Args:
            worker: how a worker process is prepared; equal values share their workers.
            tasks: consumed lazily, so that millions need no memory.
            gpu: True for tasks of a stage that uses a GPU where there is one.

        Yields:
            (position of the task, what the worker returned or a Failure), in the order of completion.
        """

    def close(self) -> None:
        """End all workers that this executor started."""


def attempt(do: Callable[[Any], Any], task: Any) -> Any | Failure:
    """Do a task; the one place that turns an error into a value."""
    try:
        return do(task)
    except UserError as error:
        return Failure(str(error), user=True)
    except (SchemaError, MemoryError) as error:
        return Failure(f"{type(error).__name__}: {without_secrets(str(error))}")
    except Exception as error:  # noqa: BLE001
        text = without_secrets(" ".join(str(error).split()))
        return Failure(f"{type(error).__name__}: {text[:1000]}")


class Serial:
    """In this process, one task after the other."""

    def __init__(self) -> None:
        self._open: dict[Worker, Callable[[Any], Any]] = {}

    def each(self, worker: Worker, tasks: Iterable[Any], gpu: bool = False) -> Iterator[tuple[int, Any | Failure]]:
        for position, task in enumerate(tasks):
            yield position, attempt(partial(self._do, worker), task)

    def _do(self, worker: Worker, task: Any) -> Any:
        if worker not in self._open:
            self._open[worker] = worker.open()
        return self._open[worker](task)

    def close(self) -> None:
        self._open.clear()
