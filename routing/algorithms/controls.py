"""Controls: routers that learn nothing, to compare learned routing with.

G groups, T tokens per group, E experts, K experts per token.
"""

from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp

from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import parameter, router_state, truncated_normal
from routing.ranges import Count, NonNegative
from routing.records import Causality, DecodingState, Routing, Sizes, TokenChoice
from routing.router import Router, check_k
from routing.selection import top_k, top_k_indices


@gin.configurable
class UniformRandom(Router):
    """K distinct experts drawn uniformly for every token and optimizer step; gate 1/K.

    At evaluation the draw depends only on the token's place in its group.

    Args:
        k: experts per token.
    """

    causality = Causality.CAUSAL
    order_matters = True
    steps = True
    needs_all_experts = "it draws experts by their numbers"
    decoding = "a fixed draw for each position"

    def __init__(self, sizes: Sizes, k: Count = 2):
        check_k("UniformRandom", k, sizes)
        self.num_experts, self.k, self.losses = sizes.num_experts, k, ()

    def route(self, inputs: RouterInputs) -> Routing:
        return self._routing(_uniform_draws(inputs, self.num_experts))

    def start(self, inputs, length_G, slots) -> DecodingState:
        return _draws_ahead(length_G, slots, self.num_experts)

    def route_next(self, inputs, state):
        draw_G1E, state = _next_draw(state)
        return self._routing(draw_G1E), state

    def _routing(self, draw_GTE) -> Routing:
        expert_GTK = top_k_indices(draw_GTE, self.k)
        return Routing(_equal_gates(expert_GTK, self.num_experts))


@gin.configurable
class Balanced(Router):
    """Round robin: assignment n of a group goes to expert n mod E; gate 1/K.

    The load is equal to within one token, at no cost: a baseline for the time of routers.

    Args:
        k: experts per token.
    """

    causality = Causality.CAUSAL
    order_matters = True
    balanced = True
    steps = True
    needs_all_experts = "it takes experts in turn, by their numbers"
    decoding = "by the token's place in its group"

    def __init__(self, sizes: Sizes, k: Count = 2):
        check_k("Balanced", k, sizes)
        self.num_experts, self.k, self.losses = sizes.num_experts, k, ()

    def route(self, inputs: RouterInputs) -> Routing:
        return self._routing(jnp.cumsum(inputs.valid_GT, axis=1, dtype=jnp.int32) - 1)

    def start(self, inputs, length_G, slots) -> DecodingState:
        return {"tokens_G1": inputs.valid_GT.sum(1, keepdims=True, dtype=jnp.int32)}

    def route_next(self, inputs, state):
        tokens_G1 = state["tokens_G1"] + inputs.valid_GT
        return self._routing(tokens_G1 - 1), {"tokens_G1": tokens_G1}

    def _routing(self, place_GT) -> Routing:
        number_GTK = place_GT[..., None] * self.k + jnp.arange(self.k)[None, None]
        return Routing(_equal_gates(number_GTK % self.num_experts, self.num_experts))


@gin.configurable
class Zipf(Router):
    """K distinct experts drawn for every token, expert e with weight 1 / (e + 1)^exponent.

    A load of known skew, to test dispatch and buffers with; gate 1/K. The draw is fixed at
    evaluation, as that of `UniformRandom`.

    Args:
        k: experts per token.
        exponent: of the skew; 0 is uniform.
    """

    causality = Causality.CAUSAL
    order_matters = True
    steps = True
    needs_all_experts = "it draws experts by their numbers"
    decoding = "a fixed draw for each position"

    def __init__(self, sizes: Sizes, k: Count = 2, exponent: NonNegative = 1.0):
        check_k("Zipf", k, sizes)
        if exponent < 0:
            raise ValueError(f"Zipf.exponent={exponent} must not be negative")
        self.num_experts, self.k, self.losses = sizes.num_experts, k, ()
        self.exponent = exponent

    def route(self, inputs: RouterInputs) -> Routing:
        return self._routing(_uniform_draws(inputs, self.num_experts))

    def start(self, inputs, length_G, slots) -> DecodingState:
        return _draws_ahead(length_G, slots, self.num_experts)

    def route_next(self, inputs, state):
        draw_G1E, state = _next_draw(state)
        return self._routing(draw_G1E), state

    def _routing(self, draw_GTE) -> Routing:
        # Gumbel noise on log weights, then the K largest: draws without replacement.
        noise_GTE = -jnp.log(-jnp.log(jnp.clip(draw_GTE, 1e-12, 1 - 1e-7)))
        weight_E = -self.exponent * jnp.log(jnp.arange(1, self.num_experts + 1))
        expert_GTK = top_k_indices(noise_GTE + weight_E[None, None], self.k)
        return Routing(_equal_gates(expert_GTK, self.num_experts))


@gin.configurable
class AllExperts(Router):
    """Every token goes to all experts, weighted by a softmax: the dense mixture, K = E.

    Args:
        losses: values such as `ZLoss()`.
    """

    causality = Causality.CAUSAL
    balanced = True
    needs_all_experts = None
    decoding = "as in training"

    def __init__(self, sizes: Sizes, losses: Sequence[RouterLoss] = ()):
        self.num_experts, self.losses = sizes.num_experts, tuple(losses)
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal(), role="router")

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        gate_GTE = jax.nn.softmax(logits_GTE)
        expert_GTE = jnp.broadcast_to(jnp.arange(self.num_experts, dtype=jnp.int32), gate_GTE.shape)
        keep_GTE = jnp.ones(gate_GTE.shape, bool)
        return Routing(
            TokenChoice(expert_GTE, gate_GTE, keep_GTE, self.num_experts), logits_GTE, gate_GTE
        )


@gin.configurable
class FrozenTopK(Router):
    """Top-k of softmax(x W), where W is drawn once and never learned (router state).

    Args:
        k: experts per token.
    """

    causality = Causality.CAUSAL
    needs_all_experts = None
    decoding = "as in training"

    def __init__(self, sizes: Sizes, k: Count = 2):
        check_k("FrozenTopK", k, sizes)
        self.num_experts, self.k, self.losses = sizes.num_experts, k, ()
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = router_state(shape, jnp.float32, ("embed", None), truncated_normal())

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        prob_GTE = jax.nn.softmax(logits_GTE)
        expert_GTK = top_k(prob_GTE, self.k)
        gate_GTK = jnp.take_along_axis(prob_GTE, expert_GTK, -1)
        keep_GTK = jnp.ones_like(expert_GTK, bool)
        return Routing(
            TokenChoice(expert_GTK, gate_GTK, keep_GTK, self.num_experts), logits_GTE, prob_GTE
        )


def _uniform_draws(inputs: RouterInputs, num_experts: int) -> jax.Array:
    """Uniform draws (G, T, E); at evaluation the same for every group and batch."""
    groups, tokens = inputs.valid_GT.shape
    keys_G = inputs.keys_G("uniform") if inputs.train else jax.random.key(0)[None]
    draw_GTE = jax.vmap(lambda key: jax.random.uniform(key, (tokens, num_experts)))(keys_G)
    return jnp.broadcast_to(draw_GTE, (groups, tokens, num_experts))


def _draws_ahead(length_G, slots: int, num_experts: int) -> DecodingState:
    """The draws of evaluation for every place, and the place of the next token."""
    draw_TE = jax.random.uniform(jax.random.key(0), (slots, num_experts))
    draw_GTE = jnp.broadcast_to(draw_TE, (len(length_G), *draw_TE.shape))
    return {"draw_GTE": draw_GTE, "place_G": length_G}


def _next_draw(state: DecodingState) -> tuple[jax.Array, DecodingState]:
    """The draws (G, 1, E) for the next token, and the state after it."""
    place_G = state["place_G"]
    draw_G1E = jnp.take_along_axis(state["draw_GTE"], place_G[:, None, None], axis=1)
    return draw_G1E, state | {"place_G": place_G + 1}


def _equal_gates(expert_GTK, num_experts: int) -> TokenChoice:
    gate_GTK = jnp.full(expert_GTK.shape, 1 / expert_GTK.shape[-1], jnp.float32)
    return TokenChoice(expert_GTK, gate_GTK, jnp.ones_like(expert_GTK, bool), num_experts)
