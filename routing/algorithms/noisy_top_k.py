"""Noisy top-k: learned noise on the logits, and a smooth estimate of the expected load.

G groups, T tokens per group, D model width, E experts, K experts per token.
"""

from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from routing.balance_losses import ImportanceLoss, LoadLoss
from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import parameter, zeros
from routing.ranges import Count
from routing.records import Causality, Routing, Sizes, TokenChoice
from routing.router import Router, check_k
from routing.selection import top_k, top_k_indices


@gin.configurable
class NoisyTopK(Router):
    """H = x W_g + N(0, 1) softplus(x W_noise); the gates are a softmax of H's K largest.

    Shazeer et al. 2017, eq. 3-5, with its importance and load losses (eq. 6-11). Both weights are
    zero at first (appendix A), so that routing is uniformly random. No noise at evaluation.

    Args:
        sizes: width, number of experts, vocabulary.
        k: experts per token, at least 2: with one, every gate would be 1.
        losses: values such as `LoadLoss()`.
    """

    causality = Causality.CAUSAL
    needs_all_experts = None
    decoding = "as in training, without noise"

    def __init__(self, sizes: Sizes, k: Count = 4, losses: Sequence[RouterLoss] | None = None):
        check_k("NoisyTopK", k, sizes)
        if k == 1 and sizes.num_experts > 1:
            raise ValueError(
                "NoisyTopK.k=1 makes every gate 1 and starves the router of its gradient; "
                "use 2 or more, or Switch"
            )
        self.num_experts, self.k = sizes.num_experts, k
        self.losses = (ImportanceLoss(), LoadLoss()) if losses is None else tuple(losses)
        shape, axes = (sizes.d_model, sizes.num_experts), ("embed", None)
        self.weight_DE = parameter(shape, axes, zeros, role="router")
        self.noise_DE = parameter(shape, axes, zeros, role="router")

    def route(self, inputs: RouterInputs) -> Routing:
        draw_GTE = standard_normal(inputs, self.num_experts) if inputs.train else None
        return self.with_noise(inputs.x_GTD, draw_GTE)

    def with_noise(
        self, x_GTD: Float[Array, "G T D"], draw_GTE: Float[Array, "G T E"] | None
    ) -> Routing:
        """The routing with these standard normal draws; without noise where None."""
        clean_GTE = jnp.einsum("gtd,de->gte", x_GTD, self.weight_DE[...])
        std_GTE = jax.nn.softplus(jnp.einsum("gtd,de->gte", x_GTD, self.noise_DE[...]))
        noisy_GTE = clean_GTE if draw_GTE is None else clean_GTE + draw_GTE * std_GTE
        expert_GTK = top_k(noisy_GTE, self.k)
        gate_GTK = jax.nn.softmax(jnp.take_along_axis(noisy_GTE, expert_GTK, -1))
        decision = TokenChoice(
            expert_GTK, gate_GTK, jnp.ones_like(expert_GTK, bool), self.num_experts
        )
        load_GTE = chance_of_selection(clean_GTE, noisy_GTE, std_GTE, self.k)
        return Routing(decision, clean_GTE, jax.nn.softmax(clean_GTE), load_GTE)


def standard_normal(inputs: RouterInputs, num_experts: int) -> jax.Array:
    """N(0, 1) draws (G, T, E) that depend on neither the mesh nor the micro-batch."""
    shape = (inputs.x_GTD.shape[1], num_experts)
    draw = jax.vmap(lambda key: jax.random.normal(key, shape, inputs.x_GTD.dtype))
    return draw(inputs.keys_G("noise"))


def chance_of_selection(
    clean_GTE: Float[Array, "*tokens E"],
    noisy_GTE: Float[Array, "*tokens E"],
    std_GTE: Float[Array, "*tokens E"],
    k: int,
) -> jax.Array:
    """P(x, i), the probability that i is among the K largest if its noise is redrawn (eq. 8-9).

    The K-th largest of the others is the (K + 1)-th of all for a chosen expert, else the K-th.
    """
    if k == noisy_GTE.shape[-1]:
        return jnp.ones_like(clean_GTE)
    order_GTK = top_k_indices(jax.lax.stop_gradient(noisy_GTE), k + 1)
    best_GTK = jnp.take_along_axis(noisy_GTE, order_GTK, -1)
    chosen_GTE = jax.nn.one_hot(order_GTK[..., :k], noisy_GTE.shape[-1], dtype=bool).any(-2)
    threshold_GTE = jnp.where(chosen_GTE, best_GTK[..., k : k + 1], best_GTK[..., k - 1 : k])
    # With less noise the quotient's derivative would overflow.
    return jax.scipy.stats.norm.cdf((clean_GTE - threshold_GTE) / jnp.maximum(std_GTE, 1e-6))
