"""The reference dispatcher: dense one-hot einsums.

G groups, T tokens per group, D model width, E experts, K experts per token, C slots.
"""

import dataclasses

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.dispatch.base import Dispatcher, as_soft_slots
from layers.logical_axes import logical_constraint


@gin.configurable
@dataclasses.dataclass(frozen=True)
class OneHotEinsum(Dispatcher):
    """The reference: dense one-hot einsums, O(T E C D), which compilers partition best."""

    def dispatch(self, x_GTD: Float[Array, "G T D"], decision) -> jax.Array:
        weight_GTEC = as_soft_slots(decision).dispatch_GTES.astype(x_GTD.dtype)
        x_EGCD = jnp.einsum("gtec,gtd->egcd", weight_GTEC, x_GTD)
        # Computed on the tokens' devices; then one all-to-all sends slots to the experts' devices.
        x_EGCD = logical_constraint(x_EGCD, None, "batch", "slot", None)
        return logical_constraint(x_EGCD, "expert", "expert_group", "slot", None)

    def combine(self, expert_rows, decision) -> jax.Array:
        y_EGCD = logical_constraint(expert_rows, "expert", "expert_group", "slot", None)
        y_EGCD = logical_constraint(y_EGCD, None, "batch", "slot", None)
        weight_GTEC = as_soft_slots(decision).combine_GTES.astype(y_EGCD.dtype)
        return jnp.einsum("gtec,egcd->gtd", weight_GTEC, y_EGCD)
