"""The auction against SciPy's exact assignment: balance always, value to within half a percent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from routing.solvers.auction import balanced_assignment, quotas

assign = jax.jit(balanced_assignment)


def best_value(score_TE):
    """The value of the best assignment: every expert once for each token of its quota."""
    tokens, experts = score_TE.shape
    column_N = np.repeat(np.arange(experts), np.asarray(quotas(tokens, experts)))
    row, column = linear_sum_assignment(score_TE[:, column_N], maximize=True)
    return score_TE[row, column_N[column]].sum()


def scores(kind, tokens, experts):
    random = np.random.default_rng(tokens + experts)
    normal_TE = random.standard_normal((tokens, experts))
    if kind == "all tokens alike":
        return 2 + normal_TE[:1].repeat(tokens, 0)
    if kind == "nearly alike":
        return 2 + normal_TE[:1].repeat(tokens, 0) + 1e-3 * normal_TE
    if kind == "rank one":
        return np.outer(random.random(tokens), random.random(experts))
    if kind == "one expert loved":
        return normal_TE + 10 * (np.arange(experts) == experts - 1)
    if kind == "few kinds of token":
        kinds = random.standard_normal((8, experts))
        return kinds[random.integers(0, 8, tokens)] + 0.01 * normal_TE
    if kind == "yes or no":
        return (random.random((tokens, experts)) < 0.1).astype(float)
    if kind == "long tails":
        return random.standard_cauchy((tokens, experts))
    assert kind == "random"
    return normal_TE


KINDS = (
    "random",
    "all tokens alike",
    "nearly alike",
    "rank one",
    "one expert loved",
    "few kinds of token",
    "yes or no",
    "long tails",
)


@pytest.mark.parametrize("shape", [(256, 16), (250, 7), (3, 8), (64, 64)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_a_percent_of_the_best_and_always_balanced(kind, shape):
    score_TE = scores(kind, *shape).astype(np.float32)
    owner_T = np.asarray(assign(score_TE, np.ones(shape[0], bool)))
    np.testing.assert_array_equal(np.bincount(owner_T, minlength=shape[1]), quotas(*shape))
    value = score_TE[np.arange(shape[0]), owner_T].sum()
    best = best_value(score_TE)
    assert value >= best - 0.005 * abs(best), (value, best)


def test_padding_takes_no_place_and_changes_nothing():
    score_TE = scores("random", 40, 6).astype(np.float32)
    valid_T = np.ones(40, bool)
    valid_T[33:] = False
    score_TE[33:] = np.nan
    owner_T = np.asarray(assign(score_TE, valid_T))
    assert (owner_T[33:] == -1).all()
    np.testing.assert_array_equal(np.bincount(owner_T[:33], minlength=6), quotas(33, 6))


def test_permuted_tokens_are_permuted_owners():
    score_TE = scores("random", 64, 4).astype(np.float32)
    order_T = np.random.default_rng(0).permutation(64)
    valid_T = np.ones(64, bool)
    owner_T = np.asarray(assign(score_TE, valid_T))
    moved_T = np.asarray(assign(score_TE[order_T], valid_T))
    assert (moved_T == owner_T[order_T]).mean() > 0.95  # ties within the precision may differ


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_one_expert_and_no_tokens(tokens):
    valid_T = np.arange(5) < tokens
    np.testing.assert_array_equal(
        balanced_assignment(jnp.ones((5, 1)), valid_T), np.where(valid_T, 0, -1)
    )
    owner_T = np.asarray(balanced_assignment(jnp.ones((5, 3)), valid_T))
    counts_E = np.bincount(owner_T[:tokens], minlength=3)
    np.testing.assert_array_equal(counts_E, quotas(tokens, 3))


def test_rounds_are_bounded_and_the_rest_is_filled():
    score_TE = scores("few kinds of token", 250, 7).astype(np.float32)
    owner_T = balanced_assignment(jnp.asarray(score_TE), np.ones(250, bool), rounds=1)
    np.testing.assert_array_equal(np.bincount(owner_T, minlength=7), quotas(250, 7))
