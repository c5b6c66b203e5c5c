"""Token choice: each token goes to its K best experts (Shazeer et al. 2017, eq. 3-5).

G groups, T tokens per group, D model width, E experts, K experts per token.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import gin
import jax
import jax.numpy as jnp

from routing.balancers import Balancer
from routing.losses import BalanceLoss, RouterLoss, ZLoss
from routing.parameters import parameter, truncated_normal
from routing.records import Causality, RouterInputs, Routing, Sizes, TokenChoice
from routing.router import Router, check_k, pick

GATES = ("softmax", "softmax_of_selected", "sigmoid")


@gin.configurable
class TopK(Router):
    """The K largest of the scores, without noise.

    Args:
        sizes: width, number of experts, vocabulary.
        k: experts per token.
        gates: "softmax" (over all experts, then select: OLMoE, DeepSeekMoE), "softmax_of_selected"
            (select, then softmax: Mixtral), "sigmoid" (DeepSeek-V3).
        renormalise: gates of the selected experts sum to 1.
        scale: gates are multiplied by this (DeepSeek-V3's route scale).
        init_scale: variance scale of the weights (Switch: 0.1).
        balancer: a class such as `BiasBalancer`; its bias enters selection, never the gates.
        losses: values such as `BalanceLoss()`; balance and z where None.

    Raises:
        ValueError: k out of range, or k = 1 with gates that would always be 1 (the router would
            get no gradient).
    """

    causality = Causality.CAUSAL
    decoding = "as in training"

    def __init__(
        self,
        sizes: Sizes,
        k: int = 2,
        gates: Literal["softmax", "softmax_of_selected", "sigmoid"] = "softmax",
        renormalise: bool = False,
        scale: float = 1.0,
        init_scale: float = 1.0,
        balancer: Callable[[int], Balancer] | None = None,
        losses: Sequence[RouterLoss] | None = None,
    ):
        check_k("TopK", k, sizes)
        if gates not in GATES:
            raise ValueError(f"TopK.gates={gates!r}: one of {', '.join(GATES)}")
        if k == 1 and sizes.num_experts > 1 and (renormalise or gates == "softmax_of_selected"):
            raise ValueError(
                "TopK.k=1 with gates that sum to 1 makes every gate 1 and starves the router of "
                'its gradient; use gates="softmax" or "sigmoid" with renormalise=False'
            )
        self.num_experts, self.k, self.gates = sizes.num_experts, k, gates
        self.renormalise, self.scale = renormalise, scale
        self.losses = (BalanceLoss(), ZLoss()) if losses is None else tuple(losses)
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal(init_scale))
        self.balancer = balancer(sizes.num_experts) if balancer else None

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        if self.gates == "sigmoid":
            raw_GTE = jax.nn.sigmoid(logits_GTE)
            score_GTE = raw_GTE / jnp.maximum(raw_GTE.sum(-1, keepdims=True), 1e-20)
        else:
            raw_GTE = score_GTE = jax.nn.softmax(logits_GTE)
        expert_GTK = pick(raw_GTE, self.k, self.balancer.bias_E[...] if self.balancer else None)
        if self.gates == "softmax_of_selected":
            gate_GTK = jax.nn.softmax(jnp.take_along_axis(logits_GTE, expert_GTK, -1))
        else:
            gate_GTK = jnp.take_along_axis(raw_GTE, expert_GTK, -1)
        if self.renormalise:
            gate_GTK = gate_GTK / jnp.maximum(gate_GTK.sum(-1, keepdims=True), 1e-20)
        keep_GTK = jnp.ones_like(expert_GTK, bool)
        decision = TokenChoice(expert_GTK, self.scale * gate_GTK, keep_GTK, self.num_experts)
        return Routing(decision, logits_GTE, score_GTE)
