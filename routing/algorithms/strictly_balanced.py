"""Strictly balanced gating: by batch in training, by learned thresholds at evaluation.

G groups, T tokens per group, D model width, E experts, C slots per expert.
"""

from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp

from routing.algorithms.expert_choice import best_tokens
from routing.inputs import RouterInputs
from routing.losses import RouterLoss, TermLoss
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count
from routing.records import Causality, ExpertChoice, Routing, Sizes, TokenChoice
from routing.router import Router, check_k


@gin.configurable
class StrictlyBalanced(Router):
    """softmax(x W), masked and renormalised (Shazeer et al. 2017, appendix F, eq. 16-20).

    In training each expert takes the m = k T / E tokens of the group with its largest gates; at
    evaluation a token goes to every expert whose gate exceeds a threshold T_e. The thresholds are
    parameters; a loss makes both masks agree. The output of a token without experts is zero.

    Args:
        sizes: width, number of experts, vocabulary.
        k: experts per token on average.
        losses: `TermLoss("threshold")` where None; without it thresholds get no gradient.
    """

    causality = Causality.CAUSAL_AT_EVALUATION
    balanced = True
    needs_all_experts = "a removed expert's tokens would be above no other threshold"
    decoding = "by the learned thresholds"

    def __init__(self, sizes: Sizes, k: Count = 4, losses: Sequence[RouterLoss] | None = None):
        check_k("StrictlyBalanced", k, sizes)
        self.num_experts, self.k = sizes.num_experts, k
        self.losses = (TermLoss("threshold"),) if losses is None else tuple(losses)

        def uniform(key, shape, dtype):
            return jnp.full(shape, 1 / sizes.num_experts, dtype)

        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal(), role="router")
        self.threshold_E = parameter((sizes.num_experts,), (None,), uniform, role="router")

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        prob_GTE = jax.nn.softmax(logits_GTE)
        threshold_11E = self.threshold_E[...][None, None]
        above_GTE = jax.lax.stop_gradient(prob_GTE > threshold_11E)
        prob_GET = jnp.swapaxes(prob_GTE, 1, 2)
        token_GEC, keep_GEC = best_tokens(
            jax.lax.stop_gradient(prob_GET), inputs.valid_GT, self.k, self.num_experts
        )
        taken_GTE = _mask(token_GEC, keep_GEC, inputs.valid_GT.shape[1])
        # Both masks are constants: d/dT_e is the number taken less the number above.
        differ_GTE = above_GTE.astype(prob_GTE.dtype) - taken_GTE.astype(prob_GTE.dtype)
        terms = {"threshold": jnp.sum(differ_GTE * (prob_GTE - threshold_11E), axis=-1)}
        if not inputs.train:
            experts = jnp.arange(self.num_experts, dtype=jnp.int32)
            decision = TokenChoice(
                jnp.broadcast_to(experts, prob_GTE.shape),
                _among(logits_GTE, above_GTE),
                above_GTE,
                self.num_experts,
            )
            return Routing(decision, logits_GTE, prob_GTE, terms=terms)
        gate_GET = jnp.swapaxes(_among(logits_GTE, taken_GTE), 1, 2)
        gate_GEC = jnp.where(keep_GEC, jnp.take_along_axis(gate_GET, token_GEC, -1), 0)
        decision = ExpertChoice(token_GEC, gate_GEC, keep_GEC, inputs.valid_GT.shape[1])
        return Routing(decision, logits_GTE, prob_GTE, terms=terms)


def _mask(token_GEC, keep_GEC, tokens: int) -> jax.Array:
    """Which tokens each expert took: bool (G, T, E)."""

    def one(token_C, keep_C):
        spread_C = jnp.where(keep_C, token_C, tokens)
        return jnp.zeros(tokens, bool).at[spread_C].set(True, mode="drop")

    return jnp.swapaxes(jax.vmap(jax.vmap(one))(token_GEC, keep_GEC), 1, 2)


def _among(logits_GTE, mask_GTE):
    """Softmax over the mask's experts, which is their gates renormalised; zero for an empty mask.

    Of the logits: the quotient of two tiny probabilities would have no finite gradient.
    """
    masked_GTE = jnp.where(mask_GTE, logits_GTE, -1e30)
    return jnp.where(mask_GTE, jax.nn.softmax(masked_GTE), 0)
