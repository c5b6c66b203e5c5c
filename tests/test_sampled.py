"""Estimators of gradients through random choices (golden 14), and reinforce in a whole model."""

from goldens import golden, same
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import bench_of

from moe.conformance.whole_model import Setting, batch_of, program
from moe.training.losses import policy_losses
from routing import Policy
from routing.solvers import estimators

N = 200_000


def draws(seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(1e-6, 1 - 1e-6, (N, 1)), jnp.float32)


def test_means_and_chances_of_the_estimators():
    given, told = golden("14_stochastic_neurons")
    a_1A = jnp.asarray(given["a"], jnp.float32)[None]
    rectified = estimators.noisy_rectifier(a_1A, draws())
    near = {"rtol": 0.02, "atol": 0.005}
    expected = told["noisy_rectifier_prob_positive_logistic"]
    np.testing.assert_allclose((rectified > 0).mean(0), expected, **near)
    np.testing.assert_allclose(rectified.mean(0), told["noisy_rectifier_mean_logistic"], **near)
    smooth = np.asarray(estimators.stochastic_times_smooth(a_1A, draws()))
    np.testing.assert_allclose((smooth > 0).mean(0), told["STS_fire_prob"], **near)
    np.testing.assert_allclose(smooth.max(0), told["STS_value_if_fire"], rtol=1e-5)
    np.testing.assert_allclose(smooth.mean(0), told["STS_mean"], **near)
    np.testing.assert_allclose(smooth.var(0), told["STS_var"], **near)


@pytest.mark.parametrize("name", ["straight_through", "straight_through_slope"])
def test_straight_through(name, dtype):
    given, told = golden("14_stochastic_neurons")
    a_A = jnp.asarray(given["a"], dtype)
    estimate = getattr(estimators, name)

    def upstream(a_A):
        return given["upstream_dLdh"] * estimate(a_A, jnp.full_like(a_A, 0.4)).sum()

    expected = "ST_identity_grad" if name == "straight_through" else "ST_sigmoid_grad"
    same(jax.grad(upstream)(a_A), told[expected], dtype)
    value = estimate(a_A, jnp.full_like(a_A, 0.4))
    np.testing.assert_allclose(value, jax.nn.sigmoid(a_A) > 0.4, atol=1e-6)


def test_the_unbiased_estimator_by_its_two_outcomes(dtype):
    """E[(h - p) L] over h = 0 and 1 is the true gradient; the best baseline has no variance."""
    given, told = golden("14_stochastic_neurons")
    a_A = jnp.asarray(given["a"], dtype)
    p_A = jax.nn.sigmoid(a_A)
    mean_A, square_A, centred_A = 0, 0, 0
    baseline_A = jnp.asarray(told["optimal_baseline"], dtype)
    for h, u in ((1.0, 1e-9), (0.0, 1 - 1e-7)):
        grad_A = jax.grad(lambda a_A, u=u: estimators.bernoulli(a_A, u)[1].sum())(a_A)
        same(grad_A, h - p_A, dtype)
        chance_A, loss = (p_A if h else 1 - p_A), (h - 0.3) ** 2
        mean_A += chance_A * grad_A * loss
        square_A += chance_A * jnp.square(grad_A * loss)
        centred_A += chance_A * jnp.square(grad_A * (loss - baseline_A))
    same(mean_A, told["sbn_unbiased_expected"], dtype)
    same(mean_A, told["true_grad"], dtype)
    np.testing.assert_allclose(square_A - mean_A**2, told["var_no_baseline"], atol=1e-6)
    np.testing.assert_allclose(centred_A - mean_A**2, told["var_with_baseline"], atol=1e-6)


def test_reinforce(dtype):
    given, told = golden("08_sinkhorn_rl_routed_scaling")
    rl, expected = given["rl"], told["reinforce"]
    nats_BT = jnp.asarray([[-rl["reward_R"]]], dtype)
    scored_BT = jnp.ones((1, 1), bool)

    def loss(logits_E, value, name):
        log_prob_LGT = jax.nn.log_softmax(logits_E)[rl["action"]][None, None, None]
        policy = Policy(log_prob_LGT, value[None, None, None])
        return policy_losses(policy, nats_BT, scored_BT)[name].sum()

    logits_E = jnp.asarray(rl["policy_logits"], dtype)
    value = jnp.asarray(rl["baseline_b"], dtype)
    by_logits, by_value = jax.grad(loss, (0, 1))(logits_E, value, "policy")
    same(by_logits, expected["grad_of_loss_wrt_logits"], dtype)
    assert by_value == 0
    same(jax.grad(loss, 1)(logits_E, value, "value"), expected["value_loss_grad"], dtype)
    assert not jax.grad(loss)(logits_E, value, "value").any()


def test_gumbel_noise_draws_from_the_softmax():
    logits_E = jnp.array([0.2, -0.1, 0.5])
    u = np.random.default_rng(1).uniform(1e-6, 1 - 1e-6, (N, 3))
    drawn_N = np.argmax(logits_E[None] + estimators.gumbel(jnp.asarray(u)), 1)
    shares_E = np.bincount(drawn_N) / N
    np.testing.assert_allclose(shares_E, jax.nn.softmax(logits_E), atol=0.005)


@pytest.mark.thorough
def test_the_objective_completes_the_loss_of_reinforce():
    """In a whole model the choice learns by the tokens' likelihood, and the value with it."""
    prog = program(bench_of("reinforce"), Setting())
    state = prog.init(0)
    grads, metrics = prog.gradients(state, batch_of(0))
    mine = {n.rpartition(".")[2]: np.asarray(g) for n, g in grads.items() if ".router." in n}
    assert set(mine) == {"weight_DE", "value_DH", "value_H"}
    assert np.abs(mine["weight_DE"]).max() > 1e-6 and np.abs(mine["value_H"]).max() > 1e-6
    assert set(metrics.routers.losses) == {"balance", "policy", "value"}
    assert (np.asarray(metrics.routers.losses["value"]) > 0).all()
