"""A run's progress on the screen: a bar in a terminal; in a file, a line every ten seconds."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import math
import statistics
import sys
import time
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from moe.errors import printable
from moe.machine import compile_cache

LINE_EVERY_SECONDS = 10
T = TypeVar("T")


class Screen(Console):
    """A console that leaves it to the caller what follows where nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        """Rich would end this process alone, and the others of its run would wait for it."""
        raise


class Display:
    """Prints lines and moves a progress bar.

    Args:
        steps: optimizer steps of the run.
        done: those that are trained already.
        quiet: print nothing, as in all processes but the first.
    """

    def __init__(self, steps: int, done: int = 0, quiet: bool = False):
        self.console = Screen(file=sys.stdout, quiet=quiet, highlight=False, soft_wrap=True)
        self._steps, self._last_line, self._started = steps, 0.0, None
        self._done = done
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            columns: list[Any] = [
                TextColumn("{task.description} {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[line]}"),
            ]
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("step", total=steps, completed=done, line="")

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(printable(line), markup=False)

    def update(self, step: int, line: str, at_most: float = math.inf) -> None:
        """Show that `step` is done, with the time left.

        line: the step's metrics. at_most: seconds of training that `train.max_seconds` leaves.
        """
        now = time.monotonic()
        if self._started is None:
            self._started = now
            self._done = step
        left = ""
        if step > self._done:
            pace = (now - self._started) / (step - self._done)
            left = f"{duration(min(pace * (self._steps - step), at_most))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=f"{line} {left}".rstrip())
        elif now - self._last_line >= LINE_EVERY_SECONDS or step == self._steps:
            self._last_line = now
            self.say(f"step {step}/{self._steps} {line} {left}".rstrip())

    def compiling(self, call: Callable[..., T], what: str) -> Callable[..., T]:
        """The function, which says at its first call how long compiling took.

        what: what it computes, such as "the training step".
        """
        compiled = False

        def timed(*given, **named) -> T:
            nonlocal compiled
            if compiled:
                return call(*given, **named)
            compiled = True
            self.say(f"compiling {what}")
            start, before = time.perf_counter(), compile_cache.counts()
            result = call(*given, **named)  # returns once compiled, before the result is there
            seconds, cached = time.perf_counter() - start, compile_cache.counts().since(before)
            self.say(f"compiled {what} in {seconds:.1f} s{cached}")
            return result

        return timed

    @contextlib.contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """Progress of other long work: yields a function of (done, of) that moves its own bar."""
        task = None
        if self._bar is not None:
            task = self._bar.add_task(what, total=total, line="")

        def count(done: int, of: int) -> None:
            now = time.monotonic()
            if self._bar is not None and task is not None:
                self._bar.update(task, completed=done)
            elif now - self._last_line >= LINE_EVERY_SECONDS:
                self._last_line = now
                self.say(f"{what} {done}/{of}")

        self._last_line = time.monotonic()
        yield count
        if self._bar is not None and task is not None:
            self._bar.remove_task(task)


def duration(seconds: float) -> str:
    """Such as 40 s, 12 min or 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def line(scalars: dict[str, float], word: str, loads: bool = True) -> str:
    """A step's metrics, such as: loss 3.21 bpb 1.93 12,345 tok/s load 1.21 drop 0.3% balanced.

    Load, drop and the word are those of the worst layer; docs/metrics.md defines each.
    loads: whether tokens choose experts, so that loads and drops mean something.
    """
    parts = [
        f"loss {scalars['loss']:.3f}",
        *([f"bpb {scalars['bits_per_byte']:.3f}"] if "bits_per_byte" in scalars else []),
        f"{scalars['speed/tokens_per_second']:,.0f} tok/s",
    ]
    if loads and "load/max_over_mean_worst" in scalars:
        parts += [
            f"load {scalars['load/max_over_mean_worst']:.2f}",
            f"drop {scalars['load/dropped_worst']:.1%}",
        ]
    return " ".join([*parts, word])


def with_status(make: Callable[[Callable[[str], None]], Iterable[T]]) -> Iterator[T]:
    """The items of make(say), with what is said shown while the next item is made.

    In a terminal the last line said stands below the output. In a file each phase is printed once,
    without its rounds: "timing, round 2 of 7" as "timing".
    """
    console, last = Screen(file=sys.stdout, highlight=False, soft_wrap=True), ""
    with console.status("") as status:

        def say(line: str) -> None:
            nonlocal last
            phase = line.partition(", round ")[0]
            if console.is_terminal:
                status.update(line)
            elif phase != last:
                console.print(f"  ... {phase}", markup=False)
            last = phase

        yield from make(say)


class Pace:
    """Notices a step that takes ten times as long as the median of those before it."""

    def __init__(self, factor: float = 10.0, least: int = 10):
        self._factor, self._least = factor, least
        self._seconds: list[float] = []

    def slow(self, seconds: float) -> str | None:
        """A message for a step that took this many seconds, None where that is usual."""
        past, self._seconds = self._seconds, [*self._seconds[-200:], seconds]
        if len(past) < self._least:
            return None
        usual = statistics.median(past)
        if seconds <= self._factor * usual:
            return None
        return f"took {seconds:.2f} s, {seconds / usual:.0f} times the usual {usual:.2f} s"
