"""Experts in segments, one for each choice of a token (MultiHash, Roller et al. 2021, 3.2).

G groups, T tokens, D model width, F hidden width, E experts, N segments (choices per token).
"""

import dataclasses
from typing import Any

import gin
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.experts.base import Experts, ExpertsOutput, LayerSizes
from layers.experts.feed_forward import ACTIVATIONS, GATED
from layers.experts.feed_forward_experts import matmul
from routing.capacity import Capacity
from routing.inputs import RouterInputs
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count
from routing.records import TokenChoice


@gin.configurable
class SegmentedExperts(Experts):
    """v = act([A^1_k1 x; ...; A^N_kN x]), y = [B^1_k1 v; ...; B^N_kN v], k_n the n-th choice.

    Every expert's matrices are cut into N row segments; a token's hidden vector and its output are
    concatenated from segment n of its n-th expert, for n in 1..N. Nothing is dropped.

    Args:
        sizes: of the layer; D and F must be multiples of N, the activation one without a gate.
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

    def __call__(self, x_GTD: Float[Array, "G T D"], decision, inputs, dispatcher) -> ExpertsOutput:
        assert isinstance(decision, TokenChoice)
        if decision.expert_GTK.shape[-1] != self.segments:
            raise ValueError(
                f"SegmentedExperts.segments={self.segments}, but the router makes "
                f"{decision.expert_GTK.shape[-1]} choices: use MultiHash with as many hashes"
            )
        choices = [only(decision, n, inputs) for n in range(self.segments)]

        def through(x, weight):
            """x (G, T, a) times the chosen segments of weight (E, N, a, b): (G, T, N * b)."""
            segments = []
            for n, choice in enumerate(choices):
                rows: Any = dispatcher.dispatch(x, choice)
                y = matmul("egca,eab->egcb", rows, weight[:, n].astype(x.dtype))
                segments.append(dispatcher.combine(y, choice))
            return jnp.concatenate(segments, axis=-1)

        hidden_GTF = ACTIVATIONS[self.activation](through(x_GTD, self.up_ENDF[...]))
        return ExpertsOutput(through(hidden_GTF, self.down_ENFD[...]))


def only(decision: TokenChoice, n: int, inputs: RouterInputs) -> TokenChoice:
    """The n-th choice of every token alone, with a slot for each."""
    cut = slice(n, n + 1)
    choice = dataclasses.replace(
        decision,
        expert_GTK=decision.expert_GTK[..., cut],
        gate_GTK=decision.gate_GTK[..., cut],
        keep_GTK=decision.keep_GTK[..., cut],
    )
    return Capacity(None, None).fit(choice, inputs)
