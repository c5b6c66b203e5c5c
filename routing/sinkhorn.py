"""Sinkhorn routing (S-BASE): assignment from an entropic transport plan (Clark et al. 2022).

G groups, T tokens per group, D model width, E experts, K experts per token.
"""

from collections.abc import Sequence
from typing import Literal

import gin
import jax
import jax.numpy as jnp

from routing.losses import RouterLoss
from routing.parameters import parameter, truncated_normal
from routing.records import Causality, RouterInputs, Routing, Sizes, TokenChoice
from routing.router import Router, check_k
from routing.selection import pick


@gin.configurable
class Sinkhorn(Router):
    """In training the K largest of a token's row of the plan, at evaluation of its own logits.

    The plan has equal rows and equal columns (appendix B.2.1); no gradient flows through it, only
    through the gate.

    Args:
        sizes: width, number of experts, vocabulary.
        k: experts per token.
        gates: "softmax" of the token's own logits, or "sigmoid".
        iterations: of Sinkhorn's algorithm, in log space; a fixed number.
        losses: none are needed; a balance loss would work against the plan.
    """

    causality = Causality.CAUSAL_AT_EVALUATION
    decoding = "each token's largest logits"

    def __init__(
        self,
        sizes: Sizes,
        k: int = 1,
        gates: Literal["softmax", "sigmoid"] = "softmax",
        iterations: int = 8,
        losses: Sequence[RouterLoss] = (),
    ):
        check_k("Sinkhorn", k, sizes)
        if gates not in ("softmax", "sigmoid"):
            raise ValueError(f"Sinkhorn.gates={gates!r}: softmax or sigmoid")
        if iterations < 1:
            raise ValueError(f"Sinkhorn.iterations={iterations} must be at least 1")
        self.num_experts, self.k, self.gates = sizes.num_experts, k, gates
        self.iterations, self.losses = iterations, tuple(losses)
        shape = (sizes.d_model, sizes.num_experts)
        self.weight_DE = parameter(shape, ("embed", None), truncated_normal())

    def route(self, inputs: RouterInputs) -> Routing:
        logits_GTE = jnp.einsum("gtd,de->gte", inputs.x_GTD, self.weight_DE[...])
        prob_GTE = jax.nn.softmax(logits_GTE)
        preference_GTE = logits_GTE
        if inputs.train:
            fixed_GTE = jax.lax.stop_gradient(logits_GTE)
            preference_GTE = transport_plan(fixed_GTE, inputs.valid_GT, self.iterations)
        expert_GTK = pick(preference_GTE, self.k)
        gate_GTE = jax.nn.sigmoid(logits_GTE) if self.gates == "sigmoid" else prob_GTE
        gate_GTK = jnp.take_along_axis(gate_GTE, expert_GTK, -1)
        keep_GTK = jnp.ones_like(expert_GTK, bool)
        return Routing(
            TokenChoice(expert_GTK, gate_GTK, keep_GTK, self.num_experts), logits_GTE, prob_GTE
        )


def transport_plan(logits_GTE, valid_GT, iterations: int) -> jax.Array:
    """Log of the plan: every valid row sums to 1 / T, every column nearly to 1 / E (G, T, E).

    In log space, so that no logit is too large; columns first, rows last, so that rows are exact.
    """
    lowest = jnp.asarray(-1e30, logits_GTE.dtype)
    log_GTE = jnp.where(valid_GT[..., None], logits_GTE, lowest)
    count_G = jnp.maximum(valid_GT.sum(1), 1).astype(logits_GTE.dtype)
    row_G11 = -jnp.log(count_G)[:, None, None]
    column = -jnp.log(jnp.asarray(logits_GTE.shape[-1], logits_GTE.dtype))

    def one(_, log_GTE):
        log_GTE = log_GTE - jax.nn.logsumexp(log_GTE, axis=1, keepdims=True) + column
        log_GTE = log_GTE - jax.nn.logsumexp(log_GTE, axis=2, keepdims=True) + row_G11
        return jnp.where(valid_GT[..., None], log_GTE, lowest)

    return jax.lax.fori_loop(0, iterations, one, log_GTE)
