"""Learning-rate schedules, as values: warm-up, then a shape over the steps that are left."""

import abc
import dataclasses

import gin
import jax.numpy as jnp
import optax

from routing.ranges import Share


class Schedule(abc.ABC):
    """Abstract: a shape of the learning rate over training.

    Attributes:
        warmup: share of all steps in which the rate rises from 0.
        final: share of the peak to which the rate falls: that of the step after the last, so that
            the last one still learns where it is 0.
    """

    @abc.abstractmethod
    def build(self, peak: float, steps: int) -> optax.Schedule:
        """The rate as a function of the step: a linear warm-up, then this schedule's shape."""


def _check(schedule, **shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            kind = type(schedule).__name__
            raise ValueError(f"{kind}.{name}={value} is a share and must lie between 0 and 1")


def _after_warmup(peak: float, warm: int, rest: optax.Schedule) -> optax.Schedule:
    # The rate of the first step is peak / warm: with 0 it would learn nothing.
    first = optax.linear_schedule(peak / max(warm, 1), peak, max(warm - 1, 1))
    return optax.join_schedules([first, rest], [warm]) if warm else rest


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the peak to final * peak."""

    warmup: Share = 0.05
    final: Share = 0.1

    def __post_init__(self):
        _check(self, warmup=self.warmup, final=self.final)

    def build(self, peak, steps):
        warm = round(self.warmup * steps)
        rest = optax.cosine_decay_schedule(peak, max(steps - warm, 1), self.final)
        return _after_warmup(peak, warm, rest)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from the peak to final * peak."""

    warmup: Share = 0.05
    final: Share = 0.0

    def __post_init__(self):
        _check(self, warmup=self.warmup, final=self.final)

    def build(self, peak, steps):
        warm = round(self.warmup * steps)
        rest = optax.linear_schedule(peak, self.final * peak, max(steps - warm, 1))
        return _after_warmup(peak, warm, rest)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Rsqrt(Schedule):
    """peak * sqrt(warm / step) after the warm-up (Shazeer & Stern 2018)."""

    warmup: Share = 0.05

    def __post_init__(self):
        _check(self, warmup=self.warmup)

    def build(self, peak, steps):
        warm = max(round(self.warmup * steps), 1)
        # optax evaluates this during the warm-up too, at negative steps.
        return _after_warmup(
            peak, warm, lambda step: peak * jnp.sqrt(warm / (warm + jnp.maximum(step, 0)))
        )


@gin.configurable
@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Constant at the peak, then a straight line over the last `decay` share (Hu et al. 2024).

    Attributes:
        decay: share of all steps in which the rate falls; 0 for none, whatever `final` is.
    """

    warmup: Share = 0.05
    decay: Share = 0.2
    final: Share = 0.0

    def __post_init__(self):
        _check(self, warmup=self.warmup, decay=self.decay, final=self.final)
        _check(self, **{"warmup + decay": self.warmup + self.decay})

    def build(self, peak, steps):
        warm, last = round(self.warmup * steps), max(round(self.decay * steps), 1)
        stable = optax.constant_schedule(peak)
        down = optax.linear_schedule(peak, self.final * peak, last)
        rest = optax.join_schedules([stable, down], [max(steps - warm - last, 0)])
        return _after_warmup(peak, warm, rest)
