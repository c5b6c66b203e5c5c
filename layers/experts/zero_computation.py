"""Zero-computation experts: nothing, a copy, or a constant (MoE++, Jin et al. 2024).

G groups, T tokens, D model width, E experts, N zero-computation experts, M of them constant.
"""

import dataclasses
from fractions import Fraction

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.experts.base import ChosenCompanion, LayerSizes, Routed
from routing.capacity import Capacity
from routing.inputs import RouterInputs
from routing.parameters import parameter, truncated_normal, zeros
from routing.ranges import Natural, SomeShare
from routing.records import TokenChoice, gates_GTE


@gin.configurable
class ZeroCopyConstant(ChosenCompanion):
    """Zero experts return 0, copy experts x, constant ones a mixture of x and a vector.

    The router chooses among the experts and these, which are numbered after them. A constant expert
    returns a_1 x + a_2 v with (a_1, a_2) = softmax(W x) (eq. 4-5). Capacity is divided so that a
    zero-computation expert may take 1 / `share` times as many tokens as an expert (eq. 8);
    `BalanceLoss.zero_computation` weights the balance loss in the same way (eq. 7), and
    `TopK.residual` is the router's residual (eq. 6).

    Args:
        sizes: of the layer.
        zero, copy, constant: how many of each.
        share: tau in the paper; 1 gives all the same capacity.
        renormalise: where a token chose a zero expert, its other gates are scaled to sum to 1, as
            in the authors' code and not in the paper.
    """

    name = "zero_computation"

    def __init__(
        self,
        sizes: LayerSizes,
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
        self.choices = zero + copy + constant
        shape, axes = (sizes.d_model, constant, 2), ("embed", None, None)
        self.mix_DMX = (
            parameter(shape, axes, truncated_normal(), role="companion") if constant else None
        )
        shape, axes = (constant, sizes.d_model), (None, "embed")
        self.vector_MD = parameter(shape, axes, zeros, role="companion") if constant else None

    def split(self, decision, num_experts):
        number_GTK = decision.expert_GTK - num_experts
        is_zero_GTK = (0 <= number_GTK) & (number_GTK < self.zero)
        if self.renormalise:
            gate_GTK = jnp.where(is_zero_GTK | ~decision.keep_GTK, 0, decision.gate_GTK)
            sum_GT1 = gate_GTK.sum(-1, keepdims=True)
            gate_GTK = gate_GTK / jnp.where(sum_GT1 > 0, sum_GT1, 1)
            has_zero_GT1 = (is_zero_GTK & decision.keep_GTK).any(-1, keepdims=True)
            gate_GTK = jnp.where(has_zero_GT1, gate_GTK, decision.gate_GTK)
            decision = dataclasses.replace(decision, gate_GTK=gate_GTK)

        def only(is_its_GTK, first, count):
            return dataclasses.replace(
                decision,
                expert_GTK=jnp.where(is_its_GTK, decision.expert_GTK - first, 0),
                keep_GTK=decision.keep_GTK & is_its_GTK,
                num_experts=count,
            )

        own_GTK = decision.expert_GTK >= num_experts
        return only(~own_GTK, 0, num_experts), only(own_GTK, num_experts, self.choices)

    def fit_capacity(
        self, own: TokenChoice, capacity: Capacity, inputs: RouterInputs, num_experts: int
    ) -> TokenChoice:
        """The assignments within capacity, and all to zero experts, which cost nothing."""
        if capacity.keeps_all(inputs.train):
            return own
        kept = capacity.fit(own, inputs, self.share * num_experts + self.choices)
        return dataclasses.replace(
            kept, keep_GTK=kept.keep_GTK | (own.keep_GTK & (own.expert_GTK < self.zero))
        )

    def among(self, num_experts: int) -> Fraction:
        """The experts, and 1 / share for each zero-computation expert."""
        return num_experts + self.choices / self.share

    def __call__(self, routed: Routed) -> jax.Array:
        """(G, T, D): the gate-weighted sum of their outputs."""
        assert routed.own is not None
        return self.weighted_sum(routed.x_GTD, gates_GTE(routed.own))

    def weighted_sum(
        self, x_GTD: Float[Array, "G T D"], weight_GTN: Float[Array, "G T N"]
    ) -> jax.Array:
        """(G, T, D): the sum of their outputs with these weights."""
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
