"""How long training takes, and what that means in tokens per second and utilisation."""

import collections
from collections.abc import Iterator
import contextlib
import math
import time
from typing import Any

from moe.runs.tracking import progress
from moe.training import metrics
from moe.training.abstract_model import AbstractModel


class Clock:
    """Training time without evaluations, checkpoints and the first, compiling step.

    total: sums over the whole run; `before` are those of the checkpoint that it goes on from.
    max_seconds: of training, over all starts of the run.
    """

    def __init__(
        self,
        peak: float,
        built: AbstractModel,
        tokens_per_step: int,
        before: dict | None = None,
        max_seconds: float | None = None,
    ):
        self._max_seconds = max_seconds
        self.pace = progress.Pace()
        self.total = {"first_steps": 0.0, "seconds": 0.0, "steps": 0, "kept": 0.0, "logged": 0}
        self.total |= before or {}
        self._peak, self._built, self._tokens = peak, built, tokens_per_step
        self._recent: collections.deque[float] = collections.deque(maxlen=10)
        self._last = time.perf_counter()
        self._skip, self._logged, self._logging = True, False, 0.0

    def tick(self) -> float | None:
        """Seconds since the last step's metrics were there; None for the first, compiling step."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._skip:
            self.total["first_steps"] += seconds
            self._skip = False
            return None
        self.total["seconds"] += seconds
        self.total["steps"] += 1
        self._recent.append(seconds)
        return seconds

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Count the time that goes into numbers; the first time, which compiles, is no step's."""
        start = time.perf_counter()
        yield
        if self._logged:
            self._logging += time.perf_counter() - start
        else:
            self._logged = True
            self.restart()

    def restart(self) -> None:
        """Forget the time since the last step: it was spent on something else."""
        self._last = time.perf_counter()

    @property
    def training_seconds(self) -> float:
        return clock_seconds(self.total)

    def over(self) -> bool:
        """True when as much training time has passed as there may be."""
        return self._max_seconds is not None and self.training_seconds > self._max_seconds

    @property
    def left(self) -> float:
        """Seconds of training that there may still be."""
        limit = math.inf if self._max_seconds is None else self._max_seconds
        return max(limit - self.training_seconds, 0.0)

    def speed(self, routing: metrics.Routing | None) -> dict[str, float]:
        """Over the last ten steps."""
        kept = None if routing is None else routing.kept_per_token(self._built.costs.num_experts)
        if kept is not None:
            self.total["kept"] += kept
            self.total["logged"] += 1
        recent = self._recent or [self.training_seconds]
        seconds = sum(recent) / len(recent)
        return metrics.speed_scalars(self._tokens, seconds, self._built.costs, kept, self._peak)

    def summary(self) -> dict[str, Any]:
        """Of the whole run, over all of its starts."""
        total = self.total
        seconds = total["seconds"] / total["steps"] if total["steps"] else total["first_steps"]
        kept = total["kept"] / total["logged"] if total["logged"] else None
        speed = metrics.speed_scalars(
            self._tokens, max(seconds, 1e-9), self._built.costs, kept, self._peak
        )
        return {
            "train_seconds": self.training_seconds,
            "first_step_seconds": total["first_steps"],
            "logging_share": self._logging / max(total["seconds"], 1e-9),
            **{name.removeprefix("speed/"): value for name, value in speed.items()},
            "kept_experts_per_token": kept,
        }


def clock_seconds(total: dict[str, Any] | None) -> float:
    """Of training in all, by what a checkpoint keeps of the clock; 0 where there is none."""
    return total["seconds"] + total["first_steps"] if total else 0.0
