"""Controls: routing that learns nothing, to measure what learned routing is worth.

G groups, T tokens per group, E experts, K experts per token.
"""

import gin
import jax
import jax.numpy as jnp

from routing.records import Causality, RouterInputs, Routing, Sizes, TokenChoice
from routing.router import Router, check_k, largest


@gin.configurable
class UniformRandom(Router):
    """K distinct experts drawn uniformly for every token and step; gate 1/K.

    At evaluation the draw is a fixed function of the token's place in its group.
    """

    causality = Causality.CAUSAL
    order_matters = True
    decoding = "a fixed draw for each position"

    def __init__(self, sizes: Sizes, k: int = 2):
        check_k("UniformRandom", k, sizes)
        self.num_experts, self.k, self.losses = sizes.num_experts, k, ()

    def route(self, inputs: RouterInputs) -> Routing:
        groups, tokens = inputs.valid_GT.shape
        keys_G = inputs.keys_G(purpose=0) if inputs.train else jax.random.key(0)[None]
        draw = jax.vmap(lambda key: jax.random.uniform(key, (tokens, self.num_experts)))
        draw_GTE = jnp.broadcast_to(draw(keys_G), (groups, tokens, self.num_experts))
        expert_GTK = largest(draw_GTE, self.k)
        return Routing(_equal_gates(expert_GTK, self.num_experts))


@gin.configurable
class Balanced(Router):
    """Round robin: assignment number n of a group goes to expert n mod E; gate 1/K.

    The load is equal to within one token, at no cost: what a router's own time is compared with.
    """

    causality = Causality.CAUSAL
    order_matters = True
    balanced = True
    decoding = "by the token's place in its group"

    def __init__(self, sizes: Sizes, k: int = 2):
        check_k("Balanced", k, sizes)
        self.num_experts, self.k, self.losses = sizes.num_experts, k, ()

    def route(self, inputs: RouterInputs) -> Routing:
        place_GT = jnp.cumsum(inputs.valid_GT, axis=1, dtype=jnp.int32) - 1
        number_GTK = place_GT[..., None] * self.k + jnp.arange(self.k)[None, None]
        return Routing(_equal_gates(number_GTK % self.num_experts, self.num_experts))


def _equal_gates(expert_GTK, num_experts: int) -> TokenChoice:
    gate_GTK = jnp.full(expert_GTK.shape, 1 / expert_GTK.shape[-1], jnp.float32)
    return TokenChoice(expert_GTK, gate_GTK, jnp.ones_like(expert_GTK, bool), num_experts)
