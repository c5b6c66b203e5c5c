"""Feed-forward experts on a few rows, one after the other: for decoding on a CPU.

N rows, D width, F hidden width, E experts.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.kernels.row_blocks import units


def row_by_row(
    x_ND: Float[Array, "N D"],
    combine_N: Float[Array, " N"],
    ups: tuple[jax.Array, ...],
    down_EFD: Float[Array, "E F D"],
    count_E: Int[Array, " E"],
    activate: Callable[..., jax.Array],
) -> jax.Array:
    """(N, D): as `grouped_feed_forward`; zero past the counts.

    It reads the weights of experts that have rows, once for each row, and has no gradient. With up
    to two rows per expert it is faster than blocks (benchmarks/decode.py).
    """
    last_E = jnp.cumsum(count_E)
    expert_N = jnp.searchsorted(last_E, jnp.arange(len(x_ND)), side="right")

    def one_row(n, y_ND):
        x_1D = lax.dynamic_slice_in_dim(x_ND, n, 1)
        ups_DF = [lax.dynamic_index_in_dim(w, expert_N[n], keepdims=False) for w in ups]
        down_FD = lax.dynamic_index_in_dim(down_EFD, expert_N[n], keepdims=False)
        y_1D = units(activate, combine_N[n], *(x_1D @ up_DF for up_DF in ups_DF)) @ down_FD
        return lax.dynamic_update_slice_in_dim(y_ND, y_1D, n, 0)

    return lax.fori_loop(0, last_E[-1], one_row, jnp.zeros_like(x_ND))
