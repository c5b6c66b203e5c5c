"""Dispatchers move tokens to experts and back, as a decision says; they decide nothing.

`dispatch(x_GTD, decision)` returns the rows of each expert, by slot (E, G, C, D) or as
`SortedRows`; `combine(expert_rows, decision)` returns y_GTD, for every token the gate-weighted sum
of its experts' outputs. A dispatcher with slots takes a TokenChoice that a capacity policy has
fitted, so that every kept assignment has its slot.

G groups, T tokens per group, D model width, E experts, K experts per token, C (or S) slots.
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.kernels.grouped_matmul import SortedRows
from routing.records import Decision, ExpertChoice, ExpertMerge, SoftSlots, TokenChoice


class Dispatcher(abc.ABC):
    """Abstract: `dispatch` and `combine`. A dispatcher is a value without parameters."""

    needs_slots: ClassVar[bool] = True  # whether every kept assignment must have a slot

    def __str__(self) -> str:
        return type(self).__name__

    def split_overflow(self, decision: Decision) -> tuple[Decision, "Overflow | None"]:
        """Split into assignments that fit the all-to-all send buffer and those that overflow it."""
        return decision, None

    @abc.abstractmethod
    def dispatch(self, x_GTD: Float[Array, "G T D"], decision: Decision) -> jax.Array | SortedRows:
        """Each expert's rows: (E, G, C, D) with zeros in empty slots, or `SortedRows`."""

    @abc.abstractmethod
    def combine(self, expert_rows: jax.Array, decision: Decision) -> jax.Array:
        """(G, T, D): for every token the gate-weighted sum of its experts' outputs.

        expert_rows: the outputs for the rows of `dispatch`: (E, G, C, D), or (P, N, D) for
            `SortedRows`, which are multiplied by `combine_PN` already.
        """


@dataclasses.dataclass(frozen=True)
class Overflow:
    """The assignments that overflow a send buffer, and a dispatcher that has room for them."""

    decision: TokenChoice
    dispatcher: Dispatcher


def as_soft_slots(decision: Decision) -> SoftSlots:
    """A decision as dispatch weights (0 or 1) and combine weights, both (G, T, E, C)."""
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
    """slot_GTK and the slots per expert; raise ValueError where no capacity policy has set them."""
    if decision.slot_GTK is None or decision.capacity is None:
        raise ValueError("a TokenChoice needs slots: pass it through Capacity(...).fit first")
    return decision.slot_GTK, decision.capacity
