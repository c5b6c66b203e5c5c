"""Switch: one expert per token, weighted by its probability (Fedus et al. 2021).

G groups, T tokens per group, D model width, E experts; K = 1.
"""

from collections.abc import Sequence

import gin
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from routing.balance_losses import BalanceLoss
from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import parameter, truncated_normal
from routing.ranges import LessThanOne, Positive
from routing.records import Causality, Routing, Sizes, TokenChoice
from routing.router import Router
from routing.selection import top_k


@gin.configurable
class Switch(Router):
    """y = p_i(x) E_i(x), i = argmax of softmax(x W) (eq. 1-2); W starts at scale 0.1 (table 3).

    Args:
        sizes: width, number of experts, vocabulary.
        jitter: in training the router's input is multiplied by U(1 - jitter, 1 + jitter); that of
            the experts is not.
        init_scale: variance scale of W's initial truncated normal.
        losses: values such as `BalanceLoss()`, which is the default with the paper's 0.01.
    """

    causality = Causality.CAUSAL
    needs_all_experts = None
    decoding = "as in training, without jitter"

    def __init__(
        self,
        sizes: Sizes,
        jitter: LessThanOne = 0.01,
        init_scale: Positive = 0.1,
        losses: Sequence[RouterLoss] | None = None,
    ):
        if not 0 <= jitter < 1:
            raise ValueError(f"Switch.jitter={jitter} must lie in [0, 1)")
        self.num_experts, self.jitter = sizes.num_experts, jitter
        self.losses = (BalanceLoss(),) if losses is None else tuple(losses)
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(
            shape, ("embed", None), truncated_normal(init_scale), role="router"
        )

    def route(self, inputs: RouterInputs) -> Routing:
        x_GTD = inputs.x_GTD
        if inputs.train and self.jitter:
            low, high, shape = 1 - self.jitter, 1 + self.jitter, x_GTD.shape[1:]
            draw = jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32, low, high))
            x_GTD = x_GTD * draw(inputs.keys_G("jitter"))
        logits_GTE = jnp.einsum("gtd,de->gte", x_GTD, self.weight_DE[...])
        logits_GTE = checkpoint_name(logits_GTE, "router_logits")
        prob_GTE = jax.nn.softmax(logits_GTE)
        expert_GT1 = top_k(prob_GTE, 1)
        gate_GT1 = jnp.take_along_axis(prob_GTE, expert_GT1, -1)
        keep_GT1 = jnp.ones_like(expert_GT1, bool)
        decision = TokenChoice(expert_GT1, gate_GT1, keep_GT1, self.num_experts)
        return Routing(decision, logits_GTE, prob_GTE)
