"""Default vectors: a running mean stands in for experts that were not chosen.

G groups, T tokens per group, D model width, E experts, C slots per expert.
"""

import gin
import jax
import jax.numpy as jnp

from layers.experts.base import Companion, LayerSizes, Routed
from routing.balancers import StepState
from routing.parameters import router_state, zeros
from routing.ranges import LessThanOne
from routing.records import RouterStats, TokenChoice


@gin.configurable
class DefaultVectors(Companion, StepState):
    """Experts that were not chosen contribute their mean output (Default MoE, Panda et al. 2025).

    The mean runs over optimizer steps and has no gradient; because of it the scores of all experts
    get a gradient. Needs `TopK.keep_rest`.

    Args:
        sizes: of the layer.
        decay: of the running mean.
    """

    name = "default_vectors"
    needs_slots = True

    def __init__(self, sizes: LayerSizes, decay: LessThanOne = 0.9):
        if not 0 <= decay < 1:
            raise ValueError(f"DefaultVectors.decay={decay} must lie in [0, 1)")
        self.decay = decay
        shape, axes = (sizes.num_experts, sizes.d_model), (None, "embed")
        self.mean_ED = router_state(shape, jnp.float32, axes, zeros)

    def __call__(self, routed: Routed) -> jax.Array:
        """(G, T, D): the mean outputs of the experts that were not chosen, weighted."""
        decision = routed.decision
        if not isinstance(decision, TokenChoice) or decision.unchosen_gate_GTE is None:
            raise ValueError(
                "DefaultVectors need the gates of experts that were not chosen: use TopK with "
                "keep_rest=True"
            )
        dtype = routed.x_GTD.dtype
        weight_GTE = decision.unchosen_gate_GTE.astype(dtype)
        return jnp.einsum("gte,ed->gtd", weight_GTE, self.mean_ED[...].astype(dtype))

    def batch_sums(self, routed: Routed) -> dict[str, jax.Array]:
        """Outputs summed over slots; empty slots add zero, since experts have no bias."""
        assert routed.y_EGCD is not None
        y_EGCD = jax.lax.stop_gradient(routed.y_EGCD).astype(jnp.float32)
        return {"expert_output": y_EGCD.sum((1, 2))}

    def update(self, stats: RouterStats) -> None:
        count_E1 = stats.kept_E[:, None]
        sum_ED = stats.batch_sums[f"companion/{self.name}"]["expert_output"]
        found_ED = sum_ED / jnp.maximum(count_E1, 1)
        old_ED = self.mean_ED[...]
        new_ED = self.decay * old_ED + (1 - self.decay) * found_ED
        self.mean_ED[...] = jnp.where(count_E1 > 0, new_ED, old_ED)
