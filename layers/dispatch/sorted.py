"""A dispatcher that sorts assignments by expert: no slots, no padding, nothing dropped.

G groups, T tokens per group, D model width, E experts, K experts per token; P shards of a mesh, N
rows of one.
"""

import dataclasses
import importlib.util
import math
from typing import ClassVar, Literal, NamedTuple

import gin
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.dispatch.all_to_all import EXCHANGES, ExchangeKind, to_experts, to_tokens
from layers.dispatch.base import Dispatcher, Overflow
from layers.dispatch.gather_rows import collect_rows, dispatch_rows, permute_numbers
from layers.dispatch.slot_gather import SlotGather
from layers.kernels.grouped_matmul import KERNELS, SortedRows, choose, row_multiple, spare_rows
from layers.kernels.row_blocks import aligned_starts
from layers.logical_axes import (
    Shards,
    logical_constraint,
    mesh_axes,
    per_shard,
    platform,
    shards_of,
)
from routing.ranges import Positive
from routing.records import Decision, TokenChoice


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Sorted(Dispatcher):
    """Assignments sorted by expert: no slots, so nothing is padded and nothing need be dropped.

    Expert choice and soft slots, which leave no slot empty, are left to `SlotGather`. On a mesh
    every device sorts its own tokens; along an expert axis one all-to-all sends the rows to the
    devices that hold their experts, a small one their gates, and another brings the outputs back.

    Attributes:
        kernel: what multiplies the rows with their experts' weights: "loop" over blocks (CPU),
            "hopper" (our kernels for NVIDIA's Hopper cards, in bfloat16), "slot_blocks" (batched
            over equal slots, then blocks of what overflows: other GPUs), "ragged_dot" (one
            operation of the compiler: TPU), "tokamax" (that package's kernels, on one TPU or GPU),
            "auto" for the platform's.
        exchange: the all-to-all: "padded" to the same size for every pair of devices, "ragged"
            (moves full rows alone; TPU, GPU), "auto" for the platform's.
        buffer: the size of a device's receive buffer, as a multiple of the rows that it receives
            on average; each sender may fill an equal share. None: room for all rows of all devices,
            so that none overflows.
        overflow: "drop" assignments that overflow the buffer (they count as dropped; it happens
            sooner on more devices, and at evaluation depends on the sequences before in the
            batch), or "exact": compute them after a second exchange without a bound, which runs
            only where something overflows.
    """

    kernel: Literal["auto", "loop", "hopper", "slot_blocks", "ragged_dot", "tokamax"] = "auto"
    exchange: ExchangeKind = "auto"
    buffer: Positive | None = None
    overflow: Literal["drop", "exact"] = "exact"
    needs_slots: ClassVar[bool] = False

    def __post_init__(self):
        choices = {"kernel": KERNELS, "exchange": EXCHANGES, "overflow": ("drop", "exact")}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"Sorted.{name}={value!r}: one of {', '.join(known)}")
        if self.kernel == "tokamax" and not importlib.util.find_spec("tokamax"):
            raise ValueError(
                'Sorted.kernel="tokamax" needs a package that is not installed: '
                "pip install 'moe-routing[tokamax]'"
            )
        if self.buffer is not None and self.buffer <= 0:
            raise ValueError(f"Sorted.buffer={self.buffer} must be above 0, or None for all rows")

    def __str__(self) -> str:
        more = "" if self.buffer is None else f", buffer {self.buffer:g}, {self.overflow}"
        # On a GPU "auto" depends on the rows' type and width.
        known = self.kernel != "auto" or platform() == "gpu"
        kernel = self.kernel if known else choose("auto", jnp.float32, 0).kernel
        return f"Sorted ({kernel}{more})"

    def most_rows(self, rows: int, devices: int) -> int:
        """The most of its rows that a device sends to each of the devices that hold experts."""
        if self.buffer is None:
            return rows
        return min(rows, math.ceil(self.buffer * rows / devices))

    def split_overflow(self, decision) -> tuple[Decision, Overflow | None]:
        """Split off the assignments beyond the first `most_rows` from one device to another."""
        if not isinstance(decision, TokenChoice) or self.buffer is None:
            return decision, None
        expert_axis = _expert_axis(decision)
        if expert_axis is None:
            return decision, None
        groups, tokens, k = decision.expert_GTK.shape
        shards = shards_of(groups, tokens)
        devices = expert_axis.devices
        device_GTK = decision.expert_GTK // (decision.num_experts // devices)
        device_GTK = jnp.where(decision.keep_GTK, device_GTK, devices)
        device_PN = shards.split(device_GTK).reshape(shards.count, -1)
        _, destination_PN, edges = _sorted_into(device_PN, devices, shards)
        rank_PN = destination_PN - jnp.take_along_axis(edges, device_PN, axis=1)
        fits_PN = rank_PN < self.most_rows(destination_PN.shape[1], devices)
        fits_GTK = shards.merge(fits_PN.reshape(shards.count, -1, k), groups)
        keep_GTK = decision.keep_GTK
        within = dataclasses.replace(decision, keep_GTK=keep_GTK & fits_GTK)
        if self.overflow == "drop":
            return within, None
        beyond = dataclasses.replace(decision, keep_GTK=keep_GTK & ~fits_GTK)
        return within, Overflow(beyond, dataclasses.replace(self, buffer=None))

    def dispatch(self, x_GTD: Float[Array, "G T D"], decision) -> jax.Array | SortedRows:
        if not isinstance(decision, TokenChoice):
            return SlotGather().dispatch(x_GTD, decision)
        shards = shards_of(*x_GTD.shape[:2])
        kernel = choose(self.kernel, x_GTD.dtype, x_GTD.shape[-1]).kernel
        source_PN, destination_PTK, count_PE = _sorted_addresses(decision, shards)
        x_PTD = shards.split(x_GTD)
        expert_axis = _expert_axis(decision)
        if expert_axis is None:
            source_PN, destination_PTK = _for_kernel(
                kernel, source_PN, destination_PTK, count_PE, decision
            )
        x_1PND = dispatch_rows(x_PTD, _tokens(source_PN, destination_PTK), destination_PTK)
        x_PND = logical_constraint(x_1PND[0], shards.axis, None, None)
        gate_PA = shards.split(decision.gate_GTK).reshape(shards.count, -1).astype(jnp.float32)
        destination_PA = destination_PTK.reshape(gate_PA.shape)
        combine_PN = jax.vmap(permute_numbers)(gate_PA, source_PN, destination_PA)
        combine_PN = logical_constraint(combine_PN, shards.axis, None)
        if expert_axis is None:
            return SortedRows(x_PND, combine_PN, count_PE, kernel, shard_axis=shards.axis)

        slots = self.most_rows(x_PND.shape[1], expert_axis.devices)

        def send(x_1ND, combine_1N, count_1E):
            own = x_1ND[0], combine_1N[0], count_1E[0]
            sent = to_experts(*own, expert_axis.name, slots, self._ragged, kernel)
            return tuple(a[None] for a in sent)

        split = x_PND, combine_PN, count_PE
        rows_PMD, combine_PM, count_PX = per_shard(send, split, shard_axis=shards.axis)
        rows_PMD, combine_PM = (checkpoint_name(a, "exchanged") for a in (rows_PMD, combine_PM))
        return SortedRows(rows_PMD, combine_PM, count_PX, kernel, True, shards.axis)

    def combine(self, expert_rows, decision) -> jax.Array:
        if not isinstance(decision, TokenChoice):
            return SlotGather().combine(expert_rows, decision)
        groups, tokens, k = decision.expert_GTK.shape
        shards = shards_of(groups, tokens)
        kernel = choose(self.kernel, expert_rows.dtype, expert_rows.shape[-1]).kernel
        source_PN, destination_PTK, count_PE = _sorted_addresses(decision, shards)
        y_PND = logical_constraint(expert_rows, shards.axis, None, None)
        expert_axis = _expert_axis(decision)
        if expert_axis is None:
            source_PN, destination_PTK = _for_kernel(
                kernel, source_PN, destination_PTK, count_PE, decision
            )
        else:
            rows = source_PN.shape[1]
            slots = self.most_rows(rows, expert_axis.devices)

            def bring_back(y_1MD, count_1E):
                axis, ragged = expert_axis.name, self._ragged
                return to_tokens(y_1MD[0], count_1E[0], axis, slots, rows, ragged, kernel)[None]

            y_PND = per_shard(bring_back, (y_PND, count_PE), shard_axis=shards.axis)
        token_P1N = _tokens(source_PN, destination_PTK)
        return shards.merge(collect_rows(y_PND[None], token_P1N, destination_PTK), groups)

    @property
    def _ragged(self) -> bool:
        """Whether devices exchange rows without padding."""
        return self.exchange == "ragged" or (self.exchange == "auto" and platform() != "cpu")


class _ExpertAxis(NamedTuple):
    name: str
    devices: int


def _expert_axis(decision: TokenChoice) -> _ExpertAxis | None:
    """The mesh axis that experts and groups are both sharded over; None where no row travels."""
    held = mesh_axes("expert", decision.num_experts)
    shared = held.keys() & mesh_axes("batch", len(decision.expert_GTK)).keys()
    if not shared:
        return None
    (axis,) = shared
    return _ExpertAxis(axis, held[axis])


def _sorted_addresses(
    decision: TokenChoice, shards: Shards
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sort the assignments of every shard by expert; those that are not kept come last.

    Returns source_PN, the assignment t*K+k of each row; destination_PTK, the row of each assignment
    (both -1 for none); and count_PE, the rows of each expert. T tokens of a shard.
    """
    experts = decision.num_experts
    kept_PTK = shards.split(jnp.where(decision.keep_GTK, decision.expert_GTK, experts))
    expert_PN = kept_PTK.reshape(shards.count, -1)
    source_PN, destination_PN, edges = _sorted_into(expert_PN, experts, shards)
    count_PE = jnp.diff(edges, axis=1).astype(jnp.int32)
    row_1N = jnp.arange(source_PN.shape[1])[None]
    source_PN = jnp.where(row_1N < edges[:, -1:], source_PN, -1)
    destination_PTK = destination_PN.reshape(kept_PTK.shape)
    return source_PN, jnp.where(kept_PTK < experts, destination_PTK, -1), count_PE


def _tokens(source_PN: Int[Array, "P N"], destination_PTK: Int[Array, "P T K"]) -> jax.Array:
    """(P, 1, N): the token of each row's assignment; -1 for none."""
    return jnp.where(source_PN < 0, -1, source_PN // destination_PTK.shape[2])[:, None]


def _for_kernel(kernel: str, source_PN, destination_PTK, count_PE, decision: TokenChoice):
    """The addresses with the rows that the kernel needs: each expert's where it wants them begin.

    Returns source_PM and destination_PTK, of rows M of which `spare_rows` are empty.
    """
    experts = decision.num_experts
    spare = spare_rows(source_PN.shape[1], experts, kernel)
    multiple = row_multiple(kernel)
    if multiple == 1:
        return jnp.pad(source_PN, ((0, 0), (0, spare)), constant_values=-1), destination_PTK
    begin_PE = jnp.cumsum(count_PE, axis=1) - count_PE
    start_PE = aligned_starts(count_PE, multiple)
    row_M = jnp.arange(source_PN.shape[1] + spare)

    def place(source_N, destination_TK, count_E, begin_E, start_E):
        end_E = start_E + count_E
        expert_M = jnp.searchsorted(start_E, row_M, side="right", method="sort") - 1
        old_M = row_M - (start_E - begin_E)[expert_M]
        source_M = source_N.at[old_M].get(mode="clip")
        source_M = jnp.where(row_M < end_E[expert_M], source_M, -1)
        old_E = begin_E + count_E
        expert_TK = jnp.searchsorted(old_E, destination_TK, side="right", method="compare_all")
        return source_M, destination_TK + (start_E - begin_E)[jnp.minimum(expert_TK, experts - 1)]

    source_PM, moved_PTK = jax.vmap(place)(source_PN, destination_PTK, count_PE, begin_PE, start_PE)
    moved_PTK = jnp.where(destination_PTK < 0, -1, moved_PTK)
    return checkpoint_name(source_PM, "routing"), checkpoint_name(moved_PTK, "routing")


def _sorted_into(
    bin_PN: Int[Array, "P N"], bins: int, shards: Shards
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sort every shard's rows by bin, stably; a bin_PN of `bins` stands for none and comes last.

    Returns source_PN, the row in each place; destination_PN, its inverse; and edges (P, bins + 1),
    where each bin begins, with the end of the last one.
    """
    bin_PN = logical_constraint(bin_PN, shards.axis, None)
    rows = bin_PN.shape[1]
    place_PN = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), bin_PN.shape)
    if (bins + 1) * rows < 2**31:  # bin and place in one number sort in a quarter of the time
        bin_PN = bin_PN.astype(jnp.int32)
        key_PN = jax.lax.sort(bin_PN * rows + place_PN, dimension=1, is_stable=False)
        sorted_PN, source_PN = key_PN // rows, key_PN % rows
    else:
        sorted_PN, source_PN = jax.lax.sort((bin_PN, place_PN), dimension=1, num_keys=1)
    edges = jax.vmap(lambda s: jnp.searchsorted(s, jnp.arange(bins + 1)))(sorted_PN)
    destination_PN = jax.vmap(_inverse)(source_PN, place_PN)
    # Rematerialisation keeps these, as it keeps the decision.
    source_PN, destination_PN, edges = (
        checkpoint_name(a, "routing") for a in (source_PN, destination_PN, edges)
    )
    return source_PN, destination_PN, edges


def _inverse(source_N: Int[Array, " N"], place_N: Int[Array, " N"]) -> jax.Array:
    """The inverse permutation; place_N is 0, 1, 2, ..."""
    if platform() == "cpu":
        settings = {"unique_indices": True, "mode": "promise_in_bounds"}
        return jnp.zeros_like(place_N).at[source_N].set(place_N, **settings)
    return jax.lax.sort((source_N, place_N), num_keys=1)[1]  # where writing one by one is slow
