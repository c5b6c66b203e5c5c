"""Sinkhorn routing (S-BASE): assignment from an entropic transport plan (Clark et al. 2022).

G groups, T tokens per group, D model width, E experts, K experts per token.
"""

from collections.abc import Sequence
from typing import Literal

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count, Positive
from routing.records import AnyArray, Causality, Routing, Sizes, TokenChoice
from routing.router import Router, check_k
from routing.selection import top_k


@gin.configurable
class Sinkhorn(Router):
    """The K largest entries of a token's row: in training of the plan, at evaluation of its logits.

    The plan has equal row sums and equal column sums (appendix B.2.1). Only gates have a gradient.

    Args:
        sizes: width, number of experts, vocabulary.
        k: experts per token.
        gates: "softmax" of the token's logits, or "sigmoid".
        tolerance: relative error of the column sums at which Sinkhorn's algorithm stops.
        iterations: the most iterations of Sinkhorn's algorithm.
        losses: none are needed; a balance loss would work against the plan.
    """

    causality = Causality.CAUSAL_AT_EVALUATION
    needs_all_experts = None
    decoding = "each token's largest logits"

    def __init__(
        self,
        sizes: Sizes,
        k: Count = 1,
        gates: Literal["softmax", "sigmoid"] = "softmax",
        tolerance: Positive = 1e-5,
        iterations: Count = 200,
        losses: Sequence[RouterLoss] = (),
    ):
        check_k("Sinkhorn", k, sizes)
        if gates not in ("softmax", "sigmoid"):
            raise ValueError(f"Sinkhorn.gates={gates!r}: softmax or sigmoid")
        if iterations < 1 or not tolerance > 0:
            raise ValueError(
                f"Sinkhorn.iterations={iterations} must be at least 1, and "
                f"tolerance={tolerance} above 0"
            )
        self.num_experts, self.k, self.gates = sizes.num_experts, k, gates
        self.tolerance, self.iterations, self.losses = tolerance, iterations, tuple(losses)
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal(), role="router")

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        prob_GTE = jax.nn.softmax(logits_GTE)
        preference_GTE = logits_GTE
        if inputs.train:
            fixed_GTE = jax.lax.stop_gradient(logits_GTE)
            stop = self.iterations, self.tolerance
            preference_GTE = transport_plan(fixed_GTE, inputs.valid_GT, *stop)
        expert_GTK = top_k(preference_GTE, self.k)
        gate_GTE = jax.nn.sigmoid(logits_GTE) if self.gates == "sigmoid" else prob_GTE
        gate_GTK = jnp.take_along_axis(gate_GTE, expert_GTK, -1)
        keep_GTK = jnp.ones_like(expert_GTK, bool)
        return Routing(
            TokenChoice(expert_GTK, gate_GTK, keep_GTK, self.num_experts), logits_GTE, prob_GTE
        )


def transport_plan(
    logits_GTE: Float[AnyArray, "G T E"],
    valid_GT: Bool[AnyArray, "G T"],
    iterations: int,
    tolerance: float = 0.0,
) -> jax.Array:
    """The log of the transport plan (G, T, E), by Sinkhorn's algorithm in log space.

    Valid rows sum to 1 / T exactly, columns to 1 / E within `tolerance`, unless `iterations` end
    before. A group that has converged is not changed any more, so that groups are independent.
    """
    lowest = jnp.asarray(-1e30, logits_GTE.dtype)
    log_GTE = jnp.where(valid_GT[..., None], logits_GTE, lowest)
    count_G = jnp.maximum(valid_GT.sum(1), 1).astype(logits_GTE.dtype)
    row_G11 = -jnp.log(count_G)[:, None, None]
    column = -jnp.log(jnp.asarray(logits_GTE.shape[-1], logits_GTE.dtype))

    def column_error_G1E(log_GTE):
        """The log of each column's sum, less log(1 / E)."""
        return jax.nn.logsumexp(log_GTE, axis=1, keepdims=True) - column

    def iterate(state):
        number, log_GTE, above_G1E, done_G = state
        new_GTE = log_GTE - above_G1E
        new_GTE = new_GTE - jax.nn.logsumexp(new_GTE, axis=2, keepdims=True) + row_G11
        new_GTE = jnp.where(valid_GT[..., None] & ~done_G[:, None, None], new_GTE, log_GTE)
        above_G1E = column_error_G1E(new_GTE)
        done_G = jnp.abs(above_G1E).max((1, 2)) <= tolerance
        return number + 1, new_GTE, above_G1E, done_G | ~valid_GT.any(1)

    def unfinished(state):
        number, *_, done_G = state
        return (number < iterations) & ~done_G.all()

    never_G = jnp.zeros_like(valid_GT[:, 0])
    return jax.lax.while_loop(
        unfinished, iterate, (0, log_GTE, column_error_G1E(log_GTE), never_G)
    )[1]
