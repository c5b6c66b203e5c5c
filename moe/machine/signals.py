"""SIGINT and SIGTERM, remembered so that a run can finish its step and save before it stops."""

from collections.abc import Iterator
import contextlib
import signal


class Signals:
    """True once SIGINT or SIGTERM was received; `signal` is its number."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def catching_signals() -> Iterator[Signals]:
    """Remember the first SIGINT or SIGTERM during the block; a second one acts as usual.

    Outside the main thread, where signals can't be handled, this does nothing.
    """
    caught, old = Signals(), {}

    def remember(number, frame):
        caught.signal = number
        signal.signal(number, old[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, remember)
    except ValueError:  # not the main thread
        old.clear()
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
