"""Expert parallelism: rows travel to the devices that hold their experts, and home again.

Inside shard_map. Each of the X devices of a mesh axis holds F = E / X experts and N rows of its own
that lie expert by expert. It sends at most S rows to each device, so that none receives more than
X * S. One all-to-all there, one home, and the transposes of both in the backward pass.
"""

from typing import Literal, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from layers.dispatch.gather_rows import permute
from layers.kernels.grouped_matmul import spare_rows

EXCHANGES = ("auto", "padded", "ragged")
Exchange = Literal["auto", "padded", "ragged"]


class Exchanged(NamedTuple):
    """Who sends how much to whom, as one device knows it."""

    send_sizes_X: jax.Array  # rows that go to each device
    start_X: jax.Array  # where those begin among the device's own rows
    recv_sizes_XF: jax.Array  # rows that come from each device, for each expert here
    output_offsets_X: jax.Array  # where this device's rows begin among those of each sender


def exchanged(count_E: jax.Array, axis: str) -> Exchanged:
    """count_E: how many rows this device has for each of all experts. Gathers X * E integers."""
    devices = lax.axis_size(axis)
    count_XXF = lax.all_gather(count_E, axis).reshape(devices, devices, -1)
    here = lax.axis_index(axis)
    total_XX = count_XXF.sum(2)
    start_XX = jnp.cumsum(total_XX, axis=1) - total_XX
    recv_sizes_XF = lax.dynamic_index_in_dim(count_XXF, here, axis=1, keepdims=False)
    output_offsets_X = lax.dynamic_index_in_dim(start_XX, here, axis=1, keepdims=False)
    send_sizes_XF = count_E.reshape(devices, -1)
    send_sizes_X = send_sizes_XF.sum(1)
    return Exchanged(
        send_sizes_X, jnp.cumsum(send_sizes_X) - send_sizes_X, recv_sizes_XF, output_offsets_X
    )


def to_experts(
    rows_ND: jax.Array, count_E: jax.Array, axis: str, slots: int, ragged: bool
) -> tuple[jax.Array, jax.Array]:
    """rows_MD, the rows that came, by expert of this device; count_F. M: X * S and spare rows."""
    plan = exchanged(count_E, axis)
    if ragged:
        got_RD = _ragged_there(rows_ND, plan, axis, slots)
    else:
        source_R, home_N = _packing(plan, len(rows_ND), slots)
        sent_XSD = permute(rows_ND, source_R, home_N).reshape(len(plan.send_sizes_X), slots, -1)
        got_RD = lax.all_to_all(sent_XSD, axis, 0, 0).reshape(-1, rows_ND.shape[1])
    source_M, home_R = _by_expert(plan, slots)
    return permute(got_RD, source_M, home_R), plan.recv_sizes_XF.sum(0)


def to_tokens(
    y_MD: jax.Array, count_E: jax.Array, axis: str, slots: int, rows: int, ragged: bool
) -> jax.Array:
    """(N, D): the inverse of `to_experts`, for N = rows."""
    plan = exchanged(count_E, axis)
    source_M, home_R = _by_expert(plan, slots)
    got_RD = permute(y_MD, home_R, source_M)
    if ragged:
        return _ragged_home(got_RD, plan, axis, slots, rows)
    source_R, home_N = _packing(plan, rows, slots)
    back_XSD = lax.all_to_all(got_RD.reshape(len(plan.send_sizes_X), slots, -1), axis, 0, 0)
    return permute(back_XSD.reshape(got_RD.shape), home_N, source_R)


def _packing(plan: Exchanged, rows: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """source_R: which row is sent in slot x * S + s; home_N: the slot of every row; -1 for none."""
    place_1S, start_X1 = jnp.arange(slots)[None], plan.start_X[:, None]
    source_XS = jnp.where(place_1S < plan.send_sizes_X[:, None], start_X1 + place_1S, -1)
    row_N = jnp.arange(rows)
    to_N = jnp.searchsorted(plan.start_X + plan.send_sizes_X, row_N, side="right")
    home_N = to_N * slots + row_N - plan.start_X[jnp.minimum(to_N, len(plan.send_sizes_X) - 1)]
    return source_XS.reshape(-1), jnp.where(to_N < len(plan.send_sizes_X), home_N, -1)


def _by_expert(plan: Exchanged, slots: int) -> tuple[jax.Array, jax.Array]:
    """source_M: which received row x * S + s lies in place m; home_R: its inverse; -1 for none.

    Rows lie by expert, then by sender, then as they were sent.
    """
    recv_sizes_XF = plan.recv_sizes_XF
    devices, experts = recv_sizes_XF.shape
    first_XF = (
        jnp.cumsum(recv_sizes_XF, axis=1) - recv_sizes_XF
    )  # of an expert's rows among a sender's
    recv_sizes_FX = recv_sizes_XF.T.reshape(-1)
    begin_FX = jnp.cumsum(recv_sizes_FX) - recv_sizes_FX
    received = devices * slots
    place_M = jnp.arange(received + spare_rows(received))
    pair_M = jnp.searchsorted(begin_FX + recv_sizes_FX, place_M, side="right")
    real_M = pair_M < devices * experts
    pair_M = jnp.minimum(pair_M, devices * experts - 1)
    expert_M, sender_M = jnp.divmod(pair_M, devices)
    source_M = sender_M * slots + first_XF[sender_M, expert_M] + place_M - begin_FX[pair_M]
    place_S = jnp.arange(slots)
    last_XF = first_XF + recv_sizes_XF
    expert_XS = jax.vmap(lambda last_F: jnp.searchsorted(last_F, place_S, side="right"))(last_XF)
    shift_XF = begin_FX.reshape(experts, devices).T - first_XF
    shift_XS = jnp.take_along_axis(shift_XF, jnp.minimum(expert_XS, experts - 1), axis=1)
    home_XS = jnp.where(expert_XS < experts, shift_XS + place_S[None], -1)
    return jnp.where(real_M, source_M, -1), home_XS.reshape(-1)


def _ragged_there(rows_ND, plan: Exchanged, axis: str, slots: int) -> jax.Array:
    """(X * S, D): what came from each sender, at the beginning of its S slots."""
    devices = len(plan.send_sizes_X)
    empty_RD = jnp.zeros_like(rows_ND, shape=(devices * slots, rows_ND.shape[1]))
    output_offsets_X = jnp.full_like(plan.start_X, slots) * lax.axis_index(axis)
    recv_sizes_X = plan.recv_sizes_XF.sum(1)
    ends = (plan.start_X, plan.send_sizes_X, output_offsets_X, recv_sizes_X)
    return lax.ragged_all_to_all(rows_ND, empty_RD, *_as_int32(ends), axis_name=axis)


def _ragged_home(got_RD, plan: Exchanged, axis: str, slots: int, rows: int) -> jax.Array:
    """(N, D): every row where it was before `_ragged_there`."""
    empty_ND = jnp.zeros_like(got_RD, shape=(rows, got_RD.shape[1]))
    begin_X = jnp.arange(len(plan.send_sizes_X)) * slots
    ends = (begin_X, plan.recv_sizes_XF.sum(1), plan.output_offsets_X, plan.send_sizes_X)
    return lax.ragged_all_to_all(got_RD, empty_ND, *_as_int32(ends), axis_name=axis)


def _as_int32(arrays):
    return tuple(a.astype(jnp.int32) for a in arrays)
