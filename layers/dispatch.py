"""Dispatchers move tokens to experts and home again for a decision, and decide nothing.

`dispatch(x_GTD, decision)` gives x_EGCD, the rows of each expert; `combine(y_EGCD, decision)` gives
y_GTD, the gate-weighted sum of what came home. A TokenChoice must have been fitted by a capacity
policy, which gives every kept assignment its slot.

G groups, T tokens per group, D model width, E experts, K experts per token, C (or S) slots.
"""

import abc
import dataclasses
from typing import ClassVar, Literal

import gin
import jax
import jax.numpy as jnp

from layers.constrain import batch_parts, constrain, platform
from layers.gather_rows import combine_rows, dispatch_rows, sum_by_token
from layers.grouped import KERNELS, SortedRows, spare_rows
from routing.records import Decision, ExpertChoice, ExpertMerge, SoftSlots, TokenChoice


class Dispatcher(abc.ABC):
    """Abstract: the two verbs. A dispatcher is a value without parameters."""

    # Whether a TokenChoice must have a slot for every assignment, and whether experts have to be
    # whole on every device of a mesh.
    needs_slots: ClassVar[bool] = True
    whole_experts: ClassVar[bool] = False

    def __str__(self) -> str:
        return type(self).__name__

    @abc.abstractmethod
    def dispatch(self, x_GTD: jax.Array, decision: Decision) -> jax.Array | SortedRows:
        """(E, G, C, D): what every expert receives; empty slots are zero. Or sorted rows."""

    @abc.abstractmethod
    def combine(self, y_EGCD: jax.Array, decision: Decision) -> jax.Array:
        """(G, T, D): for every token the gate-weighted sum of its experts' outputs."""


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


@gin.configurable
@dataclasses.dataclass(frozen=True)
class OneHotEinsum(Dispatcher):
    """The reference: dense one-hot einsums, O(T E C D); what a compiler partitions best."""

    def dispatch(self, x_GTD, decision) -> jax.Array:
        weight_GTEC = as_soft_slots(decision).dispatch_GTES.astype(x_GTD.dtype)
        x_EGCD = jnp.einsum("gtec,gtd->egcd", weight_GTEC, x_GTD)
        # Computed where the tokens are, then one all-to-all to where the experts are.
        x_EGCD = constrain(x_EGCD, None, "batch", None, None)
        return constrain(x_EGCD, "expert", "expert_group", None, None)

    def combine(self, y_EGCD, decision) -> jax.Array:
        y_EGCD = constrain(y_EGCD, "expert", "expert_group", None, None)
        y_EGCD = constrain(y_EGCD, None, "batch", None, None)
        weight_GTEC = as_soft_slots(decision).combine_GTES.astype(y_EGCD.dtype)
        return jnp.einsum("gtec,egcd->gtd", weight_GTEC, y_EGCD)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class SlotGather(Dispatcher):
    """Gather rows into slots and back, O(E C D); soft slots are dense and go by einsum."""

    def dispatch(self, x_GTD, decision) -> jax.Array:
        if isinstance(decision, SoftSlots | ExpertMerge):
            return OneHotEinsum().dispatch(x_GTD, decision)
        if isinstance(decision, ExpertChoice):
            token_GEC = jnp.where(decision.keep_GEC, decision.token_GEC, -1)
            x_EGCD = dispatch_rows(x_GTD, token_GEC, None)
        else:
            source_GEC, home_GTK = _addresses(decision)
            token_GEC = jnp.where(source_GEC < 0, -1, source_GEC // home_GTK.shape[2])
            x_EGCD = dispatch_rows(x_GTD, token_GEC, home_GTK)
        x_EGCD = constrain(x_EGCD, None, "batch", None, None)
        return constrain(x_EGCD, "expert", "expert_group", None, None)

    def combine(self, y_EGCD, decision) -> jax.Array:
        if isinstance(decision, SoftSlots | ExpertMerge):
            return OneHotEinsum().combine(y_EGCD, decision)
        y_EGCD = constrain(y_EGCD, "expert", "expert_group", None, None)
        y_EGCD = constrain(y_EGCD, None, "batch", None, None)
        if isinstance(decision, ExpertChoice):
            gate_EGC = jnp.swapaxes(decision.gate_GEC, 0, 1).astype(y_EGCD.dtype)
            token_GEC = jnp.where(decision.keep_GEC, decision.token_GEC, -1)
            return sum_by_token(y_EGCD * gate_EGC[..., None], token_GEC, decision.num_tokens)
        source_GEC, home_GTK = _addresses(decision)
        gate_GTK = decision.gate_GTK.astype(y_EGCD.dtype)
        return combine_rows(y_EGCD, gate_GTK, source_GEC, home_GTK)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Sorted(Dispatcher):
    """Assignments sorted by expert: no slots, so nothing is padded and nothing need be dropped.

    Choices of experts and soft slots, which leave no slot empty, go by `SlotGather`. On a mesh
    every device sorts its own tokens and holds all experts.

    Attributes:
        kernel: what multiplies the rows with their experts' weights: "loop" over blocks (CPU),
            "ragged_dot" (one operation of the compiler: TPU, GPU), "auto" for the platform's.
    """

    kernel: Literal["auto", "loop", "ragged_dot"] = "auto"
    needs_slots: ClassVar[bool] = False
    whole_experts: ClassVar[bool] = True

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise ValueError(f"Sorted.kernel={self.kernel!r}: one of {', '.join(KERNELS)}")

    def __str__(self) -> str:
        return f"Sorted ({self.chosen_kernel})"

    @property
    def chosen_kernel(self) -> str:
        """What "auto" stands for here."""
        if self.kernel != "auto":
            return self.kernel
        return "loop" if platform() == "cpu" else "ragged_dot"

    def dispatch(self, x_GTD, decision) -> jax.Array | SortedRows:
        if not isinstance(decision, TokenChoice):
            return SlotGather().dispatch(x_GTD, decision)
        source_PN, home_PTK, count_PE = _sorted_addresses(decision)
        x_PTD = x_GTD.reshape(len(source_PN), -1, x_GTD.shape[-1])
        token_PN = jnp.where(source_PN < 0, -1, source_PN // home_PTK.shape[2])
        x_1PND = dispatch_rows(x_PTD, token_PN[:, None], home_PTK)
        x_PND = constrain(x_1PND[0], "batch", None, None)
        return SortedRows(x_PND, count_PE, self.chosen_kernel)

    def combine(self, y_EGCD, decision) -> jax.Array:
        if not isinstance(decision, TokenChoice):
            return SlotGather().combine(y_EGCD, decision)
        source_PN, home_PTK, _ = _sorted_addresses(decision)
        y_PND = constrain(y_EGCD, "batch", None, None)
        gate_PTK = decision.gate_GTK.astype(y_PND.dtype).reshape(home_PTK.shape)
        y_PTD = combine_rows(y_PND[None], gate_PTK, source_PN[:, None], home_PTK)
        return y_PTD.reshape(*decision.expert_GTK.shape[:2], -1)


def _sorted_addresses(decision: TokenChoice) -> tuple[jax.Array, jax.Array, jax.Array]:
    """source_PN: which assignment t*K+k lies in a row; home_PTK: its row; -1 for none; count_PE.

    P parts of the mesh's batch, each with its groups' tokens in a row. Assignments lie by expert,
    then in their order; those that are not kept come last and count for nobody.
    """
    groups, tokens, k = decision.expert_GTK.shape
    parts, experts = batch_parts(groups), decision.num_experts
    kept_GTK = jnp.where(decision.keep_GTK, decision.expert_GTK, experts)
    expert_PN = constrain(kept_GTK.reshape(parts, -1), "batch", None)
    rows = expert_PN.shape[1]
    place_PN = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), expert_PN.shape)
    sorted_PN, source_PN = jax.lax.sort((expert_PN, place_PN), dimension=1, num_keys=1)
    edge_PX = jax.vmap(lambda s: jnp.searchsorted(s, jnp.arange(experts + 1)))(sorted_PN)
    count_PE = jnp.diff(edge_PX, axis=1).astype(jnp.int32)
    # Sorting the sources gives every assignment its row, as writing the rows there would.
    _, home_PN = jax.lax.sort((source_PN, place_PN), dimension=1, num_keys=1)
    source_PN = jnp.where(sorted_PN < experts, source_PN, -1)
    source_PN = jnp.pad(source_PN, ((0, 0), (0, spare_rows(rows))), constant_values=-1)
    home_PTK = home_PN.reshape(parts, groups * tokens // parts, k)
    return source_PN, jnp.where(decision.keep_GTK.reshape(home_PTK.shape), home_PTK, -1), count_PE


def _addresses(decision: TokenChoice) -> tuple[jax.Array, jax.Array]:
    """source_GEC: which assignment t*K+k fills a slot; home_GTK: its slot e*C+c; -1 for none."""
    slot_GTK, capacity = fitted(decision)
    groups, tokens, k = slot_GTK.shape
    slots = decision.num_experts * capacity
    home_GTK = decision.expert_GTK * capacity + slot_GTK
    number_N = jnp.arange(tokens * k, dtype=jnp.int32)

    def invert(home_N, keep_N):
        # Slots are distinct, so the order of the writes does not matter.
        spread_N = jnp.where(keep_N, home_N, slots)
        return jnp.full(slots, -1, jnp.int32).at[spread_N].set(number_N, mode="drop")

    keep_GTK = decision.keep_GTK
    source_GN = jax.vmap(invert)(home_GTK.reshape(groups, -1), keep_GTK.reshape(groups, -1))
    source_GEC = source_GN.reshape(groups, decision.num_experts, capacity)
    return source_GEC, jnp.where(keep_GTK, home_GTK, -1)
