"""Losses on a routing decision, as values: a new loss touches no router.

Every loss is a mean over valid tokens, unscaled; `coefficient` scales it in the objective. In a
micro-batch, `inputs.step` holds the statistics of the whole optimizer step, so that a loss on the
global batch and its gradient are the same for any number of micro-batches.

G groups, T tokens per group, E experts, K experts per token.
"""

import abc
import dataclasses
from typing import Literal

import gin
import jax
import jax.numpy as jnp

from routing.records import RouterInputs, RouterStats, Routing, choices_GE


class RouterLoss(abc.ABC):
    """Abstract: a name, a coefficient, and the unscaled value for one layer."""

    name: str
    coefficient: float

    @property
    def of_the_whole_step(self) -> bool:
        """Whether the loss needs the statistics of all micro-batches together."""
        return getattr(self, "scope", None) == "global"

    @abc.abstractmethod
    def __call__(self, routing: Routing, inputs: RouterInputs, stats: RouterStats) -> jax.Array:
        """The loss, a float32 scalar."""


@gin.configurable
@dataclasses.dataclass(frozen=True)
class BalanceLoss(RouterLoss):
    """E / K * sum_e f_e P_e (Shazeer 2017; Fedus 2021, eq. 4-6); 1.0 at perfect balance.

    f is the share of tokens that chose expert e, before dropping; P the mean of the full scores.
    scope "global": f and P over the whole optimizer step (Qiu et al. 2025); "group" or "sequence":
    over each group, then averaged with its number of tokens (DeepSeek-V3, eq. 17-20).
    """

    coefficient: float = 0.01
    scope: Literal["global", "group", "sequence"] = "global"
    name: str = "balance"

    def __post_init__(self):
        if self.scope not in ("global", "group", "sequence"):
            raise ValueError(f"BalanceLoss.scope={self.scope!r}: global, group or sequence")

    def __call__(self, routing, inputs, stats):
        score_GTE = require_scores(routing, self.name)
        if self.scope == "global":
            count_E, score_E = stats.count_E, stats.score_sum_E
            if inputs.step is not None:
                whole, share = inputs.step.stats, inputs.step.share
                own_E = (score_E - jax.lax.stop_gradient(score_E)) / share
                count_E, score_E = whole.count_E, jax.lax.stop_gradient(whole.score_sum_E) + own_E
            return _balance(count_E, score_E)
        valid_GT1 = inputs.valid_GT[..., None]
        score_GE = jnp.where(valid_GT1, score_GTE, 0).sum(1)
        loss_G = jax.vmap(_balance)(choices_GE(routing.decision), score_GE)
        tokens_G = inputs.valid_GT.sum(1)
        return jnp.sum(loss_G * tokens_G) / jnp.maximum(tokens_G.sum(), 1)


def _balance(count_E, score_sum_E):
    """E * sum_e (share of the choices) * (share of the score); zero where there is no token."""
    share_E = count_E / jnp.maximum(count_E.sum(), 1)
    # Scores sum to 1 over the experts, so their sum is the number of tokens.
    tokens = jax.lax.stop_gradient(score_sum_E.sum())
    mean_E = score_sum_E / jnp.where(tokens > 0, tokens, 1.0)
    return count_E.shape[0] * jnp.sum(share_E * mean_E)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ZLoss(RouterLoss):
    """Mean of logsumexp(logits)^2 over valid tokens (Zoph et al. 2022, eq. 5)."""

    coefficient: float = 1e-3
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

    coefficient: float = 1e-3
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
