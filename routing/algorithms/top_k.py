"""Token choice: each token goes to its K best experts (Shazeer et al. 2017, eq. 3-5).

G groups, T tokens per group, D model width, E experts, K experts per token.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Literal

import gin
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float

from routing import parameters
from routing.balance_losses import BalanceLoss
from routing.balancers import Balancer
from routing.inputs import RouterInputs
from routing.losses import RouterLoss, ZLoss
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count, Positive
from routing.records import Causality, Routing, Sizes, TokenChoice
from routing.router import Router, check_k
from routing.selection import top_k, top_k_indices

GATES = ("softmax", "softmax_of_selected", "sigmoid")


@gin.configurable
class TopK(Router):
    """Each token goes to the K experts of its largest scores.

    Args:
        sizes: width, number of experts, vocabulary.
        k: experts per token.
        gates: "softmax" (over all experts, then select: OLMoE, DeepSeekMoE), "softmax_of_selected"
            (select, then softmax: Mixtral), "sigmoid" (DeepSeek-V3).
        renormalise: gates of the selected experts sum to 1.
        scale: gates are multiplied by this (DeepSeek-V3's route scale).
        init_scale: variance scale of the weights (Switch: 0.1).
        balancer: a class such as `BiasBalancer`; its bias enters selection, never the gates.
        expert_groups: into how many equal groups the experts are divided (DeepSeek-V3: 8).
        groups_per_token: of how many groups, the best, a token may use experts (DeepSeek-V3: 4).
        group_best: a group's score is the sum of this many of its best, bias included; where None
            k / groups_per_token, rounded up (DeepSeek-V3, section 2.1.2: K / M). DeepSeek-V2
            takes 1.
        orthogonal: the weights start with orthonormal columns (SIMBAL, Guo et al. 2025);
            `TermLoss("orthogonality")`, the sum of |W^T W - I|, keeps them orthonormal.
        keep_rest: the decision has the gates of unchosen experts too, for `DefaultVectors`.
        residual: add a linear map of the logits of the previous sparse layer to the logits
            (MoE++, Jin et al. 2024, eq. 6).
        losses: values such as `BalanceLoss()`; balance and z where None.

    Raises:
        ValueError: k out of range, or k = 1 with gates that would always be 1 (the router would
            get no gradient).
    """

    causality = Causality.CAUSAL
    needs_all_experts = None
    decoding = "as in training"

    def __init__(
        self,
        sizes: Sizes,
        k: Count = 2,
        gates: Literal["softmax", "softmax_of_selected", "sigmoid"] = "softmax",
        renormalise: bool = False,
        scale: Positive = 1.0,
        init_scale: Positive = 1.0,
        balancer: Callable[[int], Balancer] | None = None,
        expert_groups: Count = 1,
        groups_per_token: Count = 1,
        group_best: Count | None = None,
        orthogonal: bool = False,
        keep_rest: bool = False,
        residual: bool = False,
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
        check_groups(k, expert_groups, groups_per_token, sizes)
        self.group_best = best_of_group(k, expert_groups, groups_per_token, group_best, sizes)
        self.num_experts, self.k, self.gates = sizes.num_experts, k, gates
        self.expert_groups, self.groups_per_token = expert_groups, groups_per_token
        self.renormalise, self.scale, self.keep_rest = renormalise, scale, keep_rest
        if keep_rest and (renormalise or gates == "softmax_of_selected"):
            raise ValueError(
                "TopK.keep_rest needs gates that unchosen experts have, too: renormalise=False and "
                'gates="softmax" or "sigmoid"'
            )
        self.losses = (BalanceLoss(), ZLoss()) if losses is None else tuple(losses)
        shape = (sizes.d_model, sizes.num_experts)
        init = parameters.orthogonal() if orthogonal else truncated_normal(init_scale)
        self.weight_DE = parameter(shape, ("embed", None), init, role="router")
        self.reads_previous_logits = residual
        shape = (sizes.num_experts, sizes.num_experts)
        self.residual_EE = (
            parameter(shape, (None, None), truncated_normal(), role="router") if residual else None
        )
        self.balancer = balancer(sizes.num_experts) if balancer else None
        if expert_groups > 1:
            self.needs_all_experts = "experts lie in groups of equal size (TopK.expert_groups)"
        elif residual:
            self.needs_all_experts = "the next router reads its logits (TopK.residual)"

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        logits_GTE = checkpoint_name(logits_GTE, "router_logits")
        if self.residual_EE is not None and inputs.context.previous_logits is not None:
            logits_GTE = logits_GTE + inputs.context.previous_logits @ self.residual_EE[...]
        if self.gates == "sigmoid":
            raw_GTE, log_GTE = jax.nn.sigmoid(logits_GTE), jax.nn.log_sigmoid(logits_GTE)
            score_GTE = jax.nn.softmax(log_GTE)  # sigmoids over their sum, exact if small
        else:
            raw_GTE = score_GTE = jax.nn.softmax(logits_GTE)
            log_GTE = logits_GTE
        expert_GTK = top_k(self._preference(raw_GTE), self.k)
        if self.renormalise or self.gates == "softmax_of_selected":
            gate_GTK = jax.nn.softmax(jnp.take_along_axis(log_GTE, expert_GTK, -1))
        else:
            gate_GTK = jnp.take_along_axis(raw_GTE, expert_GTK, -1)
        keep_GTK = jnp.ones_like(expert_GTK, bool)
        decision = TokenChoice(expert_GTK, self.scale * gate_GTK, keep_GTK, self.num_experts)
        if self.keep_rest:
            chosen_GTE = jax.nn.one_hot(expert_GTK, self.num_experts, dtype=bool).any(-2)
            unchosen_gate_GTE = jnp.where(chosen_GTE, 0, self.scale * raw_GTE)
            decision = dataclasses.replace(decision, unchosen_gate_GTE=unchosen_gate_GTE)
        orthogonality_GT = jnp.broadcast_to(
            non_orthogonality(self.weight_DE[...]), inputs.valid_GT.shape
        )
        batch_sums = {}
        if self.balancer is not None:
            batch_sums = self.balancer.batch_sums(raw_GTE, inputs.valid_GT, self.k)
        terms = {"orthogonality": orthogonality_GT}
        return Routing(decision, logits_GTE, score_GTE, terms=terms, batch_sums=batch_sums)

    def _preference(self, raw_GTE):
        """Scores for selection: with the bias, and minus infinity outside the allowed groups."""
        biased_GTE = jax.lax.stop_gradient(raw_GTE)
        if self.balancer is not None:
            biased_GTE = biased_GTE + self.balancer.bias_E[...][None, None]
        if self.groups_per_token == self.expert_groups:
            return biased_GTE
        groups = self.expert_groups, self.groups_per_token, self.group_best
        return in_best_groups(biased_GTE, *groups)


def in_best_groups(
    score_GTE: Float[Array, "G T E"], groups: int, allowed: int, best: int
) -> jax.Array:
    """The scores of the experts in each token's `allowed` best groups, minus infinity elsewhere.

    A group's score is the sum of its `best` largest. A groups of Y experts each.
    """
    score_GTAY = score_GTE.reshape(*score_GTE.shape[:2], groups, -1)
    top_GTAK = jnp.take_along_axis(score_GTAY, top_k_indices(score_GTAY, best), -1)
    chosen_groups = top_k_indices(top_GTAK.sum(-1), allowed)
    is_allowed_GTA = jax.nn.one_hot(chosen_groups, groups, dtype=bool).any(-2)
    return jnp.where(is_allowed_GTA[..., None], score_GTAY, -jnp.inf).reshape(score_GTE.shape)


def non_orthogonality(weight_DE: Float[Array, "D E"]) -> jax.Array:
    """Sum of |W^T W - I| (SIMBAL, eq. 4)."""
    gram_EE = weight_DE.T @ weight_DE
    return jnp.abs(gram_EE - jnp.eye(gram_EE.shape[0], dtype=gram_EE.dtype)).sum()


def check_groups(k: int, groups: int, allowed: int, sizes: Sizes) -> None:
    """Raise ValueError where groups don't divide the experts, or hold fewer than k together."""
    experts = sizes.num_experts
    if groups < 1 or experts % groups:
        raise ValueError(f"TopK.expert_groups={groups} must divide the {experts} experts")
    if not 1 <= allowed <= groups or allowed * experts // groups < k:
        raise ValueError(
            f"TopK.groups_per_token={allowed} of {groups} groups of {experts // groups} experts "
            f"can't hold TopK.k={k}"
        )


def best_of_group(k: int, groups: int, allowed: int, best: int | None, sizes: Sizes) -> int:
    """The number of experts in a group's score: `best`, or k / allowed rounded up where None."""
    if best is None:
        return -(-k // allowed)
    if allowed == groups:
        raise ValueError(
            f"TopK.group_best={best} has no meaning where a token may use all groups "
            f"(TopK.groups_per_token={allowed} of {groups}); leave it at None"
        )
    if not 1 <= best <= sizes.num_experts // groups:
        raise ValueError(
            f"TopK.group_best={best} must lie between 1 and the number of experts in a group "
            f"({sizes.num_experts // groups})"
        )
    return best
