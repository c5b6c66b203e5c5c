"""Merged experts: a segment's expert has the router's weighted mean of all experts' parameters.

G groups, S segments of a group, T tokens of a group or of a segment, D model width, E experts.
"""

from collections.abc import Sequence
from typing import Literal

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count
from routing.records import Causality, DecodingState, ExpertMerge, Routing, Sizes
from routing.router import Router


@gin.configurable
class SMEAR(Router):
    """One merged expert per group, from the mean of its tokens (Muqeeth et al. 2023, section 3).

    Fully differentiable, at the cost of one expert and of the merge. Not causal: the mean is over
    all tokens.

    Args:
        sizes: width, number of experts, vocabulary.
        losses: none are needed.
    """

    causality = Causality.NEVER
    whole_sequences = True
    needs_all_experts = "it merges all experts and chooses none"
    decoding = "not possible: the mixture depends on the whole sequence; Lory's does not"

    def __init__(self, sizes: Sizes, losses: Sequence[RouterLoss] = ()):
        self.num_experts, self.losses = sizes.num_experts, tuple(losses)
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal(), role="router")

    def route(self, inputs: RouterInputs) -> Routing:
        tokens = inputs.valid_GT.shape[1]
        mean_GSD = segment_means(inputs, tokens)
        logits_GSE = jnp.einsum("gsd,de->gse", mean_GSD, self.weight_DE[...])
        return merged(logits_GSE, inputs, tokens)


@gin.configurable
class Lory(Router):
    """One merged expert per segment, from the mean of the previous segment (Zhong et al. 2024).

    Args:
        sizes: width, number of experts, vocabulary.
        segment: tokens of a segment (the paper: 256).
        first: the weights in the first segment: "uniform", or from "itself", its mean without a
            gradient (the paper, section 3.1), which is not causal.
        losses: none are needed.
    """

    causality = Causality.CAUSAL
    whole_sequences = True
    order_matters = True
    steps = True
    needs_all_experts = "it merges all experts and chooses none"
    decoding = "the mixture changes only where a segment begins"

    def __init__(
        self,
        sizes: Sizes,
        segment: Count = 256,
        first: Literal["uniform", "itself"] = "uniform",
        losses: Sequence[RouterLoss] = (),
    ):
        if segment < 1:
            raise ValueError(f"Lory.segment={segment} must be at least 1")
        if first not in ("uniform", "itself"):
            raise ValueError(f"Lory.first={first!r}: uniform or itself")
        if first == "itself":
            self.causality = Causality.NEVER
            self.decoding = 'not possible with first="itself"; "uniform" is causal'
        self.num_experts, self.losses = sizes.num_experts, tuple(losses)
        self.segment, self.first = segment, first
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal(), role="router")

    def route(self, inputs: RouterInputs) -> Routing:
        mean_GSD = segment_means(inputs, self.segment)
        first_G1D = jax.lax.stop_gradient(mean_GSD[:, :1])
        if self.first == "uniform":
            first_G1D = jnp.zeros_like(first_G1D)  # logits 0
        mean_GSD = jnp.concatenate([first_G1D, mean_GSD[:, :-1]], axis=1)
        logits_GSE = jnp.einsum("gsd,de->gse", mean_GSD, self.weight_DE[...])
        return merged(logits_GSE, inputs, self.segment)

    def start(self, inputs, length_G, slots) -> DecodingState:
        """The sum of the last token's segment, and the mean of the segment before it."""
        groups, tokens = inputs.valid_GT.shape
        now_G1 = (jnp.maximum(length_G - 1, 0) // self.segment)[:, None]
        own_GT = jnp.arange(tokens)[None] // self.segment == now_G1
        own_GT1 = (own_GT & inputs.valid_GT)[..., None]
        before_G11 = jnp.maximum(now_G1 - 1, 0)[..., None]
        mean_G1D = jnp.take_along_axis(segment_means(inputs, self.segment), before_G11, axis=1)
        return {
            "place_G": length_G,
            "sum_GD": jnp.where(own_GT1, inputs.x_GTD, 0).sum(1),
            "count_G": own_GT1.sum((1, 2), dtype=jnp.int32),
            "mean_GD": jnp.where(now_G1 > 0, mean_G1D[:, 0], 0),
        }

    def route_next(self, inputs, state):
        place_G, sum_GD, count_G = state["place_G"], state["sum_GD"], state["count_G"]
        begins_G = place_G % self.segment == 0
        begins_G1 = begins_G[:, None]
        mean_GD = sum_GD / jnp.maximum(count_G, 1)[:, None]
        mean_GD = jnp.where(begins_G1, mean_GD, state["mean_GD"])
        logits_G1E = jnp.einsum("gd,de->ge", mean_GD, self.weight_DE[...])[:, None]
        state = {
            "place_G": place_G + 1,
            "sum_GD": jnp.where(begins_G1, 0, sum_GD) + inputs.x_GTD[:, 0],
            "count_G": jnp.where(begins_G, 0, count_G) + inputs.valid_GT[:, 0],
            "mean_GD": mean_GD,
        }
        return merged(logits_G1E, inputs, 1), state


def segment_means(inputs: RouterInputs, segment: int) -> jax.Array:
    """The mean of the valid tokens of every segment (G, S, D); zero without any."""
    groups, tokens, width = inputs.x_GTD.shape
    valid_GST = in_segments(inputs.valid_GT, segment)
    segments = valid_GST.shape[1]
    more = ((0, 0), (0, segments * segment - tokens))
    x_GTD = jnp.where(inputs.valid_GT[..., None], inputs.x_GTD, 0)
    x_GSTD = jnp.pad(x_GTD, (*more, (0, 0))).reshape(groups, segments, segment, width)
    return x_GSTD.sum(2) / jnp.maximum(valid_GST.sum(2), 1)[..., None]


def in_segments(valid_GT: Bool[Array, "G T"], segment: int) -> jax.Array:
    """The mask by segments (G, S, T), where the last one is filled up with False."""
    groups, tokens = valid_GT.shape
    segments = -(-tokens // segment)
    more = ((0, 0), (0, segments * segment - tokens))
    return jnp.pad(valid_GT, more).reshape(groups, segments, segment)


def merged(logits_GSE: Float[Array, "G S E"], inputs: RouterInputs, segment: int) -> Routing:
    """The routing by a softmax of each segment's logits; weights of all-padding segments are 0."""
    tokens = inputs.valid_GT.shape[1]
    tokens_GS = in_segments(inputs.valid_GT, segment).sum(-1, dtype=jnp.int32)
    weight_GSE = jnp.where(tokens_GS[..., None] > 0, jax.nn.softmax(logits_GSE), 0)
    decision = ExpertMerge(weight_GSE, tokens_GS, segment, tokens)
    logits_GTE = jnp.repeat(logits_GSE, segment, axis=1)[:, :tokens]
    return Routing(decision, logits_GTE, decision.weight_GTE)
