"""Experts of one hidden unit each (PEER, He 2024), whose weights are gathered for each token.

G groups, T tokens, D model width, E experts, K experts per token, N assignments at a time.
"""

from einops import rearrange
import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.experts.base import Experts, ExpertsOutput, LayerSizes
from routing.parameters import normal, parameter, truncated_normal
from routing.records import TokenChoice

AT_A_TIME = 16


@gin.configurable
class NeuronExperts(Experts):
    """y = sum_k gate_k gelu(u_k . x) v_k over the experts that a token chose (section 2.1).

    The layer's d_ff, activation, capacity and dispatcher are not used.

    Args:
        sizes: of the layer.
    """

    takes_repeats = True
    has_capacity = False
    are_neurons = True

    def __init__(self, sizes: LayerSizes):
        shape, axes = (sizes.num_experts, sizes.d_model), ("expert", "embed")
        # u has fan-in D, v a fan-in of one unit.
        self.down_ED = parameter(shape, axes, truncated_normal(), role="expert")
        self.up_ED = parameter(shape, axes, normal(0.1 * sizes.out_scale**0.5), role="expert")

    def __call__(self, x_GTD: Float[Array, "G T D"], decision, inputs, dispatcher) -> ExpertsOutput:
        # Some assignments at a time: the weights of all would not fit in memory.
        assert isinstance(decision, TokenChoice)
        dtype = x_GTD.dtype
        down_ED, up_ED = self.down_ED[...], self.up_ED[...]
        gate_GTK = jnp.where(decision.keep_GTK, decision.gate_GTK, 0).astype(dtype)
        k = gate_GTK.shape[-1]
        pieces = next(n for n in range(-(-k // AT_A_TIME), k + 1) if k % n == 0)

        def cut(a_GTK):
            return rearrange(a_GTK, "g t (p n) -> p g t n", p=pieces)

        def rows(weight_ED, expert_GTN):
            # Gathered in float32 and then cast, so that gradients are summed in float32.
            return weight_ED[expert_GTN].astype(dtype)

        @jax.checkpoint
        def add(y_GTD, piece):
            expert_GTN, gate_GTN = piece
            hidden_GTN = jnp.einsum("gtd,gtnd->gtn", x_GTD, rows(down_ED, expert_GTN))
            weight_GTN = gate_GTN * jax.nn.gelu(hidden_GTN)
            return y_GTD + jnp.einsum("gtn,gtnd->gtd", weight_GTN, rows(up_ED, expert_GTN)), None

        pieces_of = cut(decision.expert_GTK), cut(gate_GTK)
        return ExpertsOutput(jax.lax.scan(add, jnp.zeros_like(x_GTD), pieces_of)[0])
