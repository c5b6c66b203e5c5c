"""Feed-forward experts on a GPU: equal slots in batched matmuls, and what overflows in blocks.

N rows sorted by expert, D width, F hidden width, E experts, S slots of an expert, R rows of a
block. Exact at any balance: an expert's first S rows are computed in one matmul with those of all
experts, its further rows block by block with the expert's weights. No buffer has more rows than
SLOT_FACTOR * N + SLOT_MULTIPLE * E, forward or backward.
"""

import functools
import math

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from layers.kernels.row_blocks import units

# Slots of an expert, as a multiple of its even share of the rows, and rounded up to this many.
SLOT_FACTOR = 1.25
SLOT_MULTIPLE = 8
# The most rows of a block beyond the slots.
BLOCK_ROWS = 256


def slots_of(rows: int, experts: int) -> int:
    """S: how many of `rows` rows every expert computes in the batched matmuls."""
    share = math.ceil(SLOT_FACTOR * rows / experts)
    return min(rows, -(-share // SLOT_MULTIPLE) * SLOT_MULTIPLE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def slot_blocks(x_ND, combine_N, ups, down_EFD, count_E, activate) -> jax.Array:
    """(N, D): as `grouped_feed_forward`; 0 past the counts. No row of padding is needed."""
    return _forward(x_ND, combine_N, ups, down_EFD, count_E, activate)[0]


def _forward(x_ND, combine_N, ups, down_EFD, count_E, activate):
    slots, combine_N1 = slots_of(len(x_ND), len(count_E)), combine_N[:, None]
    x_ESD, combine_ES1 = (_to_slots(a, count_E, slots) for a in (x_ND, combine_N1))
    before = [_named(jnp.einsum("esd,edf->esf", x_ESD, up_EDF)) for up_EDF in ups]
    y_ESD = jnp.einsum("esf,efd->esd", units(activate, combine_ES1, *before), down_EFD)

    def body(expert, start, is_own_R1, y_ND):
        x_RD = _rows(x_ND, start, len(is_own_R1))
        before_RF = [x_RD @ _one(up_EDF, expert) for up_EDF in ups]
        hidden_RF = units(activate, _rows(combine_N1, start, len(is_own_R1)), *before_RF)
        return _write(y_ND, hidden_RF @ _one(down_EFD, expert), start, is_own_R1)

    y_ND = _over_overflow(body, _from_slots(y_ESD, count_E, len(x_ND)), count_E, slots)
    return y_ND, (x_ND, combine_N1, ups, down_EFD, count_E, before)


def _backward(activate, saved, dy_ND):
    """Blocks beyond the slots compute their hidden units again; slots keep theirs."""
    x_ND, combine_N1, ups, down_EFD, count_E, before = saved
    slots = before[0].shape[1]
    given = x_ND, combine_N1, dy_ND
    x_ESD, combine_ES1, dy_ESD = (_to_slots(a, count_E, slots) for a in given)

    weighted = functools.partial(units, activate)
    hidden_ESF, pull = jax.vjp(weighted, combine_ES1, *before)
    dcombine_ES1, *dbefore = pull(jnp.einsum("esd,efd->esf", dy_ESD, down_EFD))
    dx_ESD = sum(
        jnp.einsum("esf,edf->esd", d_ESF, up_EDF)
        for d_ESF, up_EDF in zip(dbefore, ups, strict=True)
    )
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    weights = functools.partial(jnp.einsum, preferred_element_type=wide)
    dups = [weights("esd,esf->edf", x_ESD, d_ESF) for d_ESF in dbefore]
    ddown_EFD = weights("esf,esd->efd", hidden_ESF, dy_ESD)

    def body(expert, start, is_own_R1, done):
        dx_ND, dcombine_N1, dups, ddown_EFD = done
        size = len(is_own_R1)
        x_RD, combine_R1, dy_RD = (jnp.where(is_own_R1, _rows(a, start, size), 0) for a in given)
        before_RF = [x_RD @ _one(up_EDF, expert) for up_EDF in ups]
        hidden_RF, pull = jax.vjp(weighted, combine_R1, *before_RF)
        dcombine_R1, *dbefore = pull(dy_RD @ _one(down_EFD, expert).T)
        dx_RD = sum(d @ _one(up_EDF, expert).T for d, up_EDF in zip(dbefore, ups, strict=True))
        dups = [_add(dup, expert, x_RD, d) for dup, d in zip(dups, dbefore, strict=True)]
        ddown_EFD = _add(ddown_EFD, expert, hidden_RF, dy_RD)
        dx_ND = _write(dx_ND, dx_RD, start, is_own_R1)
        return dx_ND, _write(dcombine_N1, dcombine_R1, start, is_own_R1), dups, ddown_EFD

    dx_ND, dcombine_N1 = (_from_slots(a, count_E, len(x_ND)) for a in (dx_ESD, dcombine_ES1))
    start = dx_ND, dcombine_N1, dups, ddown_EFD
    dx_ND, dcombine_N1, dups, ddown_EFD = _over_overflow(body, start, count_E, slots)
    dups = tuple(dup.astype(up.dtype) for dup, up in zip(dups, ups, strict=True))
    return dx_ND, dcombine_N1[:, 0], dups, ddown_EFD.astype(down_EFD.dtype), None


slot_blocks.defvjp(_forward, _backward)


def _to_slots(a_ND, count_E, slots: int):
    """(E, S, D): the first S rows of each expert; 0 in slots past its count."""
    start_E1 = (jnp.cumsum(count_E) - count_E)[:, None]
    slot_1S = jnp.arange(slots)[None]
    a_ESD = jnp.take(a_ND, start_E1 + slot_1S, axis=0, mode="clip")
    return jnp.where((slot_1S < count_E[:, None])[..., None], a_ESD, 0)


def _from_slots(a_ESD, count_E, rows: int):
    """(N, D): each row from its slot; 0 for rows without one."""
    experts, slots, width = a_ESD.shape
    end_E = jnp.cumsum(count_E)
    row_N = jnp.arange(rows)
    expert_N = jnp.minimum(jnp.searchsorted(end_E, row_N, side="right"), experts - 1)
    slot_N = row_N - (end_E - count_E)[expert_N]
    has_slot_N = (slot_N < slots) & (row_N < end_E[-1])
    place_N = expert_N * slots + slot_N
    a_ND = jnp.take(a_ESD.reshape(experts * slots, width), place_N, axis=0, mode="clip")
    return jnp.where(has_slot_N[:, None], a_ND, 0)


def _over_overflow(body, carry, count_E, slots: int):
    """Call body(expert, start, is_own_R1, carry) for blocks that cover the rows beyond the slots.

    is_own_R1: which of the block's rows those are: it may reach into the next expert's, and the
        last block of all begins early enough to end with the last row.
    """
    rows = len(jax.tree.leaves(carry)[0])
    size = min(BLOCK_ROWS, rows)
    end_E = jnp.cumsum(count_E)
    first_E = end_E - count_E + slots
    blocks_E = -(-jnp.maximum(count_E - slots, 0) // size)
    last_E = jnp.cumsum(blocks_E)

    def one_block(n, carry):
        expert = jnp.searchsorted(last_E, n, side="right")
        begin = first_E[expert] + (n - (last_E - blocks_E)[expert]) * size
        start = jnp.minimum(begin, rows - size)
        row_R = start + jnp.arange(size)
        is_own_R = (row_R >= begin) & (row_R < jnp.minimum(begin + size, end_E[expert]))
        return body(expert, start, is_own_R[:, None], carry)

    return lax.fori_loop(0, last_E[-1], one_block, carry)


def _named(matmul):
    """An experts' matmul under the name by which rematerialisation saves it."""
    return checkpoint_name(matmul, "expert_matmuls")


def _rows(a_ND, start, size: int):
    return lax.dynamic_slice_in_dim(a_ND, start, size)


def _write(a_ND, rows_RD, start, is_own_R1):
    """a_ND with the block's own rows in place."""
    new_RD = jnp.where(is_own_R1, rows_RD, _rows(a_ND, start, len(rows_RD)))
    return lax.dynamic_update_slice_in_dim(a_ND, new_RD, start, 0)


def _one(weights, expert):
    return lax.dynamic_index_in_dim(weights, expert, keepdims=False)


def _add(total, expert, a, b):
    """total[expert] += a^T b, in total's type."""
    new = lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=total.dtype)
    return lax.dynamic_update_index_in_dim(total, _one(total, expert) + new, expert, 0)
