"""Gradient estimators of random choices (Bengio et al. 2013).

Functions of logits a and uniform draws u in (0, 1) of the same shape; p = sigmoid(a).
"""

import jax
import jax.numpy as jnp


def straight_through(a, u) -> jax.Array:
    """h ~ B(p); dL/da is estimated by dL/dh (section 4, the identity)."""
    fires = (u < jax.nn.sigmoid(a)).astype(a.dtype)
    return a + jax.lax.stop_gradient(fires - a)


def straight_through_slope(a, u) -> jax.Array:
    """h ~ B(p); dL/da is estimated by p (1 - p) dL/dh."""
    p = jax.nn.sigmoid(a)
    fires = (u < p).astype(a.dtype)
    return p + jax.lax.stop_gradient(fires - p)


def stochastic_times_smooth(a, u) -> jax.Array:
    """h = b sqrt(p), b ~ B(sqrt(p)), so that E[h] = p; b has no gradient (eq. 5-6)."""
    root = jnp.exp(0.5 * jax.nn.log_sigmoid(a))
    return jax.lax.stop_gradient((u < root).astype(a.dtype)) * root


def noisy_rectifier(a, u) -> jax.Array:
    """h = max(0, a + z), z logistic: P(h > 0) = p and E[h] = softplus(a) (eq. 2-4)."""
    return jax.nn.relu(a + jnp.log(u) - jnp.log1p(-u))


def bernoulli(a, u) -> tuple[jax.Array, jax.Array]:
    """h ~ B(p) without a gradient, and its log-probability, whose gradient is h - p (eq. 8)."""
    fires = u < jax.nn.sigmoid(a)
    log_prob = jnp.where(fires, jax.nn.log_sigmoid(a), jax.nn.log_sigmoid(-a))
    return fires.astype(a.dtype), log_prob


def gumbel(u) -> jax.Array:
    """Standard Gumbel noise: the argmax of logits + noise is a draw from their softmax."""
    return -jnp.log(-jnp.log(u))
