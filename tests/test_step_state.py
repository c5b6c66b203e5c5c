"""Router state that follows the steps: thresholds, quantiles, temperatures."""

import dataclasses

from goldens import inputs_of
import jax.numpy as jnp
import numpy as np
import pytest
from rows import compiled, draw, finite, tokens, values_of

from layers.dispatch import Sorted
from routing import (
    DSelectK,
    ExpertChoiceRouter,
    QuantileBalancer,
    ReMoE,
    Sizes,
    SoftChoice,
    SoftMoE,
    TopK,
    initialize,
)

T, D, E = 64, 6, 4


def tilted(seed=0):
    """Tokens that all lean one way."""
    return np.random.default_rng(seed).standard_normal((T, D)) + 1.0


def inputs(seed=0, train=True):
    return inputs_of(tilted(seed), "float32", train=train)


@pytest.mark.thorough
def test_a_quantile_step_balances_the_batch_that_it_saw():
    options = {"k": 2, "gates": "sigmoid", "losses": (), "balancer": QuantileBalancer}
    router = initialize(TopK(Sizes(D, E, 9), **options), 0)
    before = router(inputs())
    assert before.stats.count_E.max() > 1.3 * T * 2 / E, "skewed, or there is nothing to show"
    for _ in range(4):
        router.balancer.update(router(inputs()).stats)
    after = router(inputs()).stats.count_E
    assert after.max() <= 1.1 * T * 2 / E, after
    other = router(inputs(1)).stats.count_E
    assert other.max() < before.stats.count_E.max()


def test_a_quantile_balancer_refuses_to_balance_all_experts():
    router = initialize(TopK(Sizes(D, E, 9), k=E, balancer=QuantileBalancer), 0)
    with pytest.raises(ValueError, match="can't balance k=4 of 4 experts"):
        router(inputs())


def test_thresholds_make_evaluation_take_as_many_tokens_as_training():
    router = initialize(ExpertChoiceRouter(Sizes(D, E, 9), decay=0.5), 0)
    for _ in range(12):
        output = router(inputs())
        router.thresholds.update(output.stats)
    # The running mean has converged to the lowest score that each expert took.
    lowest_E = np.asarray(output.decision.gate_GEC).min(-1)[0]
    np.testing.assert_allclose(router.thresholds.threshold_E[...], lowest_E, rtol=1e-3)
    taken_E = np.asarray(router(inputs(train=False)).stats.count_E)
    np.testing.assert_allclose(taken_E, T * 2 / E, atol=1)


@pytest.mark.thorough
def test_a_cap_holds_at_evaluation_too():
    router = initialize(ExpertChoiceRouter(Sizes(D, 8, 9), most_experts=3, decay=0.0), 0)
    router.weight_DE.set_value(3 * router.weight_DE[...])
    router.thresholds.update(router(inputs()).stats)
    decision = router(inputs(train=False)).decision
    per_token_T = np.asarray(decision.keep_GTK).sum(-1)[0]
    assert per_token_T.max() <= 3 and 1.0 < per_token_T.mean() <= 2.0


@pytest.mark.thorough
def test_one_expert_takes_every_token():
    router = initialize(ExpertChoiceRouter(Sizes(D, 1, 9), capacity_factor=1.0), 0)
    assert int(router(inputs(train=False)).stats.count_E[0]) == T
    router.thresholds.update(router(inputs()).stats)
    assert int(router(inputs(train=False)).stats.count_E[0]) == T


@pytest.mark.thorough
def test_the_selectors_entropy_counts_more_and_more():
    constant = initialize(DSelectK(Sizes(D, E, 9)), 0)(inputs()).losses["selector_entropy"]
    router = initialize(DSelectK(Sizes(D, E, 9), ramp_steps=4), 0)
    found = []
    for _ in range(6):
        output = router(inputs())
        found.append(output.losses["selector_entropy"])
        router.ramp.update(output.stats)
    expected = [float(constant) * share for share in (0, 0.25, 0.5, 0.75, 1, 1)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert float(constant) > 1


@pytest.mark.thorough
def test_selectors_that_have_decided_have_two_experts_computed():
    """Of four, which all had a weight at the start: the rows of the others are not there."""
    router = initialize(DSelectK(Sizes(D, E, 9), k=2), 0)
    per_token = []
    for _ in range(2):
        told = inputs(train=False)
        rows = Sorted().dispatch(told.x_GTD, router(told).decision)
        per_token.append(float(rows.count_PE.sum()) / T)
        router.code_DKM.set_value(1e6 * router.code_DKM[...])
    assert per_token[0] == E and 1 <= per_token[1] <= 2


@pytest.mark.thorough
def test_the_penalty_of_remoe_comes_back_from_zero():
    """k of 8 above half: sparsity starts above its target, and lambda shrinks to its floor."""
    router = initialize(ReMoE(Sizes(D, 8, 9), k=6), 0)
    for _ in range(400):
        router.penalty.update(router(inputs()).stats)
    low = float(router.penalty.weight[...])
    assert low > 0
    full = dataclasses.replace(
        router(inputs()).stats, batch_sums={"router": {"active": jnp.full(8, T)}}
    )
    for _ in range(10):
        router.penalty.update(full)
    assert float(router.penalty.weight[...]) > 5 * low


@pytest.mark.parametrize("name", ["noisy", "strictly_balanced", "sigmoid", "dselect_k"])
def test_extreme_weights_leave_gradients_finite(name):
    """Logits of hundreds, noise that has died out: finite gradients to every parameter."""
    run, params = compiled(name), dict(values_of(name)[0])
    for parameter, value in params.items():
        if "router." in parameter:
            random = np.random.default_rng(1).standard_normal(value.shape)
            params[parameter] = jnp.asarray(60 * random, jnp.float32)
    grads = run(params, draw(0, 24, 11, 8), tokens(), draw(1, 24, 11, 8))[:2]
    assert finite(grads)


def test_a_step_of_padding_leaves_thresholds_alone():
    router = initialize(ExpertChoiceRouter(Sizes(D, E, 9)), 0)
    before_E = np.asarray(router.thresholds.threshold_E[...])
    nothing = dataclasses.replace(inputs(), valid_GT=jnp.zeros((1, T), bool))
    router.thresholds.update(router(nothing).stats)
    np.testing.assert_array_equal(router.thresholds.threshold_E[...], before_E)


@pytest.mark.thorough
def test_soft_choice_starts_as_soft_moe_and_ends_hard():
    soft = initialize(SoftMoE(Sizes(D, E, 9), slots_per_expert=3), 0)
    router = initialize(SoftChoice(Sizes(D, E, 9), 3, read=1e-3, write=1e-3, cooling_steps=5), 0)
    one, other = soft(inputs()).decision, router(inputs()).decision
    np.testing.assert_allclose(one.dispatch_GTES, other.dispatch_GTES, atol=1e-7)
    np.testing.assert_allclose(one.combine_GTES, other.combine_GTES, atol=1e-7)
    for _ in range(7):
        router.cooling.update(router(inputs()).stats)
    np.testing.assert_allclose(router.cooling.heat_2[...], 1e-3, rtol=1e-4)
    hard = router(inputs()).decision
    # A slot reads its best token, and a token its best slot.
    np.testing.assert_array_equal(
        np.argmax(hard.dispatch_GTES[0], 0), np.argmax(one.dispatch_GTES[0], 0)
    )
    assert np.median(np.asarray(hard.dispatch_GTES[0]).max(0)) > 0.999
    best_T = np.asarray(one.combine_GTES[0]).reshape(T, -1).argmax(1)
    hard_TN = np.asarray(hard.combine_GTES[0]).reshape(T, -1)
    np.testing.assert_array_equal(hard_TN.argmax(1), best_T)
    assert np.median(hard_TN.max(1)) > 0.999
