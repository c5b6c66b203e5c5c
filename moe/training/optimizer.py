"""Optimizers as values: `build(parameters, steps)` returns an optax transformation.

All of them clip by the global norm, choose a direction, and update p -= rate * (direction +
weight_decay * p). `parameters` holds every parameter's logical axes and role by name, which say
what is a matrix, and which axes only stack matrices. Norms and biases don't decay; router state is
no parameter and is not updated here.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import gin
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from moe.errors import UserError
from moe.model.functional import Axes, Declared
from moe.training.schedules import Cosine, Schedule
from routing.ranges import Count, LessThanOne, NonNegative, Positive

Parameters = dict[str, Declared]
# Axes along which weights are stacked.
STACKED = ("layer", "expert", "segment")


class Optimizer(abc.ABC):
    """Abstract: peak learning rate, schedule, decay and clipping of an optax transformation.

    Attributes:
        learning_rate: the peak; schedules are shares of it.
        schedule: `Cosine()` where None.
        weight_decay: p -= rate * weight_decay * p, for matrices.
        clip_norm: gradients with a larger norm, over all parameters, are scaled to it; None for no
            clipping.
        direction_has_one_size: whether a direction's entries have the same size in every weight,
            as with Adam's, which `Transformer.base_width` relies on.
        b1, b2: decay of the running means of gradients and of their squares.
    """

    learning_rate: float
    schedule: Schedule | None
    weight_decay: float
    clip_norm: float | None
    direction_has_one_size: ClassVar[bool] = True

    @abc.abstractmethod
    def direction(self, parameters: Parameters) -> optax.GradientTransformation:
        """From gradients to the direction, which the rate multiplies; without weight decay."""

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate as a function of the step."""
        schedule = Cosine() if self.schedule is None else self.schedule
        return schedule.build(self.learning_rate, steps)

    def build(
        self, parameters: Parameters, steps: int | None = None
    ) -> optax.GradientTransformation:
        """Clipping, direction, weight decay and rate in a chain; state by parameter name.

        steps: of the schedule; where None, each update is given its rate: `update(..., rate=rate)`.
            A compiled update is then the same for every learning rate and schedule.

        Raises:
            UserError: the model has a base width, and the optimizer's directions are of another
                size than Adam's.
        """
        by_width = {name: p.rate for name, p in parameters.items() if p.rate != 1}
        if by_width and not self.direction_has_one_size:
            raise UserError(
                f"Transformer.base_width: its rates are those of Adam, not of {type(self).__name__}"
                "; choose AdamW, Lion or Adafactor, or leave it out"
            )
        clip = optax.identity()
        if self.clip_norm is not None:
            clip = optax.clip_by_global_norm(self.clip_norm)
        return optax.chain(
            clip,
            self.direction(parameters),
            *([of_width(by_width)] if by_width else []),
            optax.add_decayed_weights(self.weight_decay, decayed(parameters)),
            given_rate() if steps is None else optax.scale_by_learning_rate(self.rate(steps)),
        )


def of_width(rates: dict[str, float]) -> optax.GradientTransformation:
    """Multiply the directions of these parameters; decay, which follows, stays as it is."""

    def update(updates, params):
        return {name: rates.get(name, 1.0) * update for name, update in updates.items()}

    return optax.stateless(update)


def given_rate() -> optax.GradientTransformationExtraArgs:
    """Multiply updates by -rate, a keyword of `update`; the state is that of a schedule."""

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **given):
        rate = given["rate"]
        updates = jax.tree.map(lambda u: jnp.asarray(-rate, u.dtype) * u, updates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def own_axes(axes: Axes) -> Axes:
    """The axes of one weight, without layers, experts and segments."""
    return tuple(a for a in axes if a not in STACKED)


def is_matrix(axes: Axes) -> bool:
    """Whether a weight has two or more axes."""
    return len(own_axes(axes)) >= 2


def stacked(axes: Axes) -> int:
    """The number of leading axes along which weights are stacked."""
    return len(axes) - len(own_axes(axes))


def per_weight(
    rule: optax.GradientTransformation, parameters: Parameters
) -> optax.GradientTransformation:
    """A transformation of one weight, applied to that of every layer and expert separately.

    State is kept by parameter name, with the stacked axes in front.
    """

    def over(function, name):
        for _ in range(stacked(parameters[name].axes)):
            function = jax.vmap(function)
        return function

    def init(params):
        return {name: over(rule.init, name)(value) for name, value in params.items()}

    def update(updates, state, params=None):
        assert params is not None
        both = {
            name: over(rule.update, name)(updates[name], state[name], params[name])
            for name in updates
        }
        return {n: u for n, (u, _) in both.items()}, {n: s for n, (_, s) in both.items()}

    return optax.GradientTransformation(init, update)


def decayed(parameters: Parameters) -> dict[str, bool]:
    """Which parameters decay, by name: matrices and embeddings, not norms, biases or scales."""
    return {name: is_matrix(p.axes) and p.role != "norm" for name, p in parameters.items()}


@gin.configurable
@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    Attributes:
        epsilon: added to the root of the mean square.
    """

    learning_rate: NonNegative = 1e-3
    schedule: Schedule | None = None
    b1: LessThanOne = 0.9
    b2: LessThanOne = 0.95
    epsilon: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip_norm: Positive | None = 1.0

    def direction(self, parameters):
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.epsilon)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
    """Factored second moments, updates clipped to an RMS of 1 (Shazeer & Stern 2018, section 6).

    Every layer's and expert's weight is treated separately. Rates are absolute, not relative to
    the parameter's RMS.
    """

    learning_rate: NonNegative = 1e-2
    schedule: Schedule | None = None
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = 1.0

    def direction(self, parameters):
        rule = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        return per_weight(rule, parameters)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    """The sign of an interpolated momentum: one running mean, no squares (Chen et al. 2023)."""

    learning_rate: NonNegative = 3e-4
    schedule: Schedule | None = None
    b1: LessThanOne = 0.9
    b2: LessThanOne = 0.99
    weight_decay: NonNegative = 0.3
    clip_norm: Positive | None = 1.0

    def direction(self, parameters):
        return optax.scale_by_lion(b1=self.b1, b2=self.b2)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Orthogonalised momentum for weight matrices (Jordan 2024), every expert's separately.

    Embeddings, head, routers and vectors are updated by Adam with the same rate and decay; Muon's
    updates are scaled to Adam's RMS (Liu et al. 2025, `consistent_rms` 0.2).

    Attributes:
        momentum: decay of the running mean of gradients.
        iterations: of Newton-Schulz, in the orthogonalisation.
        b1, b2: of Adam.
    """

    learning_rate: NonNegative = 4e-3
    schedule: Schedule | None = None
    momentum: LessThanOne = 0.95
    iterations: Count = 5
    b1: LessThanOne = 0.9
    b2: LessThanOne = 0.95
    weight_decay: NonNegative = 0.1
    clip_norm: Positive | None = 1.0
    direction_has_one_size = False

    def direction(self, parameters):

        def numbers(params: Any):
            return {name: matrix_axes(parameters[name]) for name in params}

        return optax.contrib.muon(
            -1.0,  # only the direction: weight decay and rate follow in `build`
            ns_steps=self.iterations,
            beta=self.momentum,
            adam_b1=self.b1,
            adam_b2=self.b2,
            muon_weight_dimension_numbers=numbers,
            consistent_rms=0.2,
        )


def first_column(axes: Axes) -> int:
    """The first axis of a matrix's columns; those before, but for stacked ones, are its rows.

    Weights whose first axis is the model width ("embed") are width by the rest, e.g. (D, H * K);
    others are the rest by the last axis, e.g. (H * K, D).
    """
    return stacked(axes) + 1 if axes[stacked(axes)] == "embed" else len(axes) - 1


def matrix_axes(declared: Declared):
    """The axes that Muon takes as a matrix's rows and columns; None for parameters of Adam."""
    axes, role, _ = declared
    if not is_matrix(axes) or role in ("embedding", "head", "router"):
        return None
    every, cut = tuple(range(len(axes))), first_column(axes)
    return optax.contrib.MuonDimensionNumbers(every[stacked(axes) : cut], every[cut:])
