"""Normalisation over the last axis, in float32 whatever the compute type. D: its width."""

from flax import nnx
import gin
import jax
import jax.numpy as jnp

from routing.parameters import ones, parameter, zeros
from routing.ranges import Count, Positive


@gin.configurable
class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang & Sennrich 2019).

    Args:
        width: D.
        epsilon: added under the root.
    """

    def __init__(self, width: Count, epsilon: Positive = 1e-6):
        self.epsilon = epsilon
        self.scale_D = parameter((width,), (None,), ones, role="norm")

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale_D[...].reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


@gin.configurable
class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias (Ba et al. 2016).

    Args:
        width: D.
        epsilon: added under the root.
    """

    def __init__(self, width: Count, epsilon: Positive = 1e-6):
        self.epsilon = epsilon
        self.scale_D = parameter((width,), (None,), ones, role="norm")
        self.bias_D = parameter((width,), (None,), zeros, role="norm")

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        row = (1,) * (x.ndim - 1) + (-1,)
        y = y * self.scale_D[...].reshape(row) + self.bias_D[...].reshape(row)
        return y.astype(x.dtype)
