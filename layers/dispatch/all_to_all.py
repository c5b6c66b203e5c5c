"""Expert parallelism: rows travel to the devices that hold their experts, and back.

For use inside shard_map. Each of the P devices of a mesh axis holds X = E / P experts, and N rows
sorted by the expert that they go to. It sends at most S rows to each device, so that none receives
more than P * S. One all-to-all brings rows to experts, one their gates, one brings outputs back;
the backward pass runs the transposes of all. Names are those of `jax.lax.ragged_all_to_all`.
"""

from typing import Literal, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.dispatch.gather_rows import permute, permute_numbers
from layers.kernels.grouped_matmul import row_multiple, spare_rows
from layers.kernels.row_blocks import aligned_starts

EXCHANGES = ("auto", "padded", "ragged")
ExchangeKind = Literal["auto", "padded", "ragged"]


class Exchange(NamedTuple):
    """The sizes and offsets of one all-to-all, as one device knows them."""

    send_sizes_P: jax.Array  # rows that this device sends to each device
    input_offsets_P: jax.Array  # where those begin among its N rows
    recv_sizes_PX: jax.Array  # rows that it receives from each device, for each of its experts
    output_offsets_P: jax.Array  # where those lie among their sender's N rows


def exchange_sizes(count_E: Int[Array, " E"], axis: str) -> Exchange:
    """Sizes and offsets from the rows count_E that this device has for each of all experts.

    All-gathers P * E integers over the mesh axis.
    """
    devices = lax.axis_size(axis)
    count_PPX = lax.all_gather(count_E, axis).reshape(devices, devices, -1)
    here = lax.axis_index(axis)
    total_PP = count_PPX.sum(2)
    input_offsets_PP = jnp.cumsum(total_PP, axis=1) - total_PP
    recv_sizes_PX = lax.dynamic_index_in_dim(count_PPX, here, axis=1, keepdims=False)
    output_offsets_P = lax.dynamic_index_in_dim(input_offsets_PP, here, axis=1, keepdims=False)
    send_sizes_PX = count_E.reshape(devices, -1)
    send_sizes_P = send_sizes_PX.sum(1)
    return Exchange(
        send_sizes_P, jnp.cumsum(send_sizes_P) - send_sizes_P, recv_sizes_PX, output_offsets_P
    )


def to_experts(
    rows_ND: Float[Array, "N D"],
    combine_N: Float[Array, " N"],
    count_E: Int[Array, " E"],
    axis: str,
    slots: int,
    ragged: bool,
    kernel: str = "loop",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Send rows (N, D), sorted by expert, to the devices that hold their experts.

    Args:
        rows_ND: this device's rows, in the order of all E experts.
        combine_N: a number that goes with each row.
        count_E: how many of them go to each expert.
        axis: the mesh axis that experts are spread over.
        slots: S, the most rows that one device sends to another.
        ragged: by `lax.ragged_all_to_all`; otherwise each device sends S rows, some of them zero.
        kernel: that reads the received rows; each expert's begin where it wants them.

    Returns:
        The received rows (M, D), in the order of this device's X experts, their numbers (M,), and
        how many rows each expert has (X,). M is P * S and `spare_rows`.
    """
    exchange = exchange_sizes(count_E, axis)
    source_R, destination_N = _packing(exchange, len(rows_ND), slots)
    source_M, destination_R = _by_expert(exchange, slots, kernel)

    if ragged:
        received_RD = _ragged_to_experts(rows_ND, exchange, axis, slots)
    else:
        received_RD = _swapped(permute(rows_ND, source_R, destination_N), axis)
    rows_MD = permute(received_RD, source_M, destination_R)
    # Numbers are so few that their empty slots cost nothing.
    received_R = _swapped(permute_numbers(combine_N, source_R, destination_N), axis)
    combine_M = permute_numbers(received_R, source_M, destination_R)
    return rows_MD, combine_M, exchange.recv_sizes_PX.sum(0)


def to_tokens(
    y_MD: Float[Array, "M D"],
    count_E: Int[Array, " E"],
    axis: str,
    slots: int,
    rows: int,
    ragged: bool,
    kernel: str = "loop",
) -> jax.Array:
    """(N, D): the experts' outputs (M, D) where `to_experts` took their rows from; N = rows."""
    exchange = exchange_sizes(count_E, axis)
    source_M, destination_R = _by_expert(exchange, slots, kernel)
    received_RD = permute(y_MD, destination_R, source_M)
    if ragged:
        return _ragged_to_tokens(received_RD, exchange, axis, slots, rows)
    source_R, destination_N = _packing(exchange, rows, slots)
    return permute(_swapped(received_RD, axis), destination_N, source_R)


def _swapped(a_R: jax.Array, axis: str) -> jax.Array:
    """R = P * S rows or numbers, of which the S for each device have gone to it."""
    a_PS = a_R.reshape(lax.axis_size(axis), -1, *a_R.shape[1:])
    return lax.all_to_all(a_PS, axis, 0, 0).reshape(a_R.shape)


def _packing(exchange: Exchange, rows: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """source_R: the row sent in slot p * S + s; destination_N: each row's slot; -1 for none."""
    place_1S, start_P1 = jnp.arange(slots)[None], exchange.input_offsets_P[:, None]
    source_PS = jnp.where(place_1S < exchange.send_sizes_P[:, None], start_P1 + place_1S, -1)
    row_N = jnp.arange(rows)
    to_N = jnp.searchsorted(exchange.input_offsets_P + exchange.send_sizes_P, row_N, side="right")
    destination_N = (
        to_N * slots
        + row_N
        - exchange.input_offsets_P[jnp.minimum(to_N, len(exchange.send_sizes_P) - 1)]
    )
    return source_PS.reshape(-1), jnp.where(to_N < len(exchange.send_sizes_P), destination_N, -1)


def _by_expert(exchange: Exchange, slots: int, kernel: str) -> tuple[jax.Array, jax.Array]:
    """Sort received rows by expert, then by sender, then as they were sent.

    Each expert's begin at a multiple of `row_multiple(kernel)`. Returns source_M, the received row
    p * S + s that lies in place m, and destination_R, its inverse; -1 for none.
    """
    recv_sizes_PX = exchange.recv_sizes_PX
    devices, experts = recv_sizes_PX.shape
    # Where an expert's rows begin among those of one sender.
    first_PX = jnp.cumsum(recv_sizes_PX, axis=1) - recv_sizes_PX
    pair_sizes = recv_sizes_PX.T.reshape(-1)  # of (expert, sender), experts first
    start_X = aligned_starts(recv_sizes_PX.sum(0), row_multiple(kernel))
    before_PX = jnp.cumsum(recv_sizes_PX, axis=0) - recv_sizes_PX
    pair_begin = (start_X[None] + before_PX).T.reshape(-1)
    rows = devices * slots
    place_M = jnp.arange(rows + spare_rows(rows, experts, kernel))
    pair_M = jnp.searchsorted(pair_begin + pair_sizes, place_M, side="right")
    real_M = pair_M < devices * experts
    pair_M = jnp.minimum(pair_M, devices * experts - 1)
    real_M &= place_M >= pair_begin[pair_M]
    expert_M, sender_M = jnp.divmod(pair_M, devices)
    source_M = sender_M * slots + first_PX[sender_M, expert_M] + place_M - pair_begin[pair_M]
    place_S = jnp.arange(slots)
    last_PX = first_PX + recv_sizes_PX
    expert_PS = jax.vmap(lambda last_X: jnp.searchsorted(last_X, place_S, side="right"))(last_PX)
    shift_PX = pair_begin.reshape(experts, devices).T - first_PX
    shift_PS = jnp.take_along_axis(shift_PX, jnp.minimum(expert_PS, experts - 1), axis=1)
    destination_PS = jnp.where(expert_PS < experts, shift_PS + place_S[None], -1)
    return jnp.where(real_M, source_M, -1), destination_PS.reshape(-1)


def _ragged_to_experts(rows_ND, exchange: Exchange, axis: str, slots: int) -> jax.Array:
    """(P * S, D): the rows of each sender, at the beginning of its S slots."""
    devices = len(exchange.send_sizes_P)
    empty_RD = jnp.zeros_like(rows_ND, shape=(devices * slots, rows_ND.shape[1]))
    output_offsets_P = jnp.full_like(exchange.input_offsets_P, slots) * lax.axis_index(axis)
    recv_sizes_P = exchange.recv_sizes_PX.sum(1)
    sizes = (exchange.input_offsets_P, exchange.send_sizes_P, output_offsets_P, recv_sizes_P)
    return lax.ragged_all_to_all(rows_ND, empty_RD, *_as_int32(sizes), axis_name=axis)


def _ragged_to_tokens(
    received_RD, exchange: Exchange, axis: str, slots: int, rows: int
) -> jax.Array:
    """(N, D): every row where it was before `_ragged_to_experts`."""
    empty_ND = jnp.zeros_like(received_RD, shape=(rows, received_RD.shape[1]))
    begin_P = jnp.arange(len(exchange.send_sizes_P)) * slots
    sizes = (
        begin_P,
        exchange.recv_sizes_PX.sum(1),
        exchange.output_offsets_P,
        exchange.send_sizes_P,
    )
    return lax.ragged_all_to_all(received_RD, empty_ND, *_as_int32(sizes), axis_name=axis)


def _as_int32(arrays):
    return tuple(a.astype(jnp.int32) for a in arrays)
