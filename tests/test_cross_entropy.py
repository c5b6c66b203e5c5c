"""layers/kernels/cross_entropy.py against the formula that a reader would write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels import cross_entropy


def plain(weight_DV, hidden_BTD, target_BT, scored_BT):
    log_prob_BTV = jax.nn.log_softmax(hidden_BTD @ weight_DV)
    picked_BT = jnp.take_along_axis(log_prob_BTV, target_BT[..., None], axis=-1)[..., 0]
    return -jnp.where(scored_BT, picked_BT, 0).sum()


@pytest.mark.parametrize("tokens", [1, 7, 12])
@pytest.mark.parametrize("block", [1, 50, 10**9])
def test_value_and_gradients_are_those_of_the_formula(tokens, block, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_LOGITS", block)
    keys = jax.random.split(jax.random.key(0), 4)
    weight_DV = jax.random.normal(keys[0], (5, 11))
    hidden_BTD = 3 * jax.random.normal(keys[1], (2, tokens, 5))
    target_BT = jax.random.randint(keys[2], (2, tokens), 0, 11)
    scored_BT = jax.random.bernoulli(keys[3], 0.7, (2, tokens))
    rest = (target_BT, scored_BT)

    def ours(w, h):
        return 0.5 * cross_entropy.cross_entropy_sums(w, h, *rest, rest[-1])[0]

    def theirs(w, h):
        return 0.5 * plain(w, h, *rest)

    value, gradient = jax.value_and_grad(ours, (0, 1))(weight_DV, hidden_BTD)
    expected, expected_gradient = jax.value_and_grad(theirs, (0, 1))(weight_DV, hidden_BTD)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_large_logits_stay_finite():
    weight_DV = 1e4 * jnp.eye(4)
    hidden_BTD = jnp.eye(4)[None]
    target_BT = jnp.zeros((1, 4), jnp.int32)
    scored_BT = target_BT == 0
    total, _ = cross_entropy.cross_entropy_sums(
        weight_DV, hidden_BTD, target_BT, scored_BT, scored_BT
    )
    np.testing.assert_allclose(total, 3e4, rtol=1e-6)
