"""BASE: every expert gets equally many tokens, by linear assignment (Lewis et al. 2021).

G groups, T tokens per group, D model width, E experts; K = 1.
"""

from collections.abc import Sequence

import gin
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Float

from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import orthogonal, parameter
from routing.records import AnyArray, Causality, Routing, Sizes, TokenChoice
from routing.router import Router
from routing.selection import top_k
from routing.solvers.auction import balanced_assignment


@gin.configurable
class BASE(Router):
    """argmax over assignments of sum_t h_t . w_a(t), each expert T / E tokens (eq. 2-3).

    The gate is sigmoid(h . w_a) (eq. 1), which alone has a gradient. At evaluation every token goes
    to its best expert. Each group is an assignment problem of its own.

    Args:
        sizes: width, number of experts, vocabulary.
        shuffle: assign in random groups of the micro-batch's tokens (section 3.1), not in the
            layer's. Larger groups (`MoELayer.sequences_per_group`) make this unnecessary; with it
            the load in the layer's groups is uneven.
        losses: none are needed: the load is balanced by construction.
    """

    causality = Causality.CAUSAL_AT_EVALUATION
    balanced = True
    needs_all_experts = None
    decoding = "each token's best expert"

    def __init__(self, sizes: Sizes, shuffle: bool = False, losses: Sequence[RouterLoss] = ()):
        self.num_experts, self.shuffle, self.losses = sizes.num_experts, shuffle, tuple(losses)
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), orthogonal(0.1), role="router")

    def route(self, inputs: RouterInputs) -> Routing:
        score_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        if inputs.train:
            expert_GT = self.assign(jax.lax.stop_gradient(score_GTE), inputs)
            expert_GT1 = checkpoint_name(jnp.maximum(expert_GT, 0)[..., None], "routing")
        else:
            expert_GT1 = top_k(score_GTE, 1)
        gate_GT1 = jax.nn.sigmoid(jnp.take_along_axis(score_GTE, expert_GT1, -1))
        keep_GT1 = jnp.ones_like(expert_GT1, bool)
        decision = TokenChoice(expert_GT1, gate_GT1, keep_GT1, self.num_experts)
        return Routing(decision, score_GTE, jax.nn.softmax(score_GTE))

    def assign(self, score_GTE: Float[AnyArray, "G T E"], inputs: RouterInputs) -> jax.Array:
        """The expert of every token, int32 (G, T); -1 for padding."""
        solve = jax.vmap(balanced_assignment)
        if not self.shuffle:
            return solve(score_GTE, inputs.valid_GT)
        shape = inputs.valid_GT.shape
        # Valid tokens in random order, then padding.
        draw = jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))
        draw_GT = jnp.where(inputs.valid_GT, draw(inputs.keys_G("shuffle")), 2)
        order_N = jnp.argsort(draw_GT.ravel())
        valid_GT = inputs.valid_GT.ravel()[order_N].reshape(shape)
        shuffled_GTE = score_GTE.reshape(-1, self.num_experts)[order_N].reshape(score_GTE.shape)
        assigned_N = solve(shuffled_GTE, valid_GT).ravel()
        return (
            jnp.zeros_like(assigned_N)
            .at[order_N]
            .set(assigned_N, unique_indices=True)
            .reshape(shape)
        )
