"""Soft MoE: every slot reads a weighted mean of all tokens (Puigcerver et al. 2023).

G groups, T tokens per group, D model width, E experts, S slots per expert, N segments of a group.
"""

from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp

from routing.losses import RouterLoss
from routing.parameters import ones, parameter, truncated_normal
from routing.records import Causality, RouterInputs, Routing, Sizes, SoftSlots
from routing.router import Router


@gin.configurable
class SoftMoE(Router):
    """Dispatch: softmax over tokens; combine: softmax over all slots (eq. 1-3, algorithm 2).

    Args:
        sizes: width, number of experts, vocabulary.
        slots_per_expert: S; dense FLOPs at E * S = T.
        normalise: unit-norm tokens and slot vectors with a learned scale (section 2.3).
        segment: None (the paper), or a length: every segment of so many tokens has slots of its
            own, filled from the segments before it, so that the layer is causal. The first
            segment's slots are empty. Dense FLOPs at E * S = segment.
        losses: none are needed.
    """

    causality = Causality.NEVER
    balanced = True
    decoding = "not possible: every slot mixes the whole sequence; with `segment` it is"

    def __init__(
        self,
        sizes: Sizes,
        slots_per_expert: int = 1,
        normalise: bool = True,
        segment: int | None = None,
        losses: Sequence[RouterLoss] = (),
    ):
        if segment is not None and segment < 1:
            raise ValueError(f"SoftMoE.segment={segment} must be at least 1, or None")
        if segment is not None:
            self.causality, self.order_matters = Causality.CAUSAL, True
            self.decoding = "slots change only where a segment begins"
        self.segment = segment
        if slots_per_expert < 1:
            raise ValueError(f"SoftMoE.slots_per_expert={slots_per_expert} must be at least 1")
        self.num_experts, self.losses = sizes.num_experts, tuple(losses)
        self.normalise = normalise
        shape = (sizes.d_model, sizes.num_experts, slots_per_expert)
        self.phi_DES = parameter(shape, ("embed", None, None), truncated_normal())
        self.scale = parameter((), (), ones) if normalise else None

    def route(self, inputs: RouterInputs) -> Routing:
        x_GTD, phi_DES = inputs.x_GTD, self.phi_DES[...]
        if self.scale is not None:
            x_GTD = unit(x_GTD, axis=-1)
            phi_DES = self.scale[...] * unit(phi_DES, axis=0)
        logits_GTES = jnp.einsum("gtd,des->gtes", x_GTD, phi_DES)
        if self.segment is not None:
            decision = in_segments(logits_GTES, inputs.valid_GT, self.segment)
            share_GTE = jax.nn.softmax(logits_GTES, axis=(2, 3)).sum(-1)
            return Routing(decision, logits_GTES.mean(-1), share_GTE)
        valid_GT11 = inputs.valid_GT[..., None, None]
        masked_GTES = jnp.where(valid_GT11, logits_GTES, -1e30)
        dispatch_GTES = jnp.where(valid_GT11, jax.nn.softmax(masked_GTES, axis=1), 0)
        combine_GTES = jnp.where(valid_GT11, jax.nn.softmax(logits_GTES, axis=(2, 3)), 0)
        decision = SoftSlots(dispatch_GTES, combine_GTES)
        return Routing(decision, logits_GTES.mean(-1), combine_GTES.sum(-1))


def in_segments(logits_GTES, valid_GT, segment: int) -> SoftSlots:
    """Slots (N * S) of each expert: those of segment n read the segments before, serve n alone."""
    groups, tokens, experts, slots = logits_GTES.shape
    segments = -(-tokens // segment)
    own_TN = (jnp.arange(tokens) // segment)[:, None] == jnp.arange(segments)[None]
    before_TN = (jnp.arange(tokens) // segment)[:, None] < jnp.arange(segments)[None]
    # A segment of nothing but padding, and the first one, has empty slots.
    served_GN = jnp.any(own_TN[None] & valid_GT[..., None], axis=1)
    reads_GTN = before_TN[None] & valid_GT[..., None] & served_GN[:, None]
    logits_GTENS = logits_GTES[:, :, :, None]
    reads_GT1N1 = reads_GTN[:, :, None, :, None]
    dispatch_GTENS = jax.nn.softmax(jnp.where(reads_GT1N1, logits_GTENS, -1e30), axis=1)
    dispatch_GTENS = jnp.where(reads_GT1N1, dispatch_GTENS, 0)
    combine_GTES = jax.nn.softmax(logits_GTES, axis=(2, 3))
    reader_GTN = own_TN[None] & valid_GT[..., None]
    combine_GTENS = jnp.where(reader_GTN[:, :, None, :, None], combine_GTES[:, :, :, None], 0)
    shape = (groups, tokens, experts, segments * slots)
    return SoftSlots(dispatch_GTENS.reshape(shape), combine_GTENS.reshape(shape))


def unit(x, axis: int):
    """x / (norm + 1e-6), as the paper divides; the gradient at zero is zero."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (norm + 1e-6)
