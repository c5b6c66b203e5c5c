"""A dispatcher that gathers rows into the slots of a capacity policy.

G groups, T tokens per group, D model width, E experts, K experts per token, C slots.
"""

import dataclasses

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.dispatch.base import Dispatcher, fitted
from layers.dispatch.gather_rows import combine_rows, dispatch_rows, sum_by_token
from layers.dispatch.one_hot import OneHotEinsum
from layers.logical_axes import logical_constraint
from routing.records import ExpertChoice, ExpertMerge, SoftSlots, TokenChoice


@gin.configurable
@dataclasses.dataclass(frozen=True)
class SlotGather(Dispatcher):
    """Gather rows into slots and back, O(E C D); soft slots, which are dense, take an einsum."""

    def dispatch(self, x_GTD: Float[Array, "G T D"], decision) -> jax.Array:
        if isinstance(decision, SoftSlots | ExpertMerge):
            return OneHotEinsum().dispatch(x_GTD, decision)
        if isinstance(decision, ExpertChoice):
            token_GEC = jnp.where(decision.keep_GEC, decision.token_GEC, -1)
            x_EGCD = dispatch_rows(x_GTD, token_GEC, None)
        else:
            source_GEC, destination_GTK = _addresses(decision)
            token_GEC = jnp.where(source_GEC < 0, -1, source_GEC // destination_GTK.shape[2])
            x_EGCD = dispatch_rows(x_GTD, token_GEC, destination_GTK)
        x_EGCD = logical_constraint(x_EGCD, None, "batch", "slot", None)
        return logical_constraint(x_EGCD, "expert", "expert_group", "slot", None)

    def combine(self, expert_rows, decision) -> jax.Array:
        if isinstance(decision, SoftSlots | ExpertMerge):
            return OneHotEinsum().combine(expert_rows, decision)
        y_EGCD = logical_constraint(expert_rows, "expert", "expert_group", "slot", None)
        y_EGCD = logical_constraint(y_EGCD, None, "batch", "slot", None)
        if isinstance(decision, ExpertChoice):
            gate_EGC = jnp.swapaxes(decision.gate_GEC, 0, 1).astype(y_EGCD.dtype)
            token_GEC = jnp.where(decision.keep_GEC, decision.token_GEC, -1)
            return sum_by_token(y_EGCD * gate_EGC[..., None], token_GEC, decision.num_tokens)
        source_GEC, destination_GTK = _addresses(decision)
        gate_GTK = decision.gate_GTK.astype(y_EGCD.dtype)
        return combine_rows(y_EGCD, gate_GTK, source_GEC, destination_GTK)


def _addresses(decision: TokenChoice) -> tuple[jax.Array, jax.Array]:
    """source_GEC: the assignment t*K+k in each slot; destination_GTK: its slot e*C+c; -1: none."""
    slot_GTK, capacity = fitted(decision)
    groups, tokens, k = slot_GTK.shape
    slots = decision.num_experts * capacity
    destination_GTK = decision.expert_GTK * capacity + slot_GTK
    number_N = jnp.arange(tokens * k, dtype=jnp.int32)

    def invert(destination_N, keep_N):
        # Slots are distinct, so the order of the writes does not matter.
        spread_N = jnp.where(keep_N, destination_N, slots)
        return jnp.full(slots, -1, jnp.int32).at[spread_N].set(number_N, mode="drop")

    keep_GTK = decision.keep_GTK
    source_GN = jax.vmap(invert)(destination_GTK.reshape(groups, -1), keep_GTK.reshape(groups, -1))
    source_GEC = source_GN.reshape(groups, decision.num_experts, capacity)
    return source_GEC, jnp.where(keep_GTK, destination_GTK, -1)
