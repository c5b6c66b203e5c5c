"""Exit statuses of the program, and how it ends at once from any thread."""

from collections.abc import Callable
import os
import sys
import threading
from typing import Any, TypeVar

from moe.errors import printable

MISTAKE = 2  # of the user
PEER_LOST = 80  # another process of the run has ended or doesn't answer
HUNG = 81  # a step, or a batch of an evaluation, took too long
NO_PROGRESS = 82  # `moe launch` has started a run again and again, and it saved nothing
CORRUPTED = 83  # devices have computed or remembered something wrongly
BROKEN_PIPE = 141

T = TypeVar("T")
# Called with the exit status before the program ends at once, for two seconds at most.
last_words: list[Callable[[int], Any]] = []


def of_signal(number: int) -> int:
    """The exit status after a signal, as shells have it: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


def end(line: str, code: int) -> None:
    """Print a line and end this process at once, whatever its other threads do.

    Nothing is cleaned up, so that neither a hanging disk nor a barrier of JAX can keep it.
    """
    briefly(sys.stdout.flush)
    shown = "\x1b[?25h" if os.isatty(1) else ""  # a progress bar has hidden the cursor
    os.write(2, f"{shown}{printable(line)}\n".encode(errors="replace"))
    _leave(code)


def leave(code: int) -> int:
    """Return the exit status; but end at once with it where others are told of that first.

    JAX would wait at the end for five minutes until all processes of a run are there.
    """
    if code and last_words:
        briefly(sys.stdout.flush)
        _leave(code)
    return code


def _leave(code: int) -> None:
    for say in last_words:
        briefly(lambda say=say: say(code), 5)
    os._exit(code)


def briefly(call: Callable[[], T], seconds: float = 2) -> T | None:
    """call(), or None where it takes longer or fails; it goes on in a thread of its own then."""
    found: list[T] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
