"""Soft MoE: every slot reads a weighted mean of all tokens (Puigcerver et al. 2023).

G groups, T tokens per group, D model width, E experts, S slots per expert, N segments of a group.
"""

from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import ones, parameter, truncated_normal
from routing.ranges import Count
from routing.records import Causality, DecodingState, Routing, Sizes, SoftSlots
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
    needs_all_experts = "all experts' slots share in every token"
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
            self.steps, self.decoding = True, "slots change only where a segment begins"
        self.segment = segment
        if slots_per_expert < 1:
            raise ValueError(f"SoftMoE.slots_per_expert={slots_per_expert} must be at least 1")
        self.num_experts, self.losses = sizes.num_experts, tuple(losses)
        self.normalise = normalise
        shape = (sizes.d_model, sizes.num_experts, slots_per_expert)
        self.phi_DES = parameter(shape, ("embed", None, None), truncated_normal(), role="router")
        self.scale = parameter((), (), ones, role="router") if normalise else None

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTES = self._logits(inputs)
        return soft_routing(logits_GTES, logits_GTES, inputs.valid_GT, self.segment)

    def start(self, inputs, length_G, slots) -> DecodingState:
        assert self.segment is not None
        return slots_after(self._logits(inputs), inputs, length_G, self.segment)

    def route_next(self, inputs, state):
        assert self.segment is not None
        logits_G1ES = self._logits(inputs)
        return next_in_segment(logits_G1ES, logits_G1ES, inputs, state, self.segment)

    def _logits(self, inputs: RouterInputs) -> jax.Array:
        scale = None if self.scale is None else self.scale[...]
        return slot_logits(inputs.x_GTD, self.phi_DES[...], scale)


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


def slots_after(
    read_GTES: Float[Array, "G T E S"],
    inputs: RouterInputs,
    length_G: Int[Array, " G"],
    segment: int,
) -> DecodingState:
    """What slots have read of a text: as sums that go on, and for the next token's segment."""
    begins_G1 = (length_G // segment * segment)[:, None]
    earlier_GT = inputs.valid_GT & (jnp.arange(read_GTES.shape[1])[None] < begins_G1)
    largest_GES, weight_GES, sum_GESD = weighted_sums(read_GTES, inputs.x_GTD, inputs.valid_GT)
    _, *earlier = weighted_sums(read_GTES, inputs.x_GTD, earlier_GT)
    return {
        "place_G": length_G,
        "largest_GES": largest_GES,
        "weight_GES": weight_GES,
        "sum_GESD": sum_GESD,
        "slot_GESD": mean_of(*earlier),
    }


def weighted_sums(read_GTES, x_GTD, valid_GT):
    """For each slot its largest logit m, and the sums of exp(logit - m) and exp(logit - m) x."""
    valid_GT11 = valid_GT[..., None, None]
    largest_GES = jnp.where(valid_GT11, read_GTES, -1e30).max(1)
    weight_GTES = jnp.where(valid_GT11, jnp.exp(read_GTES - largest_GES[:, None]), 0)
    return largest_GES, weight_GTES.sum(1), jnp.einsum("gtes,gtd->gesd", weight_GTES, x_GTD)


def mean_of(weight_GES, sum_GESD) -> jax.Array:
    """The weighted mean (G, E, S, D); zero where nothing was read."""
    return sum_GESD / jnp.where(weight_GES > 0, weight_GES, 1)[..., None]


def next_in_segment(
    read_G1ES: Float[Array, "G 1 E S"],
    write_G1ES: Float[Array, "G 1 E S"],
    inputs: RouterInputs,
    state: DecodingState,
    segment: int,
) -> tuple[Routing, DecodingState]:
    """The routing of one more token, whose slots change where a segment begins."""
    sums = state["weight_GES"], state["sum_GESD"]
    begins_G111 = (state["place_G"] % segment == 0)[:, None, None, None]
    slot_GESD = jnp.where(begins_G111, mean_of(*sums), state["slot_GESD"])
    new = weighted_sums(read_G1ES, inputs.x_GTD, inputs.valid_GT)
    largest_GES = jnp.maximum(state["largest_GES"], new[0])
    old, more = jnp.exp(state["largest_GES"] - largest_GES), jnp.exp(new[0] - largest_GES)
    share_G1ES = jax.nn.softmax(write_G1ES, axis=(2, 3))
    decision = SoftSlots(jnp.zeros_like(share_G1ES), share_G1ES, slot_GESD)
    after = {
        "place_G": state["place_G"] + 1,
        "largest_GES": largest_GES,
        "weight_GES": old * sums[0] + more * new[1],
        "sum_GESD": old[..., None] * sums[1] + more[..., None] * new[2],
        "slot_GESD": slot_GESD,
    }
    return Routing(decision, write_G1ES.mean(-1), share_G1ES.sum(-1)), after


def unit(x, axis: int):
    """x / (norm + 1e-6), as in the paper; the gradient at zero is zero."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (norm + 1e-6)
