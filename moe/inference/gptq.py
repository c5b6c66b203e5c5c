"""Second-order rounding of a matrix by its own inputs, in the manner of GPTQ.

Frantar et al. 2022 (arXiv 2210.17323): rows of a weight (what a product sums over; the paper's
columns) are rounded in order, and each one's error is made up for by the rows that are still to
come, so that the product with the inputs changes as little as it can.

S stacked matrices, R rows, C columns, B rows of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.training.few_bits import levels, scale_of

DAMPING = 0.01  # of the mean of the Hessian's diagonal (section 4)


@jax.jit(static_argnums=(3, 4))
def second_order(
    w_SRC: Float[Array, "S R C"],
    hessian_SRR: Float[Array, "S R R"],
    inputs_S: Int[Array, " S"],
    name: str,
    block: int,
) -> Float[Array, "S R C"]:
    """The matrices in a format, with a scale for each block of rows of each column.

    A scale is the largest value of its block once errors of the rows before it have been added.

    Args:
        w_SRC: float32.
        hessian_SRR: sums of x x^T over each matrix's inputs.
        inputs_S: how many these were. Of fewer than R, which leave directions unseen, damping
            grows in proportion; without any input each weight is rounded to a nearest value.
        name, block: of the format, and rows that share a scale.
    """
    return jax.vmap(functools.partial(_one, name, block))(w_SRC, hessian_SRR, inputs_S)


def _one(name: str, block: int, w_RC: jax.Array, hessian_RR: jax.Array, inputs: jax.Array):
    upper_RR = inverse_factor(hessian_RR, inputs)

    def round_block(w_RC, first):
        w_BC = jax.lax.dynamic_slice_in_dim(w_RC, first, block)
        upper_BR = jax.lax.dynamic_slice_in_dim(upper_RR, first, block)
        within_BB = jax.lax.dynamic_slice_in_dim(upper_BR, first, block, axis=1)
        q_BC, error_BC = _rounded_in_order(w_BC, within_BB, name)
        w_RC = w_RC - upper_BR.T @ error_BC  # rows before the block have zeros in upper_BR
        return jax.lax.dynamic_update_slice_in_dim(w_RC, q_BC, first, axis=0), None

    return jax.lax.scan(round_block, w_RC, jnp.arange(0, len(w_RC), block))[0]


def _rounded_in_order(w_BC: jax.Array, upper_BB: jax.Array, name: str):
    """A block's rounded rows, and each one's error over the diagonal of the factor."""
    exact_C, scale_C = scale_of(w_BC, name)

    def round_row(w_BC, i):
        q_C = levels(w_BC[i] / exact_C, name) * scale_C
        error_C = (w_BC[i] - q_C) / upper_BB[i, i]
        return w_BC - jnp.outer(upper_BB[i], error_C), (q_C, error_C)

    return jax.lax.scan(round_row, w_BC, jnp.arange(len(w_BC)))[1]


def inverse_factor(hessian_RR: jax.Array, inputs: jax.Array) -> jax.Array:
    """The upper triangular U with U^T U = (H + damping)^-1, the Cholesky form of section 3.3."""
    rows = len(hessian_RR)
    mean = jnp.trace(hessian_RR) / rows
    share = DAMPING * jnp.maximum(1.0, rows / jnp.maximum(inputs, 1))
    scaled_RR = hessian_RR / jnp.where(mean > 0, mean, 1.0)
    damped_RR = scaled_RR + share * jnp.eye(rows)
    # H = M M^T with M upper triangular, by the factor of H from its last row on; U is M's inverse.
    upper_RR = jnp.linalg.cholesky(damped_RR[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper_RR, jnp.eye(rows), lower=False)
