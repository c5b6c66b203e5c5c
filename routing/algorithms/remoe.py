"""ReMoE: ReLU gates instead of top-k, sparse by an adaptive auxiliary loss (Wang et al. 2024).

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

    The auxiliary loss lambda * (E / k) sum_e f_e mean(R_e) reduces the gates of overloaded experts
    (eq. 9). After every optimizer step lambda is multiplied by a factor where fewer than 1 - k / E
    of the gates are zero, and divided by it where more are (eq. 8). At first about half of the
    gates are active. Every layer adapts a lambda of its own; the paper's is shared by all layers.

    Args:
        sizes: width, number of experts, vocabulary.
        k: the target of experts per token.
        start: the initial lambda.
        factor: by which lambda changes.
        losses: the auxiliary loss where None, averaged over layers; its coefficient multiplies
            lambda.
    """

    causality = Causality.CAUSAL
    needs_all_experts = None
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
        active_E, tokens = batch_sums["active"], inputs.valid_GT.sum()
        if (global_batch := inputs.context.global_batch) is not None:
            stats = global_batch.stats
            active_E, tokens = stats.batch_sums["router"]["active"], stats.token_count
        share_E = active_E / jnp.maximum(tokens, 1)
        load_E = self.num_experts / self.k * share_E.astype(gate_GTE.dtype)
        term_GT = self.penalty.weight[...] * jnp.einsum("gte,e->gt", gate_GTE, load_E)
        score_GTE = gate_GTE / jnp.maximum(gate_GTE.sum(-1, keepdims=True), 1e-20)
        # A token without experts has uniform scores.
        none_GT1 = ~active_GTE.any(-1, keepdims=True)
        score_GTE = jnp.where(none_GT1, 1 / self.num_experts, score_GTE)
        terms = {"sparsity": term_GT}
        return Routing(decision, logits_GTE, score_GTE, terms=terms, batch_sums=batch_sums)


class SparsityPenalty(StepState):
    """lambda, the adaptive weight of the auxiliary loss."""

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
        # Bounded, so that it can come back from both ends.
        self.weight[...] = jnp.clip(weight, 1e-12, 1e6)
