"""Soft choice: from Soft MoE's dense slots to hard choices, by two temperatures.

A router of this project. It interpolates between Soft MoE (Puigcerver et al. 2023), expert choice
(Zhou et al. 2022) and token choice, and is differentiable in between.

G groups, T tokens per group, D model width, E experts, S slots per expert.
"""

from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp

from routing.algorithms.soft_moe import (
    next_in_segment,
    slot_logits,
    slots_after,
    soft_routing,
)
from routing.balancers import StepState
from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import ones, parameter, router_state, truncated_normal
from routing.ranges import Count, Natural, Positive
from routing.records import Causality, DecodingState, RouterStats, Routing, Sizes
from routing.router import Router


@gin.configurable
class SoftChoice(Router):
    """Slots read tokens by softmax(z / read), tokens read slots by softmax(z / write).

    z are Soft MoE's logits of unit vectors. At read = write = 1 this is Soft MoE. As `read` goes to
    0, every slot reads only its best token: expert choice. As `write` goes to 0, every token reads
    only its best slot: token choice. In between every token has a gradient to every slot. Both
    temperatures start at 1 and change geometrically over the first optimizer steps; they are router
    state, so that they are saved with the model.

    Args:
        sizes: width, number of experts, vocabulary.
        slots_per_expert: S; E * S = T (E * S = segment) has the FLOPs of a dense layer.
        read: the final temperature with which slots read tokens.
        write: the final temperature with which tokens read slots.
        cooling_steps: optimizer steps from 1 to the final temperatures.
        segment: tokens of a segment, for a causal layer as in `SoftMoE`; None for one segment.
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
        read: Positive = 0.1,
        write: Positive = 0.1,
        cooling_steps: Natural = 300,
        segment: Count | None = None,
        losses: Sequence[RouterLoss] = (),
    ):
        for name, value in (("slots_per_expert", slots_per_expert), ("segment", segment or 1)):
            if value < 1:
                raise ValueError(f"SoftChoice.{name}={value} must be at least 1")
        for name, value in (("read", read), ("write", write)):
            if not value > 0:
                raise ValueError(f"SoftChoice.{name}={value} must be above 0")
        if segment is not None:
            self.causality, self.order_matters = Causality.CAUSAL, True
            self.steps, self.decoding = True, "slots change only where a segment begins"
        self.num_experts, self.losses, self.segment = sizes.num_experts, tuple(losses), segment
        shape = (sizes.d_model, sizes.num_experts, slots_per_expert)
        self.phi_DES = parameter(shape, ("embed", None, None), truncated_normal(), role="router")
        self.scale = parameter((), (), ones, role="router")
        self.cooling = Cooling((read, write), cooling_steps)

    def route(self, inputs: RouterInputs) -> Routing:
        return soft_routing(*self._logits(inputs), inputs.valid_GT, self.segment)

    def start(self, inputs, length_G, slots) -> DecodingState:
        assert self.segment is not None
        return slots_after(self._logits(inputs)[0], inputs, length_G, self.segment)

    def route_next(self, inputs, state):
        assert self.segment is not None
        return next_in_segment(*self._logits(inputs), inputs, state, self.segment)

    def _logits(self, inputs: RouterInputs) -> tuple[jax.Array, jax.Array]:
        """The logits (G, T, E, S) with which slots read tokens, and tokens slots."""
        logits_GTES = slot_logits(inputs.x_GTD, self.phi_DES[...], self.scale[...])
        read, write = self.cooling.heat_2[...]
        return logits_GTES / read, logits_GTES / write


class Cooling(StepState):
    """Two temperatures, which go from 1 to `ends` geometrically over so many optimizer steps."""

    def __init__(self, ends: tuple[float, float], steps: int):
        if steps < 1:
            raise ValueError(f"SoftChoice.cooling_steps={steps} must be at least 1")
        self.ends = ends
        self.factors = tuple(end ** (1 / steps) for end in ends)
        self.heat_2 = router_state((2,), jnp.float32, (None,), ones)

    def update(self, stats: RouterStats) -> None:
        cooled_2 = self.heat_2[...] * jnp.asarray(self.factors)
        ends_2 = jnp.asarray(self.ends)
        # A temperature stops at its end, whether it rises or falls.
        low_2, high_2 = jnp.minimum(ends_2, 1), jnp.maximum(ends_2, 1)
        self.heat_2[...] = jnp.clip(cooled_2, low_2, high_2)
