"""ReMoE: ReLU instead of top-k, kept sparse by an adaptive penalty (Wang et al. 2024).

G groups, T tokens per group, D model width, E experts, K experts per token.
"""

from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp

from routing.balancers import StepState
from routing.inputs import RouterInputs
from routing.losses import RouterLoss, TermLoss
from routing.parameters import parameter, router_state, truncated_normal
from routing.ranges import AboveOne, Count, Positive
from routing.records import Causality, RouterStats, Routing, Sizes, TokenChoice
from routing.router import Router, check_k


@gin.configurable
class ReMoE(Router):
    """Gates relu(x W): a token goes to every expert with a gate above zero (eq. 4).

    The penalty lambda * (E / k) sum_e f_e mean(R_e) pulls the gates of crowded experts down
    (eq. 9); after every step lambda grows by a factor while fewer than 1 - k / E of the gates are
    zero, and shrinks while more are (eq. 8). About half of the gates start active. Every layer
    has a lambda of its own and aims at k by itself; the paper's one is shared by all layers.

    Args:
        sizes: width, number of experts, vocabulary.
        k: experts per token to aim at.
        start: lambda before the first step.
        factor: by which it changes.
        losses: the penalty where None, averaged over the layers: its coefficient multiplies lambda.
    """

    causality = Causality.CAUSAL
    decoding = "as in training"
    reads_global_batch = True

    def __init__(
        self,
        sizes: Sizes,
        k: Count = 2,
        start: Positive = 1e-8,
        factor: AboveOne = 1.2,
        losses: Sequence[RouterLoss] | None = None,
    ):
        check_k("ReMoE", k, sizes)
        if not (start > 0 and factor > 1):
            raise ValueError(f"ReMoE.start={start} must be above 0, ReMoE.factor={factor} above 1")
        self.num_experts, self.k, self.experts_per_token = sizes.num_experts, k, float(k)
        of_layers = (TermLoss("sparsity", over_layers="mean"),)  # eq. 9
        self.losses = of_layers if losses is None else tuple(losses)
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal(), role="router")
        self.penalty = SparsityPenalty(sizes.num_experts, k, start, factor)

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        gate_GTE = jax.nn.relu(logits_GTE)
        expert_GTE = jnp.broadcast_to(jnp.arange(self.num_experts, dtype=jnp.int32), gate_GTE.shape)
        active_GTE = gate_GTE > 0
        decision = TokenChoice(expert_GTE, gate_GTE, active_GTE, self.num_experts)
        valid_GT1 = inputs.valid_GT[..., None]
        batch_sums = {"active": jnp.sum(active_GTE & valid_GT1, axis=(0, 1), dtype=jnp.int32)}
        counted = batch_sums["active"], inputs.valid_GT.sum()
        if (whole := inputs.context.global_batch) is not None:
            counted = whole.stats.batch_sums["router"]["active"], whole.stats.token_count
        share_E = counted[0] / jnp.maximum(counted[1], 1)
        crowd_E = self.num_experts / self.k * share_E.astype(gate_GTE.dtype)
        term_GT = self.penalty.weight[...] * jnp.einsum("gte,e->gt", gate_GTE, crowd_E)
        score_GTE = gate_GTE / jnp.maximum(gate_GTE.sum(-1, keepdims=True), 1e-20)
        # A token without any expert has the same share of each.
        none_GT1 = ~active_GTE.any(-1, keepdims=True)
        score_GTE = jnp.where(none_GT1, 1 / self.num_experts, score_GTE)
        terms = {"sparsity": term_GT}
        return Routing(decision, logits_GTE, score_GTE, terms=terms, batch_sums=batch_sums)


class SparsityPenalty(StepState):
    """lambda, which follows the share of gates that are zero."""

    def __init__(self, num_experts: int, k: int, start: float, factor: float):
        self.target, self.factor = 1 - k / num_experts, factor

        def first(key, shape, dtype):
            return jnp.asarray(start, dtype)

        self.weight = router_state((), jnp.float32, (), first)

    def update(self, stats: RouterStats) -> None:
        # In floats: tokens times experts may exceed an int32.
        active = stats.batch_sums["router"]["active"].astype(jnp.float32).mean()
        sparsity = 1 - active / jnp.maximum(stats.token_count, 1)
        weight = self.weight[...] * self.factor ** jnp.sign(self.target - sparsity)
        # It must be able to come back from either end.
        self.weight[...] = jnp.clip(weight, 1e-12, 1e6)
