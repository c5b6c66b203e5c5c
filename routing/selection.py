"""Selection of the K largest scores; ties go to the lowest index. G groups, T tokens, E experts."""

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float


def top_k(score_GTE: Float[Array, "*rows E"], k: int) -> jax.Array:
    """The k experts of largest score (ties: the lowest index), int32 (G, T, K), largest first.

    Without a gradient. Rematerialisation saves the indices by name, so that it never routes again;
    gates are gathered with them.
    """
    return checkpoint_name(top_k_indices(jax.lax.stop_gradient(score_GTE), k), "routing")


def top_k_indices(score_GTE: Float[Array, "*rows E"], k: int) -> jax.Array:
    """Indices of the k largest along the last axis, the largest first; ties: the lowest index.

    Equivalent to: jax.lax.top_k(score_GTE, k)[1], as long as k scores are above minus infinity.
    XLA doesn't partition jax.lax.top_k: on a mesh every device would gather the scores of all
    groups and select for all of them. K rounds of argmax stay on the tokens' devices.
    """
    index_GTE = jax.lax.broadcasted_iota(jnp.int32, score_GTE.shape, score_GTE.ndim - 1)
    rounds = []
    for _ in range(k):
        best_GT = jnp.argmax(score_GTE, axis=-1).astype(jnp.int32)
        score_GTE = jnp.where(index_GTE == best_GT[..., None], -jnp.inf, score_GTE)
        rounds.append(best_GT)
    return jnp.stack(rounds, axis=-1)
