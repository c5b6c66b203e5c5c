"""Experts in a narrower width than the model's (LatentMoE, 2026). D model width, Z latent width."""

from collections.abc import Callable
import dataclasses

import gin
import jax
from jaxtyping import Array, Float

from layers.experts.base import Experts, ExpertsOutput, LayerSizes
from layers.experts.feed_forward_experts import FeedForwardExperts
from layers.linear import linear
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count


@gin.configurable
class LatentExperts(Experts):
    """y = W_up sum_e g_e E_e(z) with z = W_down x; router and companions read x (LatentMoE).

    Rows of the latent width travel between devices.

    Args:
        sizes: of the layer; d_ff is the experts' hidden width.
        width: Z; D / 4, rounded up, where None.
        experts: the kind of experts, of width Z.
    """

    def __init__(
        self,
        sizes: LayerSizes,
        width: Count | None = None,
        experts: Callable[[LayerSizes], Experts] = FeedForwardExperts,
    ):
        width = -(-sizes.d_model // 4) if width is None else width
        if not 1 <= width <= sizes.d_model:
            raise ValueError(
                f"LatentExperts.width={width} must lie between 1 and the model's {sizes.d_model}"
            )
        self.inner = experts(dataclasses.replace(sizes, d_model=width, out_scale=1.0))
        self.accepts, self.takes_repeats = self.inner.accepts, self.inner.takes_repeats
        self.has_capacity, self.ignores_gates = self.inner.has_capacity, self.inner.ignores_gates
        self.are_neurons, self.segments = self.inner.are_neurons, self.inner.segments
        self.row_width, self.hidden_width = width, self.inner.hidden_width
        self.activation = self.inner.activation
        shape, axes = (sizes.d_model, width), ("embed", None)
        self.down_DZ = parameter(shape, axes, truncated_normal(), role="latent")
        out = truncated_normal(sizes.out_scale)
        self.up_ZD = parameter(shape[::-1], axes[::-1], out, role="latent")

    def needs_slots(self, train: bool) -> bool:
        return self.inner.needs_slots(train)

    def __call__(self, x_GTD: Float[Array, "G T D"], decision, inputs, dispatcher) -> ExpertsOutput:
        with jax.named_scope("latent"):
            z_GTZ = linear(x_GTD, self.down_DZ[...])
        y_GTZ, _ = self.inner(z_GTZ, decision, inputs, dispatcher)
        with jax.named_scope("latent"):
            return ExpertsOutput(linear(y_GTZ, self.up_ZD[...]))
