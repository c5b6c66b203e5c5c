"""A thread that notices when the main one takes far too long for a step."""

from collections.abc import Callable
import statistics
import threading
import time
from types import TracebackType

USUAL = 5  # times the median is too long
POLL_SECONDS = 0.5
REMEMBERED = 200  # durations of a kind


class Watchdog:
    """Calls `bark` once with a line, where one piece of work takes longer than its bound.

    Only time counts in which this process runs: one that was stopped and goes on, as by Ctrl-Z and
    `fg`, is not hung. The first piece of each kind compiles, and is not watched.

    Args:
        bark: called in a thread of its own.
        seconds: the bound; None for five times the median of this kind.
        least: that bound's least value.
    """

    def __init__(self, bark: Callable[[str], None], seconds: float | None, least: float):
        self._bark, self._bound, self._least = bark, seconds, least
        self._seconds: dict[str, list[float]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._since = self._running = 0.0
        self.at: tuple[str, int] | None = None

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def begins(self, kind: str, number: int) -> None:
        """A piece of work begins, such as ("step", 41), and with it the one before it ends."""
        now = time.monotonic()
        if self.at is not None and self.at[0] == kind:
            past = self._seconds.get(kind, [])
            self._seconds[kind] = [*past[-REMEMBERED:], now - self._since]
        self._since, self._running, self.at = now, 0.0, (kind, number)

    def pause(self) -> None:
        """What comes now may take as long as it wants, until the next piece begins."""
        self.at = None

    def bound(self, kind: str) -> float | None:
        """The longest that a piece of this kind may take; None before one was measured."""
        past = self._seconds.get(kind)
        if not past:
            return None
        return self._bound or max(self._least, USUAL * statistics.median(past))

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(POLL_SECONDS):
            now = time.monotonic()
            # Of a pause of the whole process only this much counts.
            self._running += min(now - before, 2 * POLL_SECONDS)
            before, at, running = now, self.at, self._running
            if at is None:
                continue
            bound = self.bound(at[0])
            if bound is not None and running > bound and self.at == at:
                usual = statistics.median(self._seconds[at[0]])
                self._bark(
                    f"{at[0]} {at[1]} has taken {running:.0f} s so far, and the usual one "
                    f"{usual:.2g} s: it hangs"
                )
                return
