"""Rows in blocks of one expert each, and their matmuls by a loop over blocks: the reference.

N rows in B blocks of R rows, D width, F columns, E experts. An expert's rows begin with a block;
the rest of its last block is zero. Blocks behind those in use hold anything, and are read by none.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK_ROWS = 128


class Blocks(NamedTuple):
    """Which expert's rows each block holds.

    Attributes:
        expert_B: its expert; for blocks that are not in use the last expert.
        used_1: how many blocks are in use.
        first_E: the row at which each expert begins.
        blocks_E: the blocks of each expert.
    """

    expert_B: jax.Array
    used_1: jax.Array
    first_E: jax.Array
    blocks_E: jax.Array


def aligned_rows(rows: int, experts: int, multiple: int = BLOCK_ROWS) -> int:
    """The most rows that `rows` rows take where every expert's begin at a multiple of some."""
    return max(1, (rows + experts * (multiple - 1)) // multiple) * multiple


def aligned_starts(count_E: Int[Array, "*P E"], multiple: int) -> jax.Array:
    """(*P, E): where each expert's rows begin, at multiples of `multiple`."""
    room_E = -(-count_E // multiple) * multiple
    return jnp.cumsum(room_E, axis=-1) - room_E


def blocks_of(count_E: Int[Array, " E"], rows: int) -> Blocks:
    """The blocks of `rows` rows, of which count_E are each expert's."""
    blocks_E = -(-count_E.astype(jnp.int32) // BLOCK_ROWS)
    end_E = jnp.cumsum(blocks_E)
    block_B = jnp.arange(rows // BLOCK_ROWS, dtype=jnp.int32)
    expert_B = jnp.searchsorted(end_E, block_B, side="right", method="compare_all")
    expert_B = jnp.minimum(expert_B, len(count_E) - 1).astype(jnp.int32)
    return Blocks(expert_B, end_E[-1:], (end_E - blocks_E) * BLOCK_ROWS, blocks_E)


def matmul(
    x_ND: Float[Array, "N D"], weight_EDF: jax.Array, blocks: Blocks, transpose: bool = False
) -> jax.Array:
    """(N, F): each block by its expert's weights, or with `transpose` by weights (E, F, D)."""

    def one(block):
        x_RD, expert = block
        weight = lax.dynamic_index_in_dim(weight_EDF, expert, keepdims=False)
        return x_RD @ (weight.T if transpose else weight)

    x_BRD = x_ND.reshape(-1, BLOCK_ROWS, x_ND.shape[1])
    return lax.map(one, (x_BRD, blocks.expert_B)).reshape(len(x_ND), -1)


def weight_gradient(
    x_ND: Float[Array, "N D"], dy_NF: Float[Array, "N F"], blocks: Blocks
) -> jax.Array:
    """(E, D, F): x^T dy over each expert's rows, added in float32; 0 for an expert without any."""
    experts, width = len(blocks.first_E), x_ND.shape[1]
    shape = (experts, width, dy_NF.shape[1])
    start = jnp.zeros_like(x_ND, shape=shape, dtype=jnp.promote_types(x_ND.dtype, jnp.float32))

    def add(n, total_EDF):
        x_RD, dy_RF = (
            lax.dynamic_slice_in_dim(a, n * BLOCK_ROWS, BLOCK_ROWS) for a in (x_ND, dy_NF)
        )
        new = jnp.einsum("rd,rf->df", x_RD, dy_RF, preferred_element_type=total_EDF.dtype)
        return total_EDF.at[blocks.expert_B[n]].add(new)

    return lax.fori_loop(0, blocks.used_1[0], add, start).astype(x_ND.dtype)


def gated(
    x_ND: Float[Array, "N D"],
    up_EDF: jax.Array,
    gate_EDF: jax.Array,
    combine_N: Float[Array, " N"],
    blocks: Blocks,
    activate,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """activate(up(x), gate(x)) times combine_N, up(x) and gate(x), each (N, F)."""
    up_NF, gate_NF = matmul(x_ND, up_EDF, blocks), matmul(x_ND, gate_EDF, blocks)
    return units(activate, combine_N[:, None], up_NF, gate_NF), up_NF, gate_NF


def units(activate, combine_N1: jax.Array, *before: jax.Array) -> jax.Array:
    """activate(*before) times their rows' combine weights, in the type of the hidden units.

    An expert's output is linear in them: so it comes out weighted, and the backward pass, which has
    the hidden units' gradients at hand, needs no outputs to find those of the weights.
    """
    hidden_NF = activate(*before)
    return (hidden_NF * combine_N1).astype(hidden_NF.dtype)
