"""The reference dispatcher: dense one-hot einsums.

G groups, T tokens per group, D model width, E experts, K experts per token, C slots.
"""

import dataclasses

import gin
import jax
import jax.numpy as jnp

from layers.constrain import constrain
from layers.dispatch.base import Dispatcher, as_soft_slots


@gin.configurable
@dataclasses.dataclass(frozen=True)
class OneHotEinsum(Dispatcher):
    """The reference: dense one-hot einsums, O(T E C D); what a compiler partitions best."""

    def dispatch(self, x_GTD, decision) -> jax.Array:
        weight_GTEC = as_soft_slots(decision).dispatch_GTES.astype(x_GTD.dtype)
        x_EGCD = jnp.einsum("gtec,gtd->egcd", weight_GTEC, x_GTD)
        # Computed where the tokens are, then one all-to-all to where the experts are.
        x_EGCD = constrain(x_EGCD, None, "batch", "slot", None)
        return constrain(x_EGCD, "expert", "expert_group", "slot", None)

    def combine(self, y_EGCD, decision) -> jax.Array:
        y_EGCD = constrain(y_EGCD, "expert", "expert_group", "slot", None)
        y_EGCD = constrain(y_EGCD, None, "batch", "slot", None)
        weight_GTEC = as_soft_slots(decision).combine_GTES.astype(y_EGCD.dtype)
        return jnp.einsum("gtec,egcd->gtd", weight_GTEC, y_EGCD)
