"""Losses on a routing decision, as values: a new loss touches no router.

Every loss is a mean over valid tokens, unscaled; `coefficient` scales it in the objective. In a
micro-batch, `inputs.context.global_batch` holds the statistics of the whole optimizer step, so that
a loss on the global batch and its gradient are the same for any number of micro-batches.

G groups, T tokens per group, E experts.
"""

import abc
import dataclasses
from typing import Literal

import gin
import jax
import jax.numpy as jnp

from routing.inputs import RouterInputs
from routing.ranges import NonNegative, Real
from routing.records import RouterStats, Routing


class RouterLoss(abc.ABC):
    """Abstract: a name, a coefficient, and the unscaled value for one layer.

    Attributes:
        name: under which it is logged; two losses of a router need two names.
        coefficient: what the loss is multiplied with in the objective.
        over_layers: what enters the objective is the coefficient times the "sum" of the values of
            all sparse layers (Switch, GShard, DeepSeek), or times their "mean" (OLMoE).
    """

    name: str
    coefficient: float
    over_layers: Literal["sum", "mean"] = "sum"

    @property
    def uses_global_batch(self) -> bool:
        """Whether the loss needs the statistics of all micro-batches together."""
        return False

    @property
    def owner(self) -> str:
        """The key of the loss's own sums in `stats.batch_sums`."""
        return f"loss/{self.name}"

    def batch_sums(self, routing: Routing, inputs: RouterInputs) -> dict[str, jax.Array]:
        """Sums over valid tokens by name; later found in `stats.batch_sums[self.owner]`."""
        return {}

    def check_layer(self, zero_computation: int) -> None:
        """Raise ValueError where the loss doesn't fit a layer with so many such experts."""
        assert zero_computation >= 0

    @abc.abstractmethod
    def __call__(self, routing: Routing, inputs: RouterInputs, stats: RouterStats) -> jax.Array:
        """The loss, a float32 scalar."""


def global_batch_sum(stats: RouterStats, inputs: RouterInputs, read) -> jax.Array:
    """A sum over the global batch whose gradient flows through this micro-batch alone.

    read: the sum, from statistics. Micro-batch losses are later weighted by their share of the
    tokens; dividing the gradient by it here cancels that weight.
    """
    local = read(stats)
    global_batch = inputs.context.global_batch
    if global_batch is None:
        return local
    whole = jax.lax.stop_gradient(read(global_batch.stats))
    return whole + (local - jax.lax.stop_gradient(local)) / global_batch.share


def token_weighted(value_N, tokens_N) -> jax.Array:
    """The mean of the values, each weighted with its number of tokens; 0 without any."""
    return jnp.sum(value_N * tokens_N) / jnp.maximum(tokens_N.sum(), 1)


def check_one_of(who: str, values: object, **choices: tuple) -> None:
    """Raise ValueError where an attribute is none of its choices."""
    for name, allowed in choices.items():
        if (value := getattr(values, name)) not in allowed:
            raise ValueError(f"{who}.{name}={value!r}: one of {', '.join(map(str, allowed))}")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TermLoss(RouterLoss):
    """The mean over valid tokens of a loss term that the router itself computes, by its name.

    Attributes:
        name: of the router's own term.
    """

    name: str = gin.REQUIRED  # pyright: ignore[reportAssignmentType]
    coefficient: NonNegative = 1.0
    over_layers: Literal["sum", "mean"] = "sum"

    def __call__(self, routing, inputs, stats):
        if self.name not in routing.terms:
            has = ", ".join(routing.terms) or "no terms"
            raise ValueError(f"TermLoss.name={self.name!r}: this router has {has}")
        return masked_mean(routing.terms[self.name], inputs.valid_GT)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ZLoss(RouterLoss):
    """Mean of logsumexp(logits)^2 over valid tokens (Zoph et al. 2022, eq. 5)."""

    coefficient: NonNegative = 1e-3
    over_layers: Literal["sum", "mean"] = "sum"
    name: str = "z"

    def __call__(self, routing, inputs, stats):
        if routing.logits_GTE is None:
            raise ValueError("ZLoss needs a router with logits; this router has none")
        size_GT = jax.nn.logsumexp(routing.logits_GTE, axis=-1)
        return masked_mean(jnp.square(size_GT), inputs.valid_GT)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class EntropyLoss(RouterLoss):
    """Mean entropy (nats) of a token's scores: a positive coefficient makes routing decided."""

    coefficient: Real = 1e-3
    over_layers: Literal["sum", "mean"] = "sum"
    name: str = "entropy"

    def __call__(self, routing, inputs, stats):
        score_GTE = require_scores(routing, self.name)
        score_GTE = jnp.where(inputs.valid_GT[..., None], score_GTE, 1.0)
        entropy_GT = -jnp.sum(score_GTE * jnp.log(jnp.maximum(score_GTE, 1e-30)), axis=-1)
        return masked_mean(entropy_GT, inputs.valid_GT)


def masked_mean(value_GT, valid_GT):
    """The mean over valid tokens; 0 where there are none."""
    total = jnp.where(valid_GT, value_GT, 0).sum()
    return total / jnp.maximum(valid_GT.sum(), 1)


def require_scores(routing: Routing, name: str) -> jax.Array:
    """The scores (G, T, E); ValueError where a router without any is given a loss on them."""
    if routing.score_GTE is None:
        raise ValueError(f"the {name} loss needs a router with scores; this router has none")
    return routing.score_GTE
