"""GShard: the two best experts, the second at random (Lepikhin et al. 2020, algorithm 1).

G groups, T tokens per group, D model width, E experts; K = 2.
"""

from collections.abc import Sequence
from typing import Literal

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from routing.balance_losses import BalanceLoss
from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import parameter, truncated_normal
from routing.ranges import Positive
from routing.records import Causality, Routing, Sizes, TokenChoice
from routing.router import Router
from routing.selection import top_k


@gin.configurable
class GShard(Router):
    """The two largest of a softmax, renormalised; the second is kept if g2 / threshold > U(0, 1).

    The gates are renormalised before the draw and before capacity, so that a token without its
    second expert has a gate below 1. The router is causal; the paper's capacity, all first choices
    before any second one (`Capacity.order = "choice-major"`), is not once it drops assignments.

    Args:
        sizes: width, number of experts, vocabulary.
        second: "random" (the paper), or "all": the second expert is always kept, as at evaluation.
        threshold: 0.5 is the paper's rule 2 g2 > U; smaller values keep more.
        losses: balance over the first choices of each group with 0.01 where None.
    """

    causality = Causality.CAUSAL
    needs_all_experts = None
    decoding = "as in training, always with the second expert"

    def __init__(
        self,
        sizes: Sizes,
        second: Literal["random", "all"] = "random",
        threshold: Positive = 0.5,
        losses: Sequence[RouterLoss] | None = None,
    ):
        if sizes.num_experts < 2:
            raise ValueError("GShard needs at least 2 experts; use Switch")
        if second not in ("random", "all"):
            raise ValueError(f"GShard.second={second!r}: random or all")
        if not threshold > 0:
            raise ValueError(f"GShard.threshold={threshold} must be above 0")
        self.num_experts, self.second, self.threshold = sizes.num_experts, second, threshold
        of_first = (BalanceLoss(choices="first", scope="group"),)
        self.losses = of_first if losses is None else tuple(losses)
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal(), role="router")

    def route(self, inputs: RouterInputs) -> Routing:
        draw_GT = None
        if inputs.train and self.second == "random":
            shape, dtype = inputs.x_GTD.shape[1:2], inputs.x_GTD.dtype
            draw = jax.vmap(lambda key: jax.random.uniform(key, shape, dtype))
            draw_GT = draw(inputs.keys_G("second_expert"))
        return self.with_draws(inputs.x_GTD, draw_GT)

    def with_draws(
        self, x_GTD: Float[Array, "G T D"], draw_GT: Float[Array, "G T"] | None
    ) -> Routing:
        """The routing with these uniform draws; with None every second expert is kept."""
        logits_GTE = jnp.einsum("gtd,de->gte", x_GTD, self.weight_DE[...])
        prob_GTE = jax.nn.softmax(logits_GTE)
        expert_GTK = top_k(prob_GTE, 2)
        gate_GTK = jnp.take_along_axis(prob_GTE, expert_GTK, -1)
        gate_GTK = gate_GTK / (gate_GTK.sum(-1, keepdims=True) + 1e-9)
        keep_GTK = jnp.ones_like(expert_GTK, bool)
        if draw_GT is not None:
            keeps_GT = jax.lax.stop_gradient(gate_GTK[..., 1]) / self.threshold > draw_GT
            keep_GTK = jnp.stack([jnp.ones_like(keeps_GT), keeps_GT], -1)
        decision = TokenChoice(expert_GTK, gate_GTK, keep_GTK, self.num_experts)
        return Routing(decision, logits_GTE, prob_GTE)
