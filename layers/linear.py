"""Matmuls of activations with weights, on rows."""

import math

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from layers.logical_axes import is_cut


def linear(x: jax.Array, weight: jax.Array, contracted: int = 1, dtype=None) -> jax.Array:
    """x times weight, summed over the last `contracted` axes of x and the first ones of weight.

    The weight is cast to x's type. dtype is that of the result and of its sums; x's where None.
    Rematerialisation may save the result.

    Equivalent to: tensordot(x, weight, contracted). Rows are flattened first: with two row axes
    XLA's CPU backend copies transposed activations in the backward pass (benchmarks/linear.py:
    1.4 to 1.9 times the time of a gated feed-forward).
    """
    if is_cut("length"):  # a mesh can't shard the one axis that two sharded ones would make
        weight = weight.astype(x.dtype)
        y = jnp.tensordot(x, weight, contracted, preferred_element_type=dtype)
        return checkpoint_name(y, "projections")
    split = x.ndim - contracted
    rows, inner, outer = x.shape[:split], x.shape[split:], weight.shape[contracted:]
    width = math.prod(inner)
    weight = weight.astype(x.dtype).reshape(width, -1)
    flat = jnp.matmul(x.reshape(-1, width), weight, preferred_element_type=dtype)
    return checkpoint_name(flat, "projections").reshape(*rows, *outer)
