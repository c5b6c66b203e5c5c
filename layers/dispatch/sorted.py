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

from layers.constrain import Shards, constrain, mesh_axes, per_shard, platform, shards_of
from layers.dispatch.all_to_all import EXCHANGES, Exchange, to_experts, to_tokens
from layers.dispatch.base import Dispatcher, Overflow
from layers.dispatch.gather_rows import combine_rows, dispatch_rows
from layers.dispatch.slot_gather import SlotGather
from layers.kernels.grouped_matmul import KERNELS, SortedRows, spare_rows
from routing.ranges import Positive
from routing.records import Decision, TokenChoice


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Sorted(Dispatcher):
    """Assignments sorted by expert: no slots, so nothing is padded and nothing need be dropped.

    Choices of experts and soft slots, which leave no slot empty, go by `SlotGather`. On a mesh
    every device sorts its own tokens; along an expert axis the rows travel to the devices that hold
    their experts, by one all-to-all, and home by another.

    Attributes:
        kernel: what multiplies the rows with their experts' weights: "loop" over blocks (CPU),
            "ragged_dot" (one operation of the compiler: TPU, GPU), "tokamax" (that package's
            kernels, on one TPU or GPU), "auto" for the first of these that the platform has.
        exchange: the all-to-all: "padded" to equal parts, "ragged" (moves what there is; TPU, GPU),
            "auto" for the platform's.
        buffer: a device has room for this many times the rows that come to it in the mean, the same
            share of it for each sender; None for all rows of all, the only way to be sure.
        overflow: "drop" what the buffer has no room for (counted as dropped: sooner on more
            devices, and at evaluation too, by the sequences before it in the batch), or "exact": a
            second exchange, only where there is any, with room for all.
    """

    kernel: Literal["auto", "loop", "ragged_dot", "tokamax"] = "auto"
    exchange: Exchange = "auto"
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
        return f"Sorted ({self.chosen_kernel}{more})"

    @property
    def chosen_kernel(self) -> str:
        """What "auto" stands for here."""
        if self.kernel != "auto":
            return self.kernel
        return "loop" if platform() == "cpu" else "ragged_dot"

    def most_rows(self, rows: int, devices: int) -> int:
        """How many of its own rows a device may send to each of so many that hold experts."""
        if self.buffer is None:
            return rows
        return min(rows, math.ceil(self.buffer * rows / devices))

    def split_overflow(self, decision) -> tuple[Decision, Overflow | None]:
        """Of the assignments from one device to another, the first `most_rows`."""
        if not isinstance(decision, TokenChoice) or self.buffer is None:
            return decision, None
        way = _expert_axis(decision)
        if way is None:
            return decision, None
        groups, tokens, k = decision.expert_GTK.shape
        shards = shards_of(groups, tokens)
        own = decision.num_experts // way.devices
        device_GTK = jnp.where(decision.keep_GTK, decision.expert_GTK // own, way.devices)
        device_PN = shards.split(device_GTK).reshape(shards.count, -1)
        _, home_PN, edge_PX = _sorted_into(device_PN, way.devices, shards)
        rank_PN = home_PN - jnp.take_along_axis(edge_PX, device_PN, axis=1)
        room_PN = rank_PN < self.most_rows(home_PN.shape[1], way.devices)
        room_GTK = shards.join(room_PN.reshape(shards.count, -1, k), groups)
        keep_GTK = decision.keep_GTK
        fits = dataclasses.replace(decision, keep_GTK=keep_GTK & room_GTK)
        if self.overflow == "drop":
            return fits, None
        rest = dataclasses.replace(decision, keep_GTK=keep_GTK & ~room_GTK)
        return fits, Overflow(rest, dataclasses.replace(self, buffer=None))

    def dispatch(self, x_GTD, decision) -> jax.Array | SortedRows:
        if not isinstance(decision, TokenChoice):
            return SlotGather().dispatch(x_GTD, decision)
        shards = shards_of(*x_GTD.shape[:2])
        source_PN, home_PTK, count_PE = _sorted_addresses(decision, shards)
        x_PTD = shards.split(x_GTD)
        way = _expert_axis(decision)
        if way is None:
            source_PN = _with_spare_rows(source_PN)
        token_PN = jnp.where(source_PN < 0, -1, source_PN // home_PTK.shape[2])
        x_1PND = dispatch_rows(x_PTD, token_PN[:, None], home_PTK)
        x_PND = constrain(x_1PND[0], shards.axis, None, None)
        if way is None:
            return SortedRows(x_PND, count_PE, self.chosen_kernel, shard_axis=shards.axis)

        slots = self.most_rows(x_PND.shape[1], way.devices)

        def send(x_1ND, count_1E):
            ragged = self._ragged
            x_MD, count_F = to_experts(x_1ND[0], count_1E[0], way.axis, slots, ragged)
            return x_MD[None], count_F[None]

        rows_PMD, count_PF = per_shard(send, (x_PND, count_PE), shard_axis=shards.axis)
        rows_PMD = checkpoint_name(rows_PMD, "exchanged")
        return SortedRows(rows_PMD, count_PF, self.chosen_kernel, True, shards.axis)

    def combine(self, y_EGCD, decision) -> jax.Array:
        if not isinstance(decision, TokenChoice):
            return SlotGather().combine(y_EGCD, decision)
        groups, tokens, k = decision.expert_GTK.shape
        shards = shards_of(groups, tokens)
        source_PN, home_PTK, count_PE = _sorted_addresses(decision, shards)
        y_PND = constrain(y_EGCD, shards.axis, None, None)
        way = _expert_axis(decision)
        if way is None:
            source_PN = _with_spare_rows(source_PN)
        else:
            rows = source_PN.shape[1]
            slots = self.most_rows(rows, way.devices)

            def home(y_1MD, count_1E):
                return to_tokens(y_1MD[0], count_1E[0], way.axis, slots, rows, self._ragged)[None]

            y_PND = per_shard(home, (y_PND, count_PE), shard_axis=shards.axis)
            y_PND = checkpoint_name(y_PND, "exchanged")
        gate_PTK = shards.split(decision.gate_GTK.astype(y_PND.dtype))
        y_PTD = combine_rows(y_PND[None], gate_PTK, source_PN[:, None], home_PTK)
        return shards.join(y_PTD, groups)

    @property
    def _ragged(self) -> bool:
        """Whether what travels is not padded."""
        return self.exchange == "ragged" or (self.exchange == "auto" and platform() != "cpu")


class _ExpertAxis(NamedTuple):
    axis: str
    devices: int


def _expert_axis(decision: TokenChoice) -> _ExpertAxis | None:
    """The mesh axis that both experts and tokens are spread over, so that rows have to travel."""
    held = mesh_axes("expert", decision.num_experts)
    shared = held.keys() & mesh_axes("batch", len(decision.expert_GTK)).keys()
    if not shared:
        return None
    (axis,) = shared
    return _ExpertAxis(axis, held[axis])


def _sorted_addresses(
    decision: TokenChoice, shards: Shards
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """source_PN: which assignment t*K+k lies in a row; home_PTK: its row; -1 for none; count_PE.

    P shards, each with its tokens in a row. Assignments lie by expert, then in their order; those
    that are not kept come last and count for nobody.
    """
    experts = decision.num_experts
    kept_PTK = shards.split(jnp.where(decision.keep_GTK, decision.expert_GTK, experts))
    expert_PN = kept_PTK.reshape(shards.count, -1)
    source_PN, home_PN, edge_PX = _sorted_into(expert_PN, experts, shards)
    count_PE = jnp.diff(edge_PX, axis=1).astype(jnp.int32)
    row_1N = jnp.arange(source_PN.shape[1])[None]
    source_PN = jnp.where(row_1N < edge_PX[:, -1:], source_PN, -1)
    home_PTK = home_PN.reshape(kept_PTK.shape)
    return source_PN, jnp.where(kept_PTK < experts, home_PTK, -1), count_PE


def _with_spare_rows(source_PN):
    """With the rows, all empty, that experts may read behind their own."""
    more = ((0, 0), (0, spare_rows(source_PN.shape[1])))
    return jnp.pad(source_PN, more, constant_values=-1)


def _sorted_into(
    bin_PN: jax.Array, bins: int, shards: Shards
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """source_PN, home_PN: what a stable sort by bin puts in each place, and its inverse.

    edge_PX (P, bins + 1): where each bin begins, the last one's end behind it. A bin_PN of `bins`
    is nobody's and comes last.
    """
    bin_PN = constrain(bin_PN, shards.axis, None)
    rows = bin_PN.shape[1]
    place_PN = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), bin_PN.shape)
    if (bins + 1) * rows < 2**31:  # bin and place in one number sort in a quarter of the time
        bin_PN = bin_PN.astype(jnp.int32)
        key_PN = jax.lax.sort(bin_PN * rows + place_PN, dimension=1, is_stable=False)
        sorted_PN, source_PN = key_PN // rows, key_PN % rows
    else:
        sorted_PN, source_PN = jax.lax.sort((bin_PN, place_PN), dimension=1, num_keys=1)
    edge_PX = jax.vmap(lambda s: jnp.searchsorted(s, jnp.arange(bins + 1)))(sorted_PN)
    home_PN = jax.vmap(_inverse)(source_PN, place_PN)
    # Rematerialisation keeps these, as it keeps the decision.
    source_PN, home_PN, edge_PX = (
        checkpoint_name(a, "routing") for a in (source_PN, home_PN, edge_PX)
    )
    return source_PN, home_PN, edge_PX


def _inverse(source_N: jax.Array, place_N: jax.Array) -> jax.Array:
    """Where a permutation puts each place; place_N: 0, 1, 2, ..."""
    if platform() == "cpu":
        settings = {"unique_indices": True, "mode": "promise_in_bounds"}
        return jnp.zeros_like(place_N).at[source_N].set(place_N, **settings)
    return jax.lax.sort((source_N, place_N), num_keys=1)[1]  # where writing one by one is slow
