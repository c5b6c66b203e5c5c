"""The dense feed-forward, for every token. D model width, F hidden width."""

from collections.abc import Callable
import functools
from typing import Literal

from flax import nnx
import gin
import jax
import jax.numpy as jnp

from layers.linear import linear
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count, Positive

Activation = Literal["swiglu", "geglu", "gelu", "relu", "relu2"]
ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
GATED = ("swiglu", "geglu")


def check_activation(activation: str) -> None:
    """Raise ValueError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: one of {', '.join(ACTIVATIONS)}")


@functools.cache
def hidden_units(activation: str) -> Callable[..., jax.Array]:
    """The function from up(x), or from up(x) and gate(x) for gated kinds, to hidden units."""
    act = ACTIVATIONS[activation]
    if activation in GATED:
        return lambda up, gate: act(gate) * up
    return act


def hidden_width(d_model: int, activation: str) -> int:
    """4 D, or 8/3 D for gated kinds (as many parameters), rounded up to a multiple of 16."""
    width = 8 * d_model // 3 if activation in GATED else 4 * d_model
    return -(-width // 16) * 16


@gin.configurable
class FeedForward(nnx.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) for the gated kinds.

    Args:
        d_model: D.
        d_ff: F, the hidden width; 4 D, or 8/3 D for the gated kinds, where None.
        activation: the gated kinds are "swiglu" and "geglu".
        out_scale: variance scale of the output weights.
    """

    def __init__(
        self,
        d_model: Count,
        d_ff: Count | None = None,
        activation: Activation = "swiglu",
        out_scale: Positive = 1.0,
    ):
        check_activation(activation)
        d_ff = d_ff or hidden_width(d_model, activation)
        self.activation = activation
        self.up_DF, self.gate_DF, self.down_FD = weights(d_model, d_ff, activation, out_scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        return feed_forward(x, self.up_DF, self.gate_DF, self.down_FD, self.activation)


def weights(
    d_model: int, d_ff: int, activation: str, out_scale: float
) -> tuple[nnx.Param, nnx.Param | None, nnx.Param]:
    """The parameters up (D, F), gate (D, F; None where there is none) and down (F, D)."""
    shape, axes = (d_model, d_ff), ("embed", "mlp")
    up_DF = parameter(shape, axes, truncated_normal(), role="feed_forward")
    gate_DF = None
    if activation in GATED:
        gate_DF = parameter(shape, axes, truncated_normal(), role="feed_forward")
    out = truncated_normal(out_scale)
    return up_DF, gate_DF, parameter(shape[::-1], axes[::-1], out, role="feed_forward")


def feed_forward(
    x: jax.Array, up_DF: nnx.Param, gate_DF: nnx.Param | None, down_FD: nnx.Param, activation: str
) -> jax.Array:
    """The feed-forward with these `weights` of x (..., D): (..., D)."""
    ups = [up_DF] if gate_DF is None else [up_DF, gate_DF]
    hidden = hidden_units(activation)(*(linear(x, up[...]) for up in ups))
    return linear(hidden, down_FD[...])
