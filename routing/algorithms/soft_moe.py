"""Soft MoE: every slot reads a weighted mean of all tokens (Puigcerver et al. 2023).

G groups, T tokens per group, D model width, E experts, S slots per expert, N segments of a group.
"""

from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import ones, parameter, truncated_normal
from routing.ranges import Count
from routing.records import Causality, Routing, Sizes, SoftSlots
from routing.router import Router


@gin.configurable
class SoftMoE(Router):
    """Dispatch: softmax over tokens; combine: softmax over all slots (eq. 1-3, algorithm 2).

    Args:
        sizes: width, number of experts, vocabulary.
        slots_per_expert: S; E * S = T has the FLOPs of a dense layer.
        normalise: unit-norm tokens and slot vectors with a learned scale (section 2.3).
        segment: None (the paper), or tokens of a segment: every segment has slots of its own that
            read the segments before it, so that the layer is causal. The slots of the first
            segment are empty. E * S = segment has the FLOPs of a dense layer.
        losses: none are needed.
    """

    causality = Causality.NEVER
    whole_sequences = True
    balanced = True
    decoding = "not possible: every slot mixes the whole sequence; with `segment` it is"

    def __init__(
        self,
        sizes: Sizes,
        slots_per_expert: Count = 1,
        normalise: bool = True,
        segment: Count | None = None,
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
        self.phi_DES = parameter(shape, ("embed", None, None), truncated_normal(), role="router")
        self.scale = parameter((), (), ones, role="router") if normalise else None

    def route(self, inputs: RouterInputs) -> Routing:
        scale = None if self.scale is None else self.scale[...]
        logits_GTES = slot_logits(inputs.x_GTD, self.phi_DES[...], scale)
        return soft_routing(logits_GTES, logits_GTES, inputs.valid_GT, self.segment)


def slot_logits(x_GTD: Float[Array, "G T D"], phi_DES: Float[Array, "D E S"], scale) -> jax.Array:
    """The logits (G, T, E, S) of every token and slot; of unit vectors where there is a scale."""
    if scale is not None:
        x_GTD, phi_DES = unit(x_GTD, axis=-1), scale * unit(phi_DES, axis=0)
    return jnp.einsum("gtd,des->gtes", x_GTD, phi_DES)


def soft_routing(
    read_GTES: Float[Array, "G T E S"],
    write_GTES: Float[Array, "G T E S"],
    valid_GT: Bool[Array, "G T"],
    segment: int | None,
) -> Routing:
    """Slots read tokens by softmax(read_GTES), tokens read slots by softmax(write_GTES)."""
    share_GTES = jax.nn.softmax(write_GTES, axis=(2, 3))
    if segment is None:
        valid_GT11 = valid_GT[..., None, None]
        masked_GTES = jnp.where(valid_GT11, read_GTES, -1e30)
        dispatch_GTES = jnp.where(valid_GT11, jax.nn.softmax(masked_GTES, axis=1), 0)
        decision = SoftSlots(dispatch_GTES, jnp.where(valid_GT11, share_GTES, 0))
    else:
        decision = in_segments(read_GTES, share_GTES, valid_GT, segment)
    return Routing(decision, write_GTES.mean(-1), share_GTES.sum(-1))


def in_segments(
    read_GTES: Float[Array, "G T E S"],
    share_GTES: Float[Array, "G T E S"],
    valid_GT: Bool[Array, "G T"],
    segment: int,
) -> SoftSlots:
    """N * S slots per expert: those of segment n read earlier segments and are read by n alone."""
    groups, tokens, experts, slots = read_GTES.shape
    segments = -(-tokens // segment)
    segment_T1 = (jnp.arange(tokens) // segment)[:, None]
    in_TN = segment_T1 == jnp.arange(segments)[None]
    before_TN = segment_T1 < jnp.arange(segments)[None]
    # The slots of the first segment, and of segments that are all padding, are empty.
    served_GN = jnp.any(in_TN[None] & valid_GT[..., None], axis=1)
    reads_GTN = before_TN[None] & valid_GT[..., None] & served_GN[:, None]
    reads_GT1N1 = reads_GTN[:, :, None, :, None]
    read_GTENS = jnp.where(reads_GT1N1, read_GTES[:, :, :, None], -1e30)
    dispatch_GTENS = jnp.where(reads_GT1N1, jax.nn.softmax(read_GTENS, axis=1), 0)
    reader_GTN = in_TN[None] & valid_GT[..., None]
    combine_GTENS = jnp.where(reader_GTN[:, :, None, :, None], share_GTES[:, :, :, None], 0)
    shape = (groups, tokens, experts, segments * slots)
    return SoftSlots(dispatch_GTENS.reshape(shape), combine_GTENS.reshape(shape))


def unit(x, axis: int):
    """x / (norm + 1e-6), as in the paper; the gradient at zero is zero."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (norm + 1e-6)
