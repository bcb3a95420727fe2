"""What every command shares: how a function becomes a process with an exit code and one clear message.

0 done; 1 failed, the message names the unit and the cause; 2 wrong command line or recipe; 3 finished, but more input
was damaged than the recipe's limits allow; 130 and 143 after Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import typer

from pipeline.errors import PairsieveError, UserError
from pipeline.storage import without_secrets

DONE, FAILED, WRONG, TOO_DAMAGED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


UNWIND_S = 4.0
"""After a signal, until the process is ended by force."""


class Terminated(BaseException):
    """SIGTERM arrived."""


def main(commands: Sequence[Callable[..., int]], argv: Sequence[str] | None = None) -> int:
    """Run a command line of one command, or of several named after their functions; the exit code."""
    several = len(commands) > 1
    # Plain text, not boxes: a message has to survive a log file.
    app = typer.Typer(
        add_completion=False, no_args_is_help=several, pretty_exceptions_enable=False, rich_markup_mode=None
    )
    for command in commands:
        app.command(name=command.__name__.replace("_", "-").removesuffix("-"))(guarded(command))
    try:
        app(list(sys.argv[1:] if argv is None else argv), prog_name="pairsieve")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED
    return DONE


def guarded(command: Callable[..., int]) -> Callable[..., None]:
    """The command as typer calls it: its code becomes the process's, an error one message and a code."""

    @functools.wraps(command)
    def run(*args: Any, **keys: Any) -> None:
        # On a terminal a progress bar says it; the libraries' own lines are noise either way.
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        for ours in ("pipeline", "jobs"):
            logging.getLogger(ours).setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        raise typer.Exit(attempted(lambda: command(*args, **keys)))

    return run


def attempted(command: Callable[[], int]) -> int:
    """The command's exit code; an error of ours is one line on standard error, never a traceback."""
    later = "what is committed stays; the same command goes on from there"
    try:
        return command()
    except UserError as error:
        return _say(str(error), WRONG)
    except PairsieveError as error:
        return _say(str(error), FAILED)
    except OSError as error:
        return _say(f"{type(error).__name__}: {error}", FAILED)
    except KeyboardInterrupt:
        return _say(f"interrupted; {later}", INTERRUPTED)
    except Terminated:
        return _say(f"terminated; {later}", TERMINATED)


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind in good order; what hangs in a library is cut off. What is committed outlives both."""
    code = TERMINATED if number == signal.SIGTERM else INTERRUPTED
    cut = threading.Timer(UNWIND_S, os._exit, [code])
    cut.daemon = True
    cut.start()
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _say(message: str, code: int) -> int:
    print(f"pairsieve: {without_secrets(message)}", file=sys.stderr)
    return code
