"""Experts that cost nothing worth counting: nothing, a copy, a constant, or a running mean.

G groups, T tokens, D model width, E experts, N cheap experts, M of them constant.
"""

import dataclasses
from fractions import Fraction

from flax import nnx
import gin
import jax
import jax.numpy as jnp

from routing.balancers import StepState
from routing.capacity import Capacity
from routing.parameters import parameter, router_state, truncated_normal, zeros
from routing.ranges import Count, LessThanOne, Natural, SomeShare
from routing.records import RouterInputs, RouterStats, TokenChoice


@gin.configurable
class ZeroCopyConstant(nnx.Module):
    """MoE++ (Jin et al. 2024): zero gives 0, copy gives x, constant a mixture of x and a vector.

    The router chooses among the experts and these, which follow them, as if all were alike. A
    constant expert gives a_1 x + a_2 v, (a_1, a_2) = softmax(W x) (eq. 4-5). Capacity is divided
    so that an expert takes `share` of what a cheap one may take (eq. 8); `BalanceLoss.cheap`
    weights the balance loss alike (eq. 7), and `TopK.residual` is the router's residual (eq. 6).

    Args:
        d_model: D.
        zero, copy, constant: how many of each.
        share: tau in the paper; 1 treats all alike.
        renormalise: the gates of a token that chose a zero sum to 1 without it, as in the
            authors' code and not in the paper.
    """

    def __init__(
        self,
        d_model: Count,
        zero: Natural = 1,
        copy: Natural = 1,
        constant: Natural = 2,
        share: SomeShare = 0.75,
        renormalise: bool = False,
    ):
        if min(zero, copy, constant) < 0 or zero + copy + constant == 0:
            raise ValueError(
                f"ZeroCopyConstant.zero={zero}, copy={copy}, constant={constant}: none may be "
                "negative and one has to be above 0"
            )
        if not 1e-3 <= share <= 1:
            raise ValueError(f"ZeroCopyConstant.share={share} must lie between 0.001 and 1")
        self.share, self.renormalise = Fraction(share).limit_denominator(10_000), renormalise
        self.zero, self.copy, self.constant = zero, copy, constant
        self.count = zero + copy + constant
        shape, axes = (d_model, constant, 2), ("embed", None, None)
        self.mix_DMX = parameter(shape, axes, truncated_normal()) if constant else None
        shape, axes = (constant, d_model), (None, "embed")
        self.vector_MD = parameter(shape, axes, zeros) if constant else None

    def split(self, decision: TokenChoice, experts: int) -> tuple[TokenChoice, TokenChoice]:
        """The assignments to the experts, and those to the cheap ones, numbered from 0."""
        zero_GTK = decision.expert_GTK - experts
        zero_GTK = (0 <= zero_GTK) & (zero_GTK < self.zero)
        if self.renormalise:
            gate_GTK = jnp.where(zero_GTK | ~decision.keep_GTK, 0, decision.gate_GTK)
            sum_GT1 = gate_GTK.sum(-1, keepdims=True)
            gate_GTK = gate_GTK / jnp.where(sum_GT1 > 0, sum_GT1, 1)
            has_zero_GT1 = (zero_GTK & decision.keep_GTK).any(-1, keepdims=True)
            gate_GTK = jnp.where(has_zero_GT1, gate_GTK, decision.gate_GTK)
            decision = dataclasses.replace(decision, gate_GTK=gate_GTK)

        def part(is_its_GTK, first, count):
            return dataclasses.replace(
                decision,
                expert_GTK=jnp.where(is_its_GTK, decision.expert_GTK - first, 0),
                keep_GTK=decision.keep_GTK & is_its_GTK,
                num_experts=count,
            )

        cheap_GTK = decision.expert_GTK >= experts
        return part(~cheap_GTK, 0, experts), part(cheap_GTK, experts, self.count)

    def fit_capacity(
        self, cheap: TokenChoice, capacity: Capacity, inputs: RouterInputs, experts: int
    ) -> TokenChoice:
        """What the cheap ones take. Nothing on its way to a zero is dropped: it gives nothing."""
        if capacity.keeps_all(inputs.train):
            return cheap
        kept = capacity.fit(cheap, inputs, self.share * experts + self.count)
        return dataclasses.replace(
            kept, keep_GTK=kept.keep_GTK | (cheap.keep_GTK & (cheap.expert_GTK < self.zero))
        )

    def choices(self, experts: int) -> Fraction:
        """Among how many experts the assignments are divided, a cheap one counting 1 / share."""
        return experts + self.count / self.share

    def __call__(self, x_GTD: jax.Array, weight_GTN: jax.Array) -> jax.Array:
        """(G, T, D): the weighted sum of what they give."""
        weight_GTN, split = weight_GTN.astype(x_GTD.dtype), self.zero + self.copy
        y_GTD = weight_GTN[..., self.zero : split].sum(-1, keepdims=True) * x_GTD
        if self.mix_DMX is None or self.vector_MD is None:
            return y_GTD
        dtype = x_GTD.dtype
        logits_GTMX = jnp.einsum("gtd,dmx->gtmx", x_GTD, self.mix_DMX[...].astype(dtype))
        mix_GTMX = jax.nn.softmax(logits_GTMX) * weight_GTN[..., split:, None]
        y_GTD = y_GTD + mix_GTMX[..., 0].sum(-1, keepdims=True) * x_GTD
        vector_MD = self.vector_MD[...].astype(dtype)
        return y_GTD + jnp.einsum("gtm,md->gtd", mix_GTMX[..., 1], vector_MD)


@gin.configurable
class DefaultVectors(StepState):
    """Default MoE (Panda et al. 2025): experts that were not chosen answer by their mean output.

    The mean runs over optimizer steps and has no gradient; through it the router's gradient
    reaches the scores of all experts. Needs `TopK.keep_rest`.

    Args:
        num_experts: E.
        d_model: D.
        decay: of the running mean.
    """

    def __init__(self, num_experts: Count, d_model: Count, decay: LessThanOne = 0.9):
        if not 0 <= decay < 1:
            raise ValueError(f"DefaultVectors.decay={decay} must lie in [0, 1)")
        self.decay = decay
        shape, axes = (num_experts, d_model), (None, "embed")
        self.mean_ED = router_state(shape, jnp.float32, axes, zeros)

    def __call__(self, weight_GTE: jax.Array, dtype) -> jax.Array:
        """(G, T, D): the mean outputs of the experts that were not chosen, weighted."""
        return jnp.einsum("gte,ed->gtd", weight_GTE.astype(dtype), self.mean_ED[...].astype(dtype))

    def batch_sums(self, y_EGCD: jax.Array) -> dict[str, jax.Array]:
        """Outputs summed over slots; an empty slot gives zero, since experts have no bias."""
        y_EGCD = jax.lax.stop_gradient(y_EGCD).astype(jnp.float32)
        return {"expert_output": y_EGCD.sum((1, 2))}

    def update(self, stats: RouterStats) -> None:
        count_E1 = stats.kept_E[:, None]
        found_ED = stats.batch_sums["expert_output"] / jnp.maximum(count_E1, 1)
        old_ED = self.mean_ED[...]
        new_ED = self.decay * old_ED + (1 - self.decay) * found_ED
        self.mean_ED[...] = jnp.where(count_E1 > 0, new_ED, old_ED)
