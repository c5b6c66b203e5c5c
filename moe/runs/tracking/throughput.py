"""Training time, and tokens per second and utilisation by it."""

import collections
from collections.abc import Iterator
import contextlib
import math
import time
from typing import Any

from moe.runs.tracking import progress
from moe.training import metrics
from moe.training.abstract_model import AbstractModel


class ThroughputMeter:
    """Measures training time, without evaluations and checkpoints, and the speed of training.

    The first step after each start of a run compiles: its time is summed apart from the others'.

    Args:
        peak: FLOP/s of a matmul, measured on this machine.
        model: whose FLOPs count.
        tokens_per_step: of an optimizer step's batch.
        before: `total` from the checkpoint that the run continues.
        max_seconds: how long training may take, over all starts of the run; None for no limit.

    Attributes:
        total: sums over all starts of the run, for its checkpoints: seconds of first steps, seconds
            and number of other steps, and kept experts per token with the number of summands.
        pace: notices slow steps.
    """

    def __init__(
        self,
        peak: float,
        model: AbstractModel,
        tokens_per_step: int,
        before: dict | None = None,
        max_seconds: float | None = None,
    ):
        self._max_seconds = max_seconds
        self.pace = progress.Pace()
        self.total = {"first_steps": 0.0, "seconds": 0.0, "steps": 0, "kept": 0.0, "logged": 0}
        self.total |= before or {}
        self._peak, self._model, self._tokens = peak, model, tokens_per_step
        self._recent: collections.deque[float] = collections.deque(maxlen=10)
        self._last = time.perf_counter()
        self._skip, self._logged, self._logging = True, False, 0.0

    def tick(self) -> float | None:
        """Count a step as done; its seconds, or None for the first step, which compiles."""
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
        """Measure the time that logging takes, as a part of the step's time.

        The first logging compiles: its time is left out.
        """
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
        """Seconds of training over all starts of the run, first steps included."""
        return trained_seconds(self.total)

    def over(self) -> bool:
        """Whether `max_seconds` of training are used up."""
        return self._max_seconds is not None and self.training_seconds > self._max_seconds

    @property
    def left(self) -> float:
        """Seconds of training until `max_seconds` are used up; infinite without a limit."""
        limit = math.inf if self._max_seconds is None else self._max_seconds
        return max(limit - self.training_seconds, 0.0)

    def speed(self, routing: metrics.Routing | None) -> dict[str, float]:
        """Tokens per second, seconds per step and utilisation over the last ten steps.

        routing: that of the last step, None for a dense model.
        """
        kept = None if routing is None else routing.kept_per_token(self._model.costs.num_experts)
        if kept is not None:
            self.total["kept"] += kept
            self.total["logged"] += 1
        recent = self._recent or [self.training_seconds]
        seconds = sum(recent) / len(recent)
        return metrics.speed_scalars(self._tokens, seconds, self._model.costs, kept, self._peak)

    def summary(self) -> dict[str, Any]:
        """Times and speed over all starts of the run, for summary.json."""
        total = self.total
        seconds = total["seconds"] / total["steps"] if total["steps"] else total["first_steps"]
        kept = total["kept"] / total["logged"] if total["logged"] else None
        speed = metrics.speed_scalars(
            self._tokens, max(seconds, 1e-9), self._model.costs, kept, self._peak
        )
        return {
            "train_seconds": self.training_seconds,
            "first_step_seconds": total["first_steps"],
            "logging_share": self._logging / max(total["seconds"], 1e-9),
            **{name.removeprefix("speed/"): value for name, value in speed.items()},
            "kept_experts_per_token": kept,
        }


def trained_seconds(total: dict[str, Any] | None) -> float:
    """Seconds of training in a meter's `total`; 0 for None, without a checkpoint."""
    return total["seconds"] + total["first_steps"] if total else 0.0
