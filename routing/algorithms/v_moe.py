"""V-MoE: noise of a fixed scale on the logits, gates from the full softmax (Riquelme et al. 2021).

G groups, T tokens per group, D model width, E experts, K experts per token.
"""

from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp

from routing.algorithms.noisy_top_k import standard_normal
from routing.balance_losses import ImportanceLoss, LoadLoss
from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count, Positive
from routing.records import Causality, Routing, Sizes, TokenChoice
from routing.router import Router, check_k
from routing.selection import top_k


@gin.configurable
class VMoE(Router):
    """The K largest of softmax(x W + N(0, 1/E^2)), not renormalised (section 2.2).

    The router is causal. Batch-prioritised routing (section 4) is a capacity policy that is not:
    `Capacity.priority = "gate"` with `Capacity.order = "choice-major"`.

    Args:
        sizes: width, number of experts, vocabulary.
        k: experts per token.
        noise: standard deviation of the noise in training, in units of 1 / E.
        losses: where None, importance (of all scores) and load, half each (appendix A), over each
            group as in the authors' code.
    """

    causality = Causality.CAUSAL
    needs_all_experts = None
    decoding = "as in training, without noise"

    def __init__(
        self,
        sizes: Sizes,
        k: Count = 2,
        noise: Positive = 1.0,
        losses: Sequence[RouterLoss] | None = None,
    ):
        check_k("VMoE", k, sizes)
        if noise <= 0:
            raise ValueError(f"VMoE.noise={noise} must be above 0; without noise this is TopK")
        self.num_experts, self.k = sizes.num_experts, k
        self.std = noise / sizes.num_experts
        halves = (ImportanceLoss(0.005, of="scores", scope="group"), LoadLoss(0.005, scope="group"))
        self.losses = halves if losses is None else tuple(losses)
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal(), role="router")

    def route(self, inputs: RouterInputs) -> Routing:
        clean_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        noisy_GTE = clean_GTE
        if inputs.train:
            noisy_GTE = clean_GTE + self.std * standard_normal(inputs, self.num_experts)
        prob_GTE = jax.nn.softmax(noisy_GTE)
        expert_GTK = top_k(noisy_GTE, self.k)
        gate_GTK = jnp.take_along_axis(prob_GTE, expert_GTK, -1)
        decision = TokenChoice(
            expert_GTK, gate_GTK, jnp.ones_like(expert_GTK, bool), self.num_experts
        )
        # One threshold for all experts of a token: its K-th largest noisy logit.
        threshold_GT1 = jnp.take_along_axis(noisy_GTE, expert_GTK[..., -1:], -1)
        load_GTE = jax.scipy.stats.norm.cdf((clean_GTE - threshold_GT1) / self.std)
        return Routing(decision, clean_GTE, jax.nn.softmax(clean_GTE), load_GTE)
