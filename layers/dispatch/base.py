"""Dispatchers move tokens to experts and home again for a decision, and decide nothing.

`dispatch(x_GTD, decision)` gives x_EGCD, the rows of each expert; `combine(y_EGCD, decision)` gives
y_GTD, the gate-weighted sum of what came home. A TokenChoice must have been fitted by a capacity
policy, which gives every kept assignment its slot.

G groups, T tokens per group, D model width, E experts, K experts per token, C (or S) slots.
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from layers.kernels.grouped_matmul import SortedRows
from routing.records import Decision, ExpertChoice, ExpertMerge, SoftSlots, TokenChoice


class Dispatcher(abc.ABC):
    """Abstract: the two verbs. A dispatcher is a value without parameters."""

    needs_slots: ClassVar[bool] = True  # whether every kept assignment must have a slot

    def __str__(self) -> str:
        return type(self).__name__

    def split_overflow(self, decision: Decision) -> tuple[Decision, "Overflow | None"]:
        """What of the decision there is room for on the way, and what is to go another way."""
        return decision, None

    @abc.abstractmethod
    def dispatch(self, x_GTD: jax.Array, decision: Decision) -> jax.Array | SortedRows:
        """(E, G, C, D): what every expert receives; empty slots are zero. Or sorted rows."""

    @abc.abstractmethod
    def combine(self, y_EGCD: jax.Array, decision: Decision) -> jax.Array:
        """(G, T, D): for every token the gate-weighted sum of its experts' outputs."""


@dataclasses.dataclass(frozen=True)
class Overflow:
    """The rest of a decision, and the dispatcher that has room for it."""

    decision: TokenChoice
    dispatcher: Dispatcher


def as_soft_slots(decision: Decision) -> SoftSlots:
    """Any decision as dispatch (0 or 1) and combine weights over (T, E, C): the common form."""
    if isinstance(decision, SoftSlots):
        return decision
    if isinstance(decision, ExpertChoice):
        token_GECT = jax.nn.one_hot(decision.token_GEC, decision.num_tokens, dtype=bool)
        token_GECT = token_GECT & decision.keep_GEC[..., None]
        combine_GECT = token_GECT * decision.gate_GEC[..., None]
        to_GTEC = (0, 3, 1, 2)
        dispatch_GTEC = token_GECT.transpose(to_GTEC).astype(decision.gate_GEC.dtype)
        return SoftSlots(dispatch_GTEC, combine_GECT.transpose(to_GTEC))
    if isinstance(decision, ExpertMerge):
        raise ValueError("an ExpertMerge moves no tokens: there is nothing to dispatch")
    slot_GTK, capacity = fitted(decision)
    dtype = decision.gate_GTK.dtype
    expert_GTKE = jax.nn.one_hot(decision.expert_GTK, decision.num_experts, dtype=bool)
    expert_GTKE = (expert_GTKE & decision.keep_GTK[..., None]).astype(dtype)
    slot_GTKC = jax.nn.one_hot(slot_GTK, capacity, dtype=dtype)
    dispatch_GTEC = jnp.einsum("gtke,gtkc->gtec", expert_GTKE, slot_GTKC)
    gated_GTKE = expert_GTKE * decision.gate_GTK[..., None]
    return SoftSlots(dispatch_GTEC, jnp.einsum("gtke,gtkc->gtec", gated_GTKE, slot_GTKC))


def fitted(decision: TokenChoice) -> tuple[jax.Array, int]:
    """slot_GTK and the number of slots; raise ValueError without a capacity policy's work."""
    if decision.slot_GTK is None or decision.capacity is None:
        raise ValueError("a TokenChoice needs slots: pass it through Capacity(...).fit first")
    return decision.slot_GTK, decision.capacity
