"""Product keys: the best of E experts, found among sqrt(E) keys twice (He 2024).

G groups, T tokens per group, D model width, H heads, X = 2 halves of a query, Q the width of one, N
subkeys of each half (E = N^2 experts), K experts per head.
"""

from collections.abc import Sequence
import math

import gin
import jax
import jax.numpy as jnp

from routing.inputs import RouterInputs
from routing.losses import RouterLoss
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count
from routing.records import Causality, Routing, Sizes, TokenChoice
from routing.router import Router, check_k
from routing.selection import top_k


@gin.configurable
class ProductKeys(Router):
    """PEER's retrieval (He 2024, section 2.2): expert (i, j) scores q_1 . c_i + q_2 . d_j.

    The K best of all N^2 are among the K best i and the K best j (Lample et al. 2019). Each head
    has a query of its own; all share the keys. The gates of a head are a softmax over its K. The
    paper normalises queries over the batch; here each is normalised separately, so that tokens
    don't affect each other.

    Args:
        sizes: width; a square number of experts.
        heads: H; a token uses H * K experts.
        k: K.
        query_width: 2 Q; D where None.
        losses: none are needed.
    """

    causality = Causality.CAUSAL
    repeats_experts = True
    needs_all_experts = "experts are all pairs of two sets of keys"
    decoding = "as in training"

    def __init__(
        self,
        sizes: Sizes,
        heads: Count = 4,
        k: Count = 8,
        query_width: Count | None = None,
        losses: Sequence[RouterLoss] = (),
    ):
        side = math.isqrt(sizes.num_experts)
        if side * side != sizes.num_experts:
            raise ValueError(
                f"ProductKeys needs a square number of experts, not {sizes.num_experts}; the "
                f"nearest are {side**2} and {(side + 1) ** 2}"
            )
        check_k("ProductKeys", k, Sizes(sizes.d_model, side, sizes.vocab_size))
        if k == 1 and side > 1:
            raise ValueError(
                "ProductKeys.k=1 makes every gate 1 and starves the router of its gradient; use 2 "
                "or more"
            )
        if heads < 1:
            raise ValueError(f"ProductKeys.heads={heads} must be at least 1")
        width = query_width or sizes.d_model
        if width % 2:
            raise ValueError(f"ProductKeys.query_width={width} must be even: it has two halves")
        self.num_experts, self.k, self.losses = sizes.num_experts, k, tuple(losses)
        shape, axes = (sizes.d_model, heads, 2, width // 2), ("embed", None, None, None)
        self.query_DHXQ = parameter(shape, axes, truncated_normal(), role="router")
        # A half's scores have unit variance for a query of unit mean square.
        shape = (width // 2, 2, side)
        self.key_QXN = parameter(shape, (None, None, None), truncated_normal(), role="router")

    def route(self, inputs: RouterInputs) -> Routing:
        query_GTHXQ = jnp.einsum("gtd,dhxq->gthxq", inputs.x_GTD, self.query_DHXQ[...])
        square = jnp.square(query_GTHXQ).mean((-2, -1), keepdims=True)
        query_GTHXQ = query_GTHXQ * jax.lax.rsqrt(square + 1e-6)
        score_GTHXN = jnp.einsum("gthxq,qxn->gthxn", query_GTHXQ, self.key_QXN[...])
        expert_GTHK, best_GTHK = best_pairs(score_GTHXN, self.k)
        gate_GTHK = jax.nn.softmax(best_GTHK)
        flat = (*expert_GTHK.shape[:2], -1)
        expert_GTK = expert_GTHK.reshape(flat)
        keep_GTK = jnp.ones_like(expert_GTK, bool)
        return Routing(TokenChoice(expert_GTK, gate_GTHK.reshape(flat), keep_GTK, self.num_experts))


def best_pairs(score, k: int) -> tuple[jax.Array, jax.Array]:
    """The k pairs (i, j) of subkeys with the largest sums of scores: i * N + j, and the sums.

    score: of the subkeys of both halves (..., 2, N). Both results are (..., k).
    """
    side = score.shape[-1]
    index = top_k(score, k)
    best = jnp.take_along_axis(score, index, -1)
    sums = best[..., 0, :, None] + best[..., 1, None, :]
    sums = sums.reshape(*sums.shape[:-2], k * k)
    pair = top_k(sums, k)
    first = jnp.take_along_axis(index[..., 0, :], pair // k, -1)
    second = jnp.take_along_axis(index[..., 1, :], pair % k, -1)
    return first * side + second, jnp.take_along_axis(sums, pair, -1)
