"""SIGINT and SIGTERM: a run finishes its step and saves; where nothing is lost, it ends at once."""

from collections.abc import Iterator
import contextlib
import os
import signal
import threading
import time
from types import FrameType

from moe.machine import exits

NUMBERS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 0.3  # `timeout` and some schedulers send a signal twice; that is one
LEAVE_SECONDS = 10  # for what is stopped in the middle, until the program ends without it


class Stopped(BaseException):
    """Raised by a signal within `Signals.stopping`."""


class Signals:
    """True once SIGINT or SIGTERM was received; `signal` is its number.

    Attributes:
        at_once: a signal ends the program at once, since nothing would be lost; of the program's
            signals alone.
    """

    signal: int | None = None
    at_once = False
    _stopping = False
    _watched: float | None = None  # when the thread of `watch` read the first one

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """The block can be stopped anywhere: a signal in it, or before it, raises Stopped."""
        self._stopping = True
        try:
            if self:
                raise Stopped
            yield
        finally:
            self._stopping = False
            # A signal that was taken here is not to end the program when the thread reads it.
            self.at_once = _of_program is self and not self

    def _received(self, number: int) -> None:
        if self.signal is None:
            self.signal = number

    def handle(self, number: int, frame: FrameType | None) -> None:
        """What Python calls in the main thread, once that is back in Python's code."""
        self._received(number)
        if self._stopping:
            self._stopping = False
            raise Stopped

    def watch(self, descriptor: int) -> None:
        """Read signals' numbers from a pipe, and act while the main thread is busy elsewhere.

        Each signal is read once here and handled once in the main thread, in either order; what is
        a second one is told by this thread's reading alone.
        """
        while number := os.read(descriptor, 1):
            if number[0] not in NUMBERS:
                continue
            self._received(number[0])
            now = time.monotonic()
            self._watched = self._watched or now
            if self.at_once or now - self._watched > SAME_SECONDS:
                _end(number[0])
            if self._stopping:
                timer = threading.Timer(LEAVE_SECONDS, _end, [number[0]])
                timer.daemon = True
                timer.start()


def _end(number: int) -> None:
    name = signal.Signals(number).name
    exits.end(
        f"moe: interrupted by {name}; the same command goes on from what is saved",
        exits.of_signal(number),
    )


_of_program: Signals | None = None


@contextlib.contextmanager
def of_the_program() -> Iterator[Signals]:
    """For the program's main function: a signal ends it at once, until a run clears `at_once`.

    A second one always does. A thread acts on them, also while the main thread imports or compiles:
    an exception in the middle of an import can end in a segmentation fault.
    """
    global _of_program
    caught = Signals()
    caught.at_once = True
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    except ValueError:  # not the main thread
        os.close(read)
        os.close(write)
        yield caught
        return
    thread = threading.Thread(target=caught.watch, args=[read], daemon=True)
    thread.start()
    old = {number: signal.signal(number, caught.handle) for number in NUMBERS}
    _of_program = caught
    try:
        yield caught
    finally:
        _of_program = None
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(write)
        thread.join()
        os.close(read)


@contextlib.contextmanager
def catching_signals() -> Iterator[Signals]:
    """Remember the first SIGINT or SIGTERM during the block; a second one acts as usual.

    Within `of_the_program` that one is returned. Outside the main thread, where signals can't be
    handled, this does nothing.
    """
    if _of_program is not None:
        yield _of_program
        return
    caught, old = Signals(), {}

    def remember(number, frame):
        signal.signal(number, old[number])
        caught.handle(number, frame)

    try:
        for number in NUMBERS:
            old[number] = signal.signal(number, remember)
    except ValueError:  # not the main thread
        old.clear()
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
