"""Losses on a routing decision, as values: no router depends on a loss.

A loss returns its unscaled value; the training loss adds `coefficient` times it. In a micro-batch,
`inputs.context.global_batch` holds the statistics of the global batch, so that a loss on the global
batch and its gradient are the same for any number of micro-batches.

G groups, T tokens per group, E experts.
"""

import abc
import dataclasses
from typing import Literal

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from routing.inputs import RouterInputs
from routing.ranges import NonNegative, Real
from routing.records import AnyArray, RouterStats, Routing


class RouterLoss(abc.ABC):
    """Abstract: a name, a coefficient, and the unscaled value for one layer.

    Attributes:
        name: of its metrics; two losses of a router need two names.
        coefficient: its factor in the training loss.
        over_layers: whether the "sum" of the values of all sparse layers (Switch, GShard, DeepSeek)
            is multiplied by the coefficient, or their "mean" (OLMoE).
    """

    name: str
    coefficient: float
    over_layers: Literal["sum", "mean"] = "sum"

    @property
    def uses_global_batch(self) -> bool:
        """Whether the loss is on the statistics of the global batch, all micro-batches together."""
        return False

    @property
    def owner(self) -> str:
        """The key of the loss's batch sums in `stats.batch_sums`."""
        return f"loss/{self.name}"

    def batch_sums(self, routing: Routing, inputs: RouterInputs) -> dict[str, jax.Array]:
        """Sums over valid tokens, by name, which `stats.batch_sums[self.owner]` then holds."""
        return {}

    def check_layer(self, zero_computation: int) -> None:
        """Raise ValueError where the loss doesn't fit the layer's zero-computation experts."""
        assert zero_computation >= 0

    @abc.abstractmethod
    def __call__(self, routing: Routing, inputs: RouterInputs, stats: RouterStats) -> jax.Array:
        """The unscaled loss of one layer, a float32 scalar."""


def global_batch_sum(stats: RouterStats, inputs: RouterInputs, read) -> jax.Array:
    """Global-batch sum whose gradient flows through this micro-batch only.

    Micro-batch losses are later weighted by token share; dividing the gradient here cancels that
    weight.

    Args:
        stats: of this micro-batch.
        inputs: of this micro-batch, with the global batch's statistics if there are several.
        read: returns the sum from statistics.
    """
    local = read(stats)
    global_batch = inputs.context.global_batch
    if global_batch is None:
        return local
    total = jax.lax.stop_gradient(read(global_batch.stats))
    return total + (local - jax.lax.stop_gradient(local)) / global_batch.share


def token_weighted(value_N: Float[AnyArray, " N"], tokens_N: Int[AnyArray, " N"]) -> jax.Array:
    """The mean of the values, weighted by their number of tokens; 0 without any token."""
    return jnp.sum(value_N * tokens_N) / jnp.maximum(tokens_N.sum(), 1)


def check_one_of(who: str, values: object, **choices: tuple) -> None:
    """Raise ValueError where an attribute has none of its allowed values."""
    for name, allowed in choices.items():
        if (value := getattr(values, name)) not in allowed:
            raise ValueError(f"{who}.{name}={value!r}: one of {', '.join(map(str, allowed))}")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TermLoss(RouterLoss):
    """The mean over valid tokens of a loss term that the router computes: `Routing.terms`.

    Attributes:
        name: of the term.
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
    """Mean entropy of a token's scores, in nats: a positive coefficient sharpens routing."""

    coefficient: Real = 1e-3
    over_layers: Literal["sum", "mean"] = "sum"
    name: str = "entropy"

    def __call__(self, routing, inputs, stats):
        score_GTE = require_scores(routing, self.name)
        score_GTE = jnp.where(inputs.valid_GT[..., None], score_GTE, 1.0)
        entropy_GT = -jnp.sum(score_GTE * jnp.log(jnp.maximum(score_GTE, 1e-30)), axis=-1)
        return masked_mean(entropy_GT, inputs.valid_GT)


def masked_mean(value_GT: Float[AnyArray, "G T"], valid_GT: Bool[AnyArray, "G T"]):
    """The mean over valid tokens; 0 where there are none."""
    total = jnp.where(valid_GT, value_GT, 0).sum()
    return total / jnp.maximum(valid_GT.sum(), 1)


def require_scores(routing: Routing, name: str) -> jax.Array:
    """The router's scores (G, T, E); ValueError where it has none, naming the loss."""
    if routing.score_GTE is None:
        raise ValueError(f"the {name} loss needs a router with scores; this router has none")
    return routing.score_GTE
