"""Expert choice: each expert takes its C best tokens (Zhou et al. 2022, section 3.2).

G groups, T tokens per group, D model width, E experts, C slots per expert.
"""

from collections.abc import Sequence

import gin
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from routing.capacity import slots_for_valid, slots_per_expert
from routing.losses import RouterLoss
from routing.parameters import parameter, truncated_normal
from routing.records import Causality, ExpertChoice, RouterInputs, Routing, Sizes
from routing.router import Router


@gin.configurable("ExpertChoice", module="routing")  # pyright: ignore[reportCallIssue]
class ExpertChoiceRouter(Router):
    """Scores are a softmax over experts; each expert takes the C tokens with the largest ones.

    Args:
        sizes: width, number of experts, vocabulary.
        capacity_factor: experts per token on average; C = ceil(capacity_factor * T / E).
        losses: none are needed, the load is balanced by construction.
    """

    causality = Causality.NEVER
    balanced = True
    decoding = "not possible: an expert's choice depends on the whole sequence"

    def __init__(
        self, sizes: Sizes, capacity_factor: float = 2.0, losses: Sequence[RouterLoss] = ()
    ):
        if not 0 < capacity_factor <= sizes.num_experts:
            raise ValueError(
                f"ExpertChoice.capacity_factor={capacity_factor} must be above 0 and at most the "
                f"number of experts ({sizes.num_experts}): it is the mean of experts per token"
            )
        self.num_experts, self.losses = sizes.num_experts, tuple(losses)
        self.capacity_factor = capacity_factor
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal())

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        score_GTE = jax.nn.softmax(logits_GTE)
        score_GET = jnp.swapaxes(score_GTE, 1, 2)
        size = {"k": 1, "num_experts": self.num_experts, "factor": self.capacity_factor}
        tokens = inputs.valid_GT.shape[1]
        slots = min(slots_per_expert(tokens, **size), tokens)
        real_GET = jnp.where(inputs.valid_GT[:, None], jax.lax.stop_gradient(score_GET), -1.0)
        _, token_GEC = jax.lax.top_k(real_GET, slots)
        token_GEC = checkpoint_name(token_GEC, "routing")
        # Slots are in order of score: the first so many stand, as if there were no padding.
        limit_G = slots_for_valid(inputs.valid_GT, **size)
        limit_G = jnp.minimum(limit_G, inputs.valid_GT.sum(1))
        keep_GEC = jnp.broadcast_to(
            jnp.arange(slots)[None, None] < limit_G[:, None, None], token_GEC.shape
        )
        gate_GEC = jnp.where(keep_GEC, jnp.take_along_axis(score_GET, token_GEC, -1), 0)
        return Routing(ExpertChoice(token_GEC, gate_GEC, keep_GEC, tokens), logits_GTE, score_GTE)
