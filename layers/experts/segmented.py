"""Experts in segments (MultiHash, Roller et al. 2021, section 3.2): each choice serves one.

G groups, T tokens, D model width, F hidden width, E experts, N segments (choices per token).
"""

import dataclasses

import gin
import jax.numpy as jnp

from layers.experts.base import Experts, ExpertsOutput, LayerSizes
from layers.experts.feed_forward import ACTIVATIONS, GATED
from routing.capacity import Capacity
from routing.inputs import RouterInputs
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count
from routing.records import TokenChoice


@gin.configurable
class SegmentedExperts(Experts):
    """v = act([A^1_k1 x; ...; A^N_kN x]), y = [B^1_k1 v; ...; B^N_kN v], k_n the n-th choice.

    Every expert's matrices are cut into N row segments; a token's hidden vector and its output are
    put together from the segments of the experts that its N choices name. Nothing is dropped.

    Args:
        sizes: of the layer: D and F are multiples of N, the activation is one without a gate.
        segments: N.
    """

    takes_repeats = True
    has_capacity = False
    ignores_gates = True

    def __init__(self, sizes: LayerSizes, segments: Count = 2):
        d_model, d_ff, activation = sizes.d_model, sizes.d_ff, sizes.activation
        if activation in GATED or activation not in ACTIVATIONS:
            kinds = ", ".join(name for name in ACTIVATIONS if name not in GATED)
            raise ValueError(
                f"SegmentedExperts: MoELayer.activation={activation!r}: one of {kinds}"
            )
        if segments < 1:
            raise ValueError(f"SegmentedExperts.segments={segments} must be at least 1")
        if d_model % segments or d_ff % segments:
            raise ValueError(
                f"SegmentedExperts.segments={segments} must divide the width {d_model} and the "
                f"hidden width {d_ff}"
            )
        self.activation, self.segments = activation, segments
        self.hidden_width = d_ff
        shape = (sizes.num_experts, segments, d_model, d_ff // segments)
        axes = ("expert", "segment", "embed", "mlp")
        # Fan-in is D (then F) alone, without the axis of segments.
        init = truncated_normal(float(segments), 2)
        self.up_ENDF = parameter(shape, axes, init, role="expert")
        shape = (sizes.num_experts, segments, d_ff, d_model // segments)
        axes = ("expert", "segment", "mlp", "embed")
        self.down_ENFD = parameter(
            shape, axes, truncated_normal(sizes.out_scale * segments, 2), role="expert"
        )

    def needs_slots(self, train: bool) -> bool:
        return True

    def __call__(self, x_GTD, decision, inputs, dispatcher) -> ExpertsOutput:
        assert isinstance(decision, TokenChoice)
        if decision.expert_GTK.shape[-1] != self.segments:
            raise ValueError(
                f"SegmentedExperts.segments={self.segments}, but the router makes "
                f"{decision.expert_GTK.shape[-1]} choices: use MultiHash with as many hashes"
            )
        choices = [only(decision, n, inputs) for n in range(self.segments)]

        def through(x_GTX, weight_ENXY):
            parts = []
            for n, choice in enumerate(choices):
                came_EGCX = dispatcher.dispatch(x_GTX, choice)
                weight_EXY = weight_ENXY[:, n].astype(x_GTX.dtype)
                made_EGCY = jnp.einsum("egcx,exy->egcy", came_EGCX, weight_EXY)
                parts.append(dispatcher.combine(made_EGCY, choice))
            return jnp.concatenate(parts, axis=-1)

        hidden_GTF = ACTIVATIONS[self.activation](through(x_GTD, self.up_ENDF[...]))
        return ExpertsOutput(through(hidden_GTF, self.down_ENFD[...]))


def only(decision: TokenChoice, n: int, inputs: RouterInputs) -> TokenChoice:
    """The n-th choice alone, with a slot for everyone."""
    cut = slice(n, n + 1)
    choice = dataclasses.replace(
        decision,
        expert_GTK=decision.expert_GTK[..., cut],
        gate_GTK=decision.gate_GTK[..., cut],
        keep_GTK=decision.keep_GTK[..., cut],
    )
    return Capacity(None, None).fit(choice, inputs)
