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

from routing.records import (
    RouterInputs,
    RouterStats,
    Routing,
    TokenChoice,
    choices_GE,
    gates_GTE,
)


class RouterLoss(abc.ABC):
    """Abstract: a name, a coefficient, and the unscaled value for one layer."""

    name: str
    coefficient: float

    @property
    def of_the_whole_step(self) -> bool:
        """Whether the loss needs the statistics of all micro-batches together."""
        return getattr(self, "scope", None) == "global"

    def tally(self, routing: Routing, inputs: RouterInputs) -> dict[str, jax.Array]:
        """Sums over valid tokens that the loss wants of the whole step, by name: `stats.own`."""
        return {}

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
    choices "first": f counts only each token's first choice (GShard, algorithm 1).
    devices: E is taken as so many equal parts in a row, one a device (DeepSeekMoE, eq. 15-17).
    cheap: so many of the last experts cost nothing, and count `cheap_weight` times (MoE++, eq. 7:
    tau, as `ZeroCopyConstant.share`), so that perfect balance is below 1.
    """

    coefficient: float = 0.01
    scope: Literal["global", "group", "sequence"] = "global"
    choices: Literal["all", "first"] = "all"
    devices: int | None = None
    cheap: int = 0
    cheap_weight: float = 0.75
    name: str = "balance"

    def __post_init__(self):
        if self.scope not in ("global", "group", "sequence"):
            raise ValueError(f"BalanceLoss.scope={self.scope!r}: global, group or sequence")
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"BalanceLoss.devices={self.devices} must be at least 1, or None")
        if self.choices not in ("all", "first"):
            raise ValueError(f"BalanceLoss.choices={self.choices!r}: all or first")
        if self.cheap < 0 or not 0 < self.cheap_weight <= 1:
            raise ValueError(
                f"BalanceLoss.cheap={self.cheap}, cheap_weight={self.cheap_weight}: a number of "
                "experts, and a weight above 0 and at most 1"
            )
        if self.cheap and self.devices is not None:
            raise ValueError("BalanceLoss.cheap and devices exclude each other")

    def tally(self, routing, inputs):
        first = self.choices == "first" and self.scope == "global"
        return {f"{self.name}.first": first_choices_GE(routing).sum(0)} if first else {}

    def __call__(self, routing, inputs, stats):
        score_GTE = require_scores(routing, self.name)
        if self.scope == "global":
            first = f"{self.name}.first"
            counted = stats if inputs.step is None else inputs.step.stats
            count_E = counted.own[first] if self.choices == "first" else counted.count_E
            score_E = of_the_step(stats, inputs, lambda stats: stats.score_sum_E)
            return self._balance(count_E, score_E)
        valid_GT1 = inputs.valid_GT[..., None]
        score_GE = jnp.where(valid_GT1, score_GTE, 0).sum(1)
        first = self.choices == "first"
        count_GE = first_choices_GE(routing) if first else choices_GE(routing.decision)
        loss_G = jax.vmap(self._balance)(count_GE, score_GE)
        tokens_G = inputs.valid_GT.sum(1)
        return jnp.sum(loss_G * tokens_G) / jnp.maximum(tokens_G.sum(), 1)

    def _balance(self, count_E, score_sum_E):
        """E * sum_e w_e (share of the choices) * (share of the score); zero without a token."""
        count_E, score_sum_E = self._by_device(count_E), self._by_device(score_sum_E)
        share_E = count_E / jnp.maximum(count_E.sum(), 1)
        # Scores sum to 1 over the experts, so their sum is the number of tokens.
        tokens = jax.lax.stop_gradient(score_sum_E.sum())
        mean_E = score_sum_E / jnp.where(tokens > 0, tokens, 1.0)
        experts = count_E.shape[0]
        is_cheap_E = jnp.arange(experts) >= experts - self.cheap
        return experts * jnp.sum(jnp.where(is_cheap_E, self.cheap_weight, 1) * share_E * mean_E)

    def _by_device(self, sum_E):
        """Sums of the experts that share a device, where the loss is on devices."""
        if self.devices is None:
            return sum_E
        if sum_E.shape[0] % self.devices:
            raise ValueError(
                f"BalanceLoss.devices={self.devices} does not divide the {sum_E.shape[0]} experts"
            )
        return sum_E.reshape(self.devices, -1).sum(-1)


def of_the_step(stats: RouterStats, inputs: RouterInputs, read) -> jax.Array:
    """A sum over the whole optimizer step, with the gradient of this micro-batch's part of it.

    The parts' losses are weighted with their share of the tokens and added, so that each part's
    gradient is divided by its share here.
    """
    own = read(stats)
    if inputs.step is None:
        return own
    whole = jax.lax.stop_gradient(read(inputs.step.stats))
    return whole + (own - jax.lax.stop_gradient(own)) / inputs.step.share


def first_choices_GE(routing: Routing) -> jax.Array:
    """How many tokens of each group have an expert for their first choice: int32."""
    decision = routing.decision
    if not isinstance(decision, TokenChoice):
        raise ValueError('BalanceLoss.choices="first" needs a router whose tokens choose')
    # The largest gate that stands: not every router lists its choices in order.
    gate_GTK = jnp.where(decision.keep_GTK, jax.lax.stop_gradient(decision.gate_GTK), -jnp.inf)
    best_GT1 = jnp.argmax(gate_GTK, axis=-1)[..., None]
    first = dataclasses.replace(
        decision,
        expert_GTK=jnp.take_along_axis(decision.expert_GTK, best_GT1, -1),
        gate_GTK=jnp.take_along_axis(decision.gate_GTK, best_GT1, -1),
        keep_GTK=jnp.take_along_axis(decision.keep_GTK, best_GT1, -1),
    )
    return choices_GE(first)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ImportanceLoss(RouterLoss):
    """CV^2 over the experts of their summed gates (Shazeer et al. 2017, eq. 6-7); whole step.

    of "scores": of their full scores, chosen or not (V-MoE, appendix A).
    """

    coefficient: float = 0.1
    of: Literal["gates", "scores"] = "gates"
    name: str = "importance"

    def __post_init__(self):
        if self.of not in ("gates", "scores"):
            raise ValueError(f"ImportanceLoss.of={self.of!r}: gates or scores")

    @property
    def of_the_whole_step(self) -> bool:
        return True

    def tally(self, routing, inputs):
        if self.of == "scores":
            return {}
        gate_GTE = jnp.where(inputs.valid_GT[..., None], gates_GTE(routing.decision), 0)
        return {self.name: gate_GTE.sum((0, 1))}

    def __call__(self, routing, inputs, stats):
        if self.of == "scores":
            require_scores(routing, self.name)
            return cv_squared(of_the_step(stats, inputs, lambda stats: stats.score_sum_E))
        return cv_squared(of_the_step(stats, inputs, lambda stats: stats.own[self.name]))


@gin.configurable
@dataclasses.dataclass(frozen=True)
class LoadLoss(RouterLoss):
    """CV^2 over the experts of their smooth expected load (Shazeer et al. 2017, eq. 10-11).

    For routers that draw noise and know how likely each expert was to be chosen.
    """

    coefficient: float = 0.1
    name: str = "load"

    @property
    def of_the_whole_step(self) -> bool:
        return True

    def tally(self, routing, inputs):
        if routing.load_GTE is None:
            raise ValueError(
                "LoadLoss needs a router that estimates its load (NoisyTopK, VMoE); Hierarchical "
                "has HierarchicalLoadLoss, others BalanceLoss and ImportanceLoss"
            )
        return {self.name: jnp.where(inputs.valid_GT[..., None], routing.load_GTE, 0).sum((0, 1))}

    def __call__(self, routing, inputs, stats):
        return cv_squared(of_the_step(stats, inputs, lambda stats: stats.own[self.name]))


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TermLoss(RouterLoss):
    """The mean over valid tokens of a loss term that the router itself computes, by its name."""

    name: str = gin.REQUIRED  # pyright: ignore[reportAssignmentType]
    coefficient: float = 1.0

    def __call__(self, routing, inputs, stats):
        if self.name not in routing.terms:
            has = ", ".join(routing.terms) or "no terms"
            raise ValueError(f"TermLoss.name={self.name!r}: this router has {has}")
        return masked_mean(routing.terms[self.name], inputs.valid_GT)


def cv_squared(sum_E) -> jax.Array:
    """Variance (biased) over squared mean; 0 where there is nothing."""
    mean = sum_E.mean()
    return jnp.square(sum_E - mean).mean() / jnp.where(mean == 0, 1.0, jnp.square(mean))


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
