"""Expert choice with at most so many experts per token (Zhou et al. 2022, section 3.3).

G groups, E experts, T tokens per group.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from routing.records import AnyArray


def capped_plan(
    score_GET: Float[AnyArray, "G E T"],
    valid_GT: Bool[AnyArray, "G T"],
    slots_G: Int[AnyArray, " G"],
    most: float,
    entropy: float,
    iterations: int,
):
    """argmax <S, A> + entropy * H(A) with rows summing to slots, columns at most to `most`, A <= 1.

    The Kullback-Leibler projection of exp(S / entropy) onto the three sets, by Dykstra's algorithm
    in log space. The row constraint is affine and needs no correction; the other two have one.
    Rows are projected last, so that they hold exactly.

    Returns:
        A (G, E, T).
    """
    lowest = -1e30
    log_GET = jnp.where(valid_GT[:, None], score_GET / entropy, lowest)
    zero_GET = jnp.zeros_like(log_GET)
    want_G11 = jnp.log(jnp.maximum(slots_G, 1).astype(log_GET.dtype))[:, None, None]
    most_log = jnp.log(jnp.asarray(most, log_GET.dtype))

    def cycle(_, carry):
        log_GET, column_GET, box_GET = carry
        moved_GET = log_GET + column_GET
        sum_G1T = jax.nn.logsumexp(moved_GET, axis=1, keepdims=True)
        log_GET = moved_GET - jnp.maximum(sum_G1T - most_log, 0)
        column_GET = moved_GET - log_GET
        moved_GET = log_GET + box_GET
        log_GET = jnp.minimum(moved_GET, 0)
        box_GET = moved_GET - log_GET
        sum_GE1 = jax.nn.logsumexp(log_GET, axis=2, keepdims=True)
        log_GET = log_GET - sum_GE1 + want_G11
        log_GET = jnp.where(valid_GT[:, None], log_GET, lowest)
        return log_GET, column_GET, box_GET

    log_GET = jax.lax.fori_loop(0, iterations, cycle, (log_GET, zero_GET, zero_GET))[0]
    return jnp.exp(log_GET)
