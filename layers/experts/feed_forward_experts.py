"""Experts that are feed-forwards.

G groups, T tokens per group, D model width, F hidden width, E experts, C slots per expert, P shards
of a mesh with N rows each, S segments of T tokens of a merge.
"""

from typing import Literal

from einops import rearrange
from flax import nnx
import gin
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.dispatch.input_gates import GATED_DECISIONS, dispatch_gated, without_gates
from layers.experts.base import Experts, ExpertsOutput, LayerSizes
from layers.experts.feed_forward import GATED, check_activation, hidden_units
from layers.kernels.grouped_matmul import SortedRows, grouped_feed_forward
from layers.logical_axes import is_cut, per_shard
from routing.parameters import parameter, truncated_normal
from routing.ranges import LessThanOne
from routing.records import ExpertChoice, ExpertMerge, SoftSlots, TokenChoice


@gin.configurable
class FeedForwardExperts(Experts):
    """E feed-forwards, each on the rows of the tokens that go to it.

    Args:
        sizes: of the layer.
        dropout: share of the hidden units that is dropped in training, for fine-tuning (expert
            dropout, Fedus et al. 2021, section 2.4: 0.4).
        gates_on: what the gates multiply: an expert's "output", or its "input" (Llama 4), in which
            case outputs are summed without gates.
    """

    accepts = (TokenChoice, ExpertChoice, SoftSlots, ExpertMerge)
    shows_slots = True

    def __init__(
        self,
        sizes: LayerSizes,
        dropout: LessThanOne = 0.0,
        gates_on: Literal["output", "input"] = "output",
    ):
        check_activation(sizes.activation)
        if not 0 <= dropout < 1:
            raise ValueError(f"FeedForwardExperts.dropout={dropout} must lie in [0, 1)")
        if gates_on not in ("output", "input"):
            raise ValueError(f"FeedForwardExperts.gates_on={gates_on!r}: output or input")
        self.activation, self.dropout, self.gates_on = sizes.activation, dropout, gates_on
        self.hidden_width = sizes.d_ff
        if gates_on == "input":
            self.accepts = GATED_DECISIONS
        if dropout:
            self.accepts = tuple(kind for kind in self.accepts if kind is not ExpertMerge)
        shape = (sizes.num_experts, sizes.d_model, sizes.d_ff)
        axes = ("expert", "embed", "mlp")
        self.up_EDF = parameter(shape, axes, truncated_normal(), role="expert")
        gated = sizes.activation in GATED
        self.gate_EDF = parameter(shape, axes, truncated_normal(), role="expert") if gated else None
        shape, axes = (sizes.num_experts, sizes.d_ff, sizes.d_model), ("expert", "mlp", "embed")
        out = truncated_normal(sizes.out_scale)
        self.down_EFD = parameter(shape, axes, out, role="expert")

    def needs_slots(self, train: bool) -> bool:
        return train and self.dropout > 0  # the units to drop are drawn slot by slot

    def __call__(self, x_GTD: Float[Array, "G T D"], decision, inputs, dispatcher) -> ExpertsOutput:
        if isinstance(decision, ExpertMerge):
            with jax.named_scope("merged_experts"):
                return ExpertsOutput(self.merged(x_GTD, decision))
        with jax.named_scope("dispatch"):
            if self.gates_on == "input":
                rows = dispatch_gated(dispatcher, x_GTD, decision)
                decision = without_gates(decision)
            else:
                rows = dispatcher.dispatch(x_GTD, decision)
        with jax.named_scope("experts"):
            drops = inputs.train and self.dropout > 0
            expert_rows = self.on_rows(rows, inputs.keys_G("expert_dropout") if drops else None)
        with jax.named_scope("combine"):
            y_GTD = dispatcher.combine(expert_rows, decision)
        return ExpertsOutput(y_GTD, None if isinstance(rows, SortedRows) else expert_rows)

    def on_rows(self, rows: jax.Array | SortedRows, key_G: jax.Array | None = None) -> jax.Array:
        """The experts' outputs for their rows: (E, G, C, D).

        For `SortedRows` (P, N, D), multiplied by `combine_PN`.

        Args:
            rows: (E, G, C, D) by slot, or sorted.
            key_G: a key for each group, with which hidden units are dropped; None to drop none.
        """
        if isinstance(rows, SortedRows):
            return self._sorted(rows)
        shape, dtype = rows.shape, rows.dtype
        # One row axis, as in layers.linear, unless a mesh shards both of them.
        row_axes = shape[1:3] if is_cut("slot") else (-1,)
        x = rows.reshape(shape[0], *row_axes, shape[-1])
        hidden = hidden_units(self.activation)(
            *(matmul("e...d,edf->e...f", x, up[...].astype(dtype)) for up in self._ups)
        )
        if key_G is not None:
            kept_ENF = kept_units(key_G, shape, hidden.shape[-1], self.dropout)
            hidden = hidden * kept_ENF.reshape(hidden.shape).astype(dtype)
        y = matmul("e...f,efd->e...d", hidden, self.down_EFD[...].astype(dtype))
        return y.reshape(shape)

    @property
    def _ups(self) -> list[nnx.Param]:
        """The weights of the hidden units, in the order that `hidden_units` takes them."""
        return [self.up_EDF] if self.gate_EDF is None else [self.up_EDF, self.gate_EDF]

    def _sorted(self, rows: SortedRows) -> jax.Array:
        dtype, activate = rows.rows_PND.dtype, hidden_units(self.activation)
        weights = tuple(w[...].astype(dtype) for w in (*self._ups, self.down_EFD))

        def one_shard(x_1ND, combine_1N, count_1E, *weights):
            x_ND, combine_N, count_E = x_1ND[0], combine_1N[0], count_1E[0]
            *ups, down_EFD = weights
            given = x_ND, combine_N, tuple(ups), down_EFD, count_E
            return grouped_feed_forward(*given, activate, rows.kernel)[None]

        held = "expert" if rows.local_experts else None
        axes = (*((held, "embed", "mlp") for _ in self._ups), (held, "mlp", "embed"))
        split = (rows.rows_PND, rows.combine_PN, rows.count_PE)
        return per_shard(one_shard, split, weights, axes, rows.shard_axis)

    def merged(self, x_GTD: Float[Array, "G T D"], decision: ExpertMerge) -> jax.Array:
        """(G, T, D): every segment through one expert, the weighted mean of all parameters."""
        groups, segments, _ = decision.weight_GSE.shape
        tokens, width, dtype = x_GTD.shape[1], x_GTD.shape[-1], x_GTD.dtype
        more = ((0, 0), (0, segments * decision.segment - tokens), (0, 0))
        x_GSTD = jnp.pad(x_GTD, more).reshape(groups, segments, decision.segment, width)

        def mean(weight):
            return jnp.einsum("gse,eab->gsab", decision.weight_GSE, weight).astype(dtype)

        hidden = hidden_units(self.activation)(
            *(matmul("gstd,gsdf->gstf", x_GSTD, mean(up[...])) for up in self._ups)
        )
        y_GSTD = matmul("gstf,gsfd->gstd", hidden, mean(self.down_EFD[...]))
        return y_GSTD.reshape(groups, -1, width)[:, :tokens]


def matmul(letters: str, rows: jax.Array, weight: jax.Array) -> jax.Array:
    """An experts' matmul under the name by which rematerialisation saves it."""
    return checkpoint_name(jnp.einsum(letters, rows, weight), "expert_matmuls")


def kept_units(key_G, shape: tuple[int, ...], width: int, dropout: float) -> jax.Array:
    """(E, G * C, F): 0 for dropped hidden units, 1 / (1 - dropout) for the others.

    shape: of the rows, (E, G, C, D). width: F.
    """
    experts, _, rows, _ = shape

    def draw(key):
        return jax.random.bernoulli(key, 1 - dropout, (experts, rows, width))

    return rearrange(jax.vmap(draw)(key_G), "g e n f -> e (g n) f") / (1 - dropout)
