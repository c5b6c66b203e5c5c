"""Feed-forward: dense, and one per expert. D model width, F hidden width, E experts, N rows."""

from collections.abc import Callable
import functools
from typing import Literal

from einops import rearrange
from flax import nnx
import gin
import jax
import jax.numpy as jnp

from layers.constrain import is_cut, per_shard
from layers.kernels.grouped_matmul import SortedRows, grouped_feed_forward
from layers.linear import linear
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count, Positive
from routing.records import ExpertMerge

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
    """Hidden units from up(x), or from up(x) and gate(x) for the gated kinds."""
    act = ACTIVATIONS[activation]
    if activation in GATED:
        return lambda up, gate: act(gate) * up
    return act


def hidden_width(d_model: int, activation: str) -> int:
    """4 D, or 8/3 D for the gated kinds (equal parameters), up to a multiple of 16."""
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
        shape, axes = (d_model, d_ff), ("embed", "mlp")
        self.up_DF = parameter(shape, axes, truncated_normal())
        gated = activation in GATED
        self.gate_DF = parameter(shape, axes, truncated_normal()) if gated else None
        self.down_FD = parameter((d_ff, d_model), ("mlp", "embed"), truncated_normal(out_scale))

    def __call__(self, x: jax.Array) -> jax.Array:
        ups = [self.up_DF] if self.gate_DF is None else [self.up_DF, self.gate_DF]
        hidden = hidden_units(self.activation)(*(linear(x, up[...]) for up in ups))
        return linear(hidden, self.down_FD[...])


@gin.configurable
class Experts(nnx.Module):
    """E feed-forwards, each on its own rows.

    Args:
        num_experts: E.
        d_model: D.
        d_ff: F, the hidden width of one.
        activation: as of FeedForward.
        out_scale: variance scale of the output weights.
    """

    def __init__(
        self,
        num_experts: Count,
        d_model: Count,
        d_ff: Count,
        activation: Activation = "swiglu",
        out_scale: Positive = 1.0,
    ):
        check_activation(activation)
        self.activation = activation
        shape, axes = (num_experts, d_model, d_ff), ("expert", "embed", "mlp")
        self.up_EDF = parameter(shape, axes, truncated_normal())
        gated = activation in GATED
        self.gate_EDF = parameter(shape, axes, truncated_normal()) if gated else None
        shape, axes = (num_experts, d_ff, d_model), ("expert", "mlp", "embed")
        self.down_EFD = parameter(shape, axes, truncated_normal(out_scale))

    def __call__(
        self,
        x_EGND: jax.Array | SortedRows,
        key_G: jax.Array | None = None,
        dropout: float = 0.0,
    ) -> jax.Array:
        """(E, G, N, D): expert e works on x_EGND[e]; G keeps the groups apart for the mesh.

        Of sorted rows (P, N, D), every expert works on its own.
        With keys for the groups, this share of the hidden units is dropped (expert dropout, Fedus
        et al. 2021, section 2.4).
        """
        if isinstance(x_EGND, SortedRows):
            return self._sorted(x_EGND)
        shape, dtype = x_EGND.shape, x_EGND.dtype
        # One row axis, as in layers.linear, unless a mesh cuts both of them.
        rows = shape[1:3] if is_cut("slot") else (-1,)
        x_END = x_EGND.reshape(shape[0], *rows, shape[-1])
        hidden = hidden_units(self.activation)(
            *(jnp.einsum("e...d,edf->e...f", x_END, up[...].astype(dtype)) for up in self._ups)
        )
        if key_G is not None and dropout > 0:
            kept_ENF = kept_units(key_G, shape, hidden.shape[-1], dropout)
            hidden = hidden * kept_ENF.reshape(hidden.shape).astype(dtype)
        y_END = jnp.einsum("e...f,efd->e...d", hidden, self.down_EFD[...].astype(dtype))
        return y_END.reshape(shape)

    @property
    def _ups(self) -> list[nnx.Param]:
        """What the hidden units are made with, as `hidden_units` takes it."""
        return [self.up_EDF] if self.gate_EDF is None else [self.up_EDF, self.gate_EDF]

    def _sorted(self, rows: SortedRows) -> jax.Array:
        dtype, activate = rows.rows_PND.dtype, hidden_units(self.activation)
        weights = tuple(w[...].astype(dtype) for w in (*self._ups, self.down_EFD))

        def one_part(x_1ND, count_1E, *weights):
            x_ND, count_E, ups, down_EFD = x_1ND[0], count_1E[0], weights[:-1], weights[-1]
            y_ND = grouped_feed_forward(x_ND, ups, down_EFD, count_E, activate, rows.kernel)
            return y_ND[None]

        held = "expert" if rows.own_experts else None
        axes = (*((held, "embed", "mlp") for _ in self._ups), (held, "mlp", "embed"))
        split = (rows.rows_PND, rows.count_PE)
        return per_shard(one_part, split, weights, axes, rows.shard_axis)

    def merged(self, x_GTD: jax.Array, decision: ExpertMerge) -> jax.Array:
        """(G, T, D): every segment through the mean of all experts that its weights make."""
        groups, segments, _ = decision.weight_GSE.shape
        tokens, width, dtype = x_GTD.shape[1], x_GTD.shape[-1], x_GTD.dtype
        more = ((0, 0), (0, segments * decision.segment - tokens), (0, 0))
        x_GSLD = jnp.pad(x_GTD, more).reshape(groups, segments, decision.segment, width)

        def mean(weight_EXY):
            return jnp.einsum("gse,exy->gsxy", decision.weight_GSE, weight_EXY).astype(dtype)

        hidden = hidden_units(self.activation)(
            *(jnp.einsum("gsld,gsdf->gslf", x_GSLD, mean(up[...])) for up in self._ups)
        )
        y_GSLD = jnp.einsum("gslf,gsfd->gsld", hidden, mean(self.down_EFD[...]))
        return y_GSLD.reshape(groups, -1, width)[:, :tokens]


def kept_units(key_G, shape_EGND, width: int, dropout: float) -> jax.Array:
    """0 for dropped hidden units, 1 / (1 - dropout) for the others: (E, G * N, F)."""
    experts, _, rows, _ = shape_EGND

    def draw(key):
        return jax.random.bernoulli(key, 1 - dropout, (experts, rows, width))

    return rearrange(jax.vmap(draw)(key_G), "g e n f -> e (g n) f") / (1 - dropout)
