"""The shared expert: a feed-forward for every token, beside the routed experts. D model width."""

import gin
import jax
import jax.numpy as jnp

from layers.experts.base import Companion, LayerSizes, Routed
from layers.experts.feed_forward import feed_forward, weights
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count


@gin.configurable
class SharedExpert(Companion):
    """A feed-forward that every token uses (DeepSeekMoE, Dai et al. 2024, section 3.2).

    Args:
        sizes: of the layer.
        count: its hidden width, in widths of a routed expert.
        gated: its output is multiplied by sigmoid(w . x) of each token (Qwen2-MoE, Qwen3-Next).
    """

    name = "shared"

    def __init__(self, sizes: LayerSizes, count: Count = 1, gated: bool = False):
        if count < 1:
            raise ValueError(f"SharedExpert.count={count} must be at least 1")
        self.activation, self.hidden_width = sizes.activation, count * sizes.d_ff
        d_model = sizes.d_model
        parameters = weights(d_model, self.hidden_width, sizes.activation, sizes.out_scale)
        self.up_DF, self.gate_DF, self.down_FD = parameters
        gate = (d_model,), ("embed",), truncated_normal()
        self.sigmoid_D = parameter(*gate, role="companion") if gated else None

    def __call__(self, routed: Routed) -> jax.Array:
        """(B, T, D): its outputs by sequences, as dense layers are sharded."""
        groups, tokens, width = routed.x_GTD.shape
        sequences = routed.inputs.sequences
        x_BTD = routed.x_GTD.reshape(groups * sequences, tokens // sequences, width)
        with jax.named_scope("shared_experts"):
            y_BTD = feed_forward(x_BTD, self.up_DF, self.gate_DF, self.down_FD, self.activation)
            if self.sigmoid_D is None:
                return y_BTD
            gate_BT = jnp.einsum("btd,d->bt", x_BTD, self.sigmoid_D[...].astype(x_BTD.dtype))
            return jax.nn.sigmoid(gate_BT)[..., None] * y_BTD
