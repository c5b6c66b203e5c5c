"""Expert choice: each expert takes its C best tokens (Zhou et al. 2022, section 3.2).

G groups, T tokens per group, D model width, E experts, C slots per expert.
"""

from collections.abc import Sequence
from typing import Literal

import gin
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from routing.balancers import StepState, exceeded_by
from routing.capacity import slots_for_valid, slots_per_expert
from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import parameter, router_state, truncated_normal
from routing.ranges import Count, LessThanOne, Positive
from routing.records import (
    Causality,
    ExpertChoice,
    RouterStats,
    Routing,
    Sizes,
    TokenChoice,
)
from routing.router import Router
from routing.selection import top_k
from routing.solvers.dykstra import capped_plan


@gin.configurable("ExpertChoice", module="routing")  # pyright: ignore[reportCallIssue]
class ExpertChoiceRouter(Router):
    """Each expert takes the C tokens of its largest scores, a softmax over experts.

    Args:
        sizes: width, number of experts, vocabulary.
        capacity_factor: experts per token on average; C = ceil(capacity_factor * T / E).
        most_experts: the most experts of a token, by an entropy-regularised linear program (section
            3.3); None for no limit. In training each expert takes its C best tokens of the plan,
            which is exact only after many iterations, so that some tokens have more experts.
        entropy: coefficient of the regularisation; the paper's 0.001 needs far more than 100
            iterations.
        iterations: of Dykstra's algorithm.
        evaluation: "threshold": a token goes to every expert whose score exceeds a running mean of
            the lowest score that the expert took in training, which is causal; "tokens": as in
            training, which is not.
        decay: of that running mean.
        losses: none are needed: the load is balanced by construction.
    """

    causality = Causality.CAUSAL_AT_EVALUATION
    balanced = True
    needs_all_experts = "a removed expert's tokens would be chosen by no other"
    decoding = "by a threshold per expert, learned in training"

    def __init__(
        self,
        sizes: Sizes,
        capacity_factor: Positive = 2.0,
        most_experts: Count | None = None,
        entropy: Positive = 0.01,
        iterations: Count = 100,
        evaluation: Literal["threshold", "tokens"] = "threshold",
        decay: LessThanOne = 0.99,
        losses: Sequence[RouterLoss] = (),
    ):
        if not 0 < capacity_factor <= sizes.num_experts:
            raise ValueError(
                f"ExpertChoice.capacity_factor={capacity_factor} must be above 0 and at most the "
                f"number of experts ({sizes.num_experts}): it is the mean of experts per token"
            )
        if most_experts is not None and most_experts < capacity_factor:
            raise ValueError(
                f"ExpertChoice.most_experts={most_experts} is below the mean of experts per token "
                f"(capacity_factor={capacity_factor}), so that no plan exists"
            )
        if not entropy > 0 or iterations < 1:
            raise ValueError(
                f"ExpertChoice.entropy={entropy} must be above 0, "
                f"ExpertChoice.iterations={iterations} at least 1"
            )
        if evaluation not in ("threshold", "tokens"):
            raise ValueError(f"ExpertChoice.evaluation={evaluation!r}: threshold or tokens")
        self.num_experts, self.losses = sizes.num_experts, tuple(losses)
        self.capacity_factor, self.most_experts = capacity_factor, most_experts
        self.entropy, self.iterations = entropy, iterations
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal(), role="router")
        by_threshold = evaluation == "threshold"
        self.thresholds = Thresholds(sizes.num_experts, decay) if by_threshold else None
        if not by_threshold:
            self.causality = Causality.NEVER
            self.decoding = 'not possible with evaluation="tokens"; "threshold" is'

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        score_GTE = jax.nn.softmax(logits_GTE)
        if self.thresholds is not None and not inputs.train:
            most = min(self.most_experts or self.num_experts, self.num_experts)
            decision = above_threshold(score_GTE, self.thresholds.threshold_E[...], most)
            return Routing(decision, logits_GTE, score_GTE)
        score_GET = jnp.swapaxes(score_GTE, 1, 2)
        preference_GET = jax.lax.stop_gradient(score_GET)
        if self.most_experts is not None:
            preference_GET = self._plan(preference_GET, inputs.valid_GT)
        token_GEC, keep_GEC = best_tokens(
            preference_GET, inputs.valid_GT, self.capacity_factor, self.num_experts
        )
        gate_GEC = jnp.where(keep_GEC, jnp.take_along_axis(score_GET, token_GEC, -1), 0)
        decision = ExpertChoice(token_GEC, gate_GEC, keep_GEC, inputs.valid_GT.shape[1])
        batch_sums = {}
        if self.thresholds is not None:
            batch_sums = self.thresholds.batch_sums(score_GTE, inputs.valid_GT, keep_GEC)
        return Routing(decision, logits_GTE, score_GTE, batch_sums=batch_sums)

    def _plan(self, score_GET, valid_GT):
        size = {"k": 1, "num_experts": self.num_experts, "factor": self.capacity_factor}
        slots_G = jnp.minimum(slots_for_valid(valid_GT, **size), valid_GT.sum(1))
        assert self.most_experts is not None
        return capped_plan(
            score_GET, valid_GT, slots_G, self.most_experts, self.entropy, self.iterations
        )


def best_tokens(
    preference_GET: Float[Array, "G E T"],
    valid_GT: Bool[Array, "G T"],
    factor: float,
    num_experts: int,
):
    """The ceil(factor * T / E) tokens that each expert prefers, best first, and which are kept.

    Returns token_GEC and keep_GEC. The number of kept slots is that of the group without padding.
    """
    size = {"k": 1, "num_experts": num_experts, "factor": factor}
    tokens = valid_GT.shape[1]
    slots = min(slots_per_expert(tokens, **size), tokens)
    valid_GET = jnp.where(valid_GT[:, None], preference_GET, -jnp.inf)
    _, token_GEC = jax.lax.top_k(valid_GET, slots)
    token_GEC = checkpoint_name(token_GEC, "routing")
    limit_G = jnp.minimum(slots_for_valid(valid_GT, **size), valid_GT.sum(1))
    keep_G1C = jnp.arange(slots)[None, None] < limit_G[:, None, None]
    return token_GEC, jnp.broadcast_to(keep_G1C, token_GEC.shape)


def above_threshold(
    score_GTE: Float[Array, "G T E"], threshold_E: Float[Array, " E"], most: int
) -> TokenChoice:
    """The choice of each token's `most` best experts, kept where the score reaches threshold_E."""
    expert_GTK = top_k(score_GTE, most)
    gate_GTK = jnp.take_along_axis(score_GTE, expert_GTK, -1)
    keep_GTK = jax.lax.stop_gradient(gate_GTK) >= threshold_E[expert_GTK]
    return TokenChoice(expert_GTK, gate_GTK, keep_GTK, score_GTE.shape[-1])


class Thresholds(StepState):
    """For each expert a running mean, over optimizer steps, of the lowest score that it takes."""

    def __init__(self, num_experts: int, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ExpertChoice.decay={decay} must lie in [0, 1)")
        self.decay = decay

        def start(key, shape, dtype):
            return jnp.full(shape, 1 / num_experts, dtype)

        self.threshold_E = router_state((num_experts,), jnp.float32, (None,), start)

    def batch_sums(
        self,
        score_GTE: Float[Array, "G T E"],
        valid_GT: Bool[Array, "G T"],
        keep_GEC: Bool[Array, "G E C"],
    ) -> dict[str, jax.Array]:
        """The lowest scores, summed over groups, and the number of groups with a token."""
        taken_G = keep_GEC[:, 0].sum(-1)
        lowest_GE = exceeded_by(jax.lax.stop_gradient(score_GTE), valid_GT, taken_G - 1)
        has_tokens_G = taken_G > 0
        return {
            "lowest": jnp.where(has_tokens_G[:, None], lowest_GE, 0).sum(0),
            "groups": has_tokens_G.sum(dtype=jnp.int32),
        }

    def update(self, stats: RouterStats) -> None:
        sums = stats.batch_sums["router"]
        groups = sums["groups"]
        mean_E = sums["lowest"] / jnp.maximum(groups, 1)
        old_E = self.threshold_E[...]
        new_E = self.decay * old_E + (1 - self.decay) * mean_E
        self.threshold_E[...] = jnp.where(groups > 0, new_E, old_E)
