"""Being asked to stop: the step is finished and saved first."""

from collections.abc import Iterator
import contextlib
import signal


class Signals:
    """True once SIGINT or SIGTERM came; a second one ends the program at once."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def catching_signals() -> Iterator[Signals]:
    """Finish the step and save when asked to stop. Only in the main thread."""
    caught, old = Signals(), {}

    def remember(number, frame):
        caught.signal = number
        signal.signal(number, old[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, remember)
    except ValueError:  # not the main thread: a notebook's worker, say
        old.clear()
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
