"""Router losses: their value at perfect balance, their direction, their gradient, their padding."""

import dataclasses
import functools

from flax import nnx
from goldens import on_logits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing import (
    BalanceLoss,
    EntropyLoss,
    Hash,
    RouterInputs,
    Sizes,
    Switch,
    TokenChoice,
    TopK,
    ZLoss,
    initialize,
)
from routing.records import Routing
from routing.router import statistics

G, T, D, E = 3, 8, 6, 4
SCOPES = ("global", "group", "sequence")


def inputs_of(x_GTD, valid_GT=None):
    groups, tokens, _ = x_GTD.shape
    ids = jnp.zeros((groups, tokens), jnp.int32)
    valid_GT = np.ones((groups, tokens), bool) if valid_GT is None else valid_GT
    return RouterInputs(
        x_GTD=jnp.asarray(x_GTD, jnp.float32),
        valid_GT=jnp.asarray(valid_GT),
        token_id_GT=ids,
        position_GT=ids,
        index_G=jnp.arange(groups, dtype=jnp.int32),
        key=jax.random.key(0),
        train=True,
    )


def measure(loss, expert_GTK, score_GTE, valid_GT=None):
    """A loss on a hand-made decision."""
    expert_GTK = jnp.asarray(expert_GTK, jnp.int32)
    inputs = inputs_of(np.zeros((*expert_GTK.shape[:2], 2)), valid_GT)
    keep_GTK = jnp.broadcast_to(inputs.valid_GT[..., None], expert_GTK.shape)
    gate_GTK = jnp.ones(expert_GTK.shape)
    decision = TokenChoice(expert_GTK, gate_GTK, keep_GTK, score_GTE.shape[-1])
    routing = Routing(decision, jnp.log(jnp.asarray(score_GTE)), jnp.asarray(score_GTE))
    return float(loss(routing, inputs, statistics(routing, inputs, score_GTE.shape[-1])))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_one_at_perfect_balance_for_every_k(k, scope):
    expert_GTK = (np.arange(T)[None, :, None] * k + np.arange(k)[None, None]) % E
    expert_GTK = expert_GTK.repeat(G, 0)
    score_GTE = np.full((G, T, E), 1 / E, np.float32)
    assert measure(BalanceLoss(scope=scope), expert_GTK, score_GTE) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_collapse_costs_the_number_of_experts(scope):
    """All to expert 0 with all of the score: E * 1 * 1. Never averaged over layers first."""
    score_GTE = np.zeros((G, T, E), np.float32) + np.eye(E, dtype=np.float32)[0]
    found = measure(BalanceLoss(scope=scope), np.zeros((G, T, 1)), score_GTE)
    assert found == pytest.approx(E, abs=1e-5)


def test_the_scopes_differ_where_groups_specialise():
    """Each group has its own expert: perfect globally, collapsed in each group."""
    expert_GTK = np.arange(E)[:, None, None].repeat(T, 1)
    score_GTE = np.eye(E, dtype=np.float32)[:, None].repeat(T, 1)
    assert measure(BalanceLoss(), expert_GTK, score_GTE) == pytest.approx(1)
    assert measure(BalanceLoss(scope="group"), expert_GTK, score_GTE) == pytest.approx(E)


def test_group_scope_weighs_groups_by_their_tokens():
    """Group 0, 6 tokens, balanced within rounding: 1.0; group 1, 2 tokens, collapsed: 4.0."""
    valid_GT = np.arange(T)[None] < np.array([[6], [2]])
    score_GTE = np.full((2, T, E), 1 / E, np.float32)
    score_GTE[1] = np.eye(E)[0]
    expert_GTK = np.zeros((2, T, 1))
    found = measure(BalanceLoss(scope="group"), expert_GTK, score_GTE, valid_GT)
    assert found == pytest.approx((6 * 1.0 + 2 * 4.0) / 8)


def skewed(amount):
    """Tokens that all lean one way."""
    return np.random.default_rng(0).standard_normal((G, T, D)) * 0.3 + amount


ROUTERS = {
    "softmax": functools.partial(TopK, k=2),
    "sigmoid": functools.partial(TopK, k=2, gates="sigmoid", renormalise=True),
    "switch": functools.partial(Switch, jitter=0.0),
}


@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("scope", SCOPES)
def test_an_imbalanced_batch_scores_higher(make, scope):
    router = make(Sizes(D, E, 7), losses=(BalanceLoss(scope=scope),))
    weight_DE = np.zeros((D, E), np.float32)
    weight_DE[:E] = 4 * np.eye(E)
    router.weight_DE.set_value(jnp.asarray(weight_DE))
    one_hot_TD = np.eye(D)[np.arange(T) % E]
    balanced_GTD = one_hot_TD[None].repeat(G, 0)
    leaning_GTD = balanced_GTD + np.eye(D)[0] * 2
    fair = float(router(inputs_of(balanced_GTD)).losses["balance"])
    unfair = float(router(inputs_of(leaning_GTD)).losses["balance"])
    assert fair == pytest.approx(1.0, abs=0.35) and unfair > fair + 0.1


def scoped(loss):
    return f"{loss.name}-{getattr(loss, 'scope', 'token')}"


LOSSES = [BalanceLoss(0.3, scope) for scope in SCOPES] + [ZLoss(0.2), EntropyLoss(0.7)]


@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("loss", LOSSES, ids=scoped)
def test_the_coefficient_times_the_loss_reaches_the_router(make, loss):
    """Finite differences of the penalty, along its gradient, with ragged padding."""
    router = initialize(make(Sizes(D, E, 7), losses=(loss,)), 0)
    x_GTD = skewed(0.2)
    valid_GT = np.arange(T)[None] < np.array([[T], [5], [1]])
    inputs = inputs_of(np.where(valid_GT[..., None], x_GTD, 0), valid_GT)
    weight_DE = router.weight_DE.get_value()

    with jax.enable_x64(True):
        (penalty, value), grad_DE = grad_of(router, inputs, loss, np.float64(weight_DE))
        assert float(penalty) == pytest.approx(loss.coefficient * float(value), rel=1e-6)
        size = float(jnp.linalg.norm(grad_DE))
        assert size > 1e-4
        step_DE = np.asarray(grad_DE) / size * 1e-6
        up = grad_of(router, inputs, loss, np.float64(weight_DE) + step_DE)[0][0]
        down = grad_of(router, inputs, loss, np.float64(weight_DE) - step_DE)[0][0]
        assert float(up - down) / 2e-6 == pytest.approx(size, rel=1e-4)


def grad_of(router, inputs, loss, weight_DE):
    """Penalty, loss and gradient to the router's weights, in float64."""
    inputs = dataclasses.replace(inputs, x_GTD=inputs.x_GTD.astype(jnp.float64))
    graphdef, state = nnx.split(router)

    def penalty(weight_DE):
        fresh = nnx.merge(graphdef, state)
        fresh.weight_DE = fresh.weight_DE.replace(weight_DE)
        output = fresh(inputs)
        return output.auxiliary_loss, output.losses[loss.name]

    return jax.value_and_grad(penalty, has_aux=True)(jnp.asarray(weight_DE))


def test_z_is_the_mean_over_real_tokens():
    logits = np.random.default_rng(0).standard_normal((G, T, E)).astype(np.float32)
    valid_GT = np.arange(T)[None] < np.array([[T], [5], [0]])
    expected = np.mean(np.log(np.exp(logits).sum(-1))[valid_GT] ** 2)
    score_GTE = np.exp(logits)  # measure() takes their logarithm
    found = measure(ZLoss(), np.zeros((G, T, 1)), score_GTE, valid_GT)
    assert found == pytest.approx(expected, rel=1e-5)
    # Not blind to a constant, which softmax is; zero where logsumexp is zero.
    uniform = np.full((G, T, E), 1 / E, np.float32)
    assert measure(ZLoss(), np.zeros((G, T, 1)), uniform) == pytest.approx(0, abs=1e-10)
    assert measure(ZLoss(), np.zeros((G, T, 1)), np.e * uniform) == pytest.approx(1, rel=1e-5)


def test_entropy_is_log_e_when_undecided_and_zero_when_decided():
    uniform = np.full((G, T, E), 1 / E, np.float32)
    decided = np.eye(E, dtype=np.float32)[np.zeros((G, T), int)]
    experts = np.zeros((G, T, 1))
    assert measure(EntropyLoss(), experts, uniform) == pytest.approx(np.log(E), rel=1e-6)
    assert measure(EntropyLoss(), experts, decided) == 0
    assert EntropyLoss().coefficient > 0, "minimised: tokens decide"


@pytest.mark.parametrize("loss", LOSSES, ids=scoped)
def test_a_batch_of_padding_costs_nothing(loss):
    score_GTE = np.full((G, T, E), 1 / E, np.float32)
    assert measure(loss, np.zeros((G, T, 1)), score_GTE, np.zeros((G, T), bool)) == 0


def test_two_losses_of_one_name_are_refused():
    losses = (BalanceLoss(0.01), BalanceLoss(1e-4, "sequence"))
    router = initialize(TopK(Sizes(D, E, 7), losses=losses), 0)
    with pytest.raises(ValueError, match="2 router losses are named 'balance'"):
        router(inputs_of(skewed(0.0)))
    named = (losses[0], dataclasses.replace(losses[1], name="balance_sequence"))
    output = initialize(TopK(Sizes(D, E, 7), losses=named), 0)(inputs_of(skewed(0.0)))
    expected = 0.01 * output.losses["balance"] + 1e-4 * output.losses["balance_sequence"]
    assert float(output.auxiliary_loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=scoped)
def test_a_loss_on_a_router_without_scores_is_refused(loss):
    router = initialize(Hash(Sizes(D, E, 7)), 0)
    router.losses = (loss,)
    with pytest.raises(ValueError, match="this router has none"):
        router(inputs_of(skewed(0.0)))


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="one of global, group, sequence"):
        BalanceLoss(scope="batch")


@pytest.mark.parametrize("shift", [-20.0, -46.0, -80.0])
def test_sigmoid_scores_cannot_shrink_out_of_the_balance_loss(shift):
    """exp(-80) is 1.8e-35: shares are of scores of any size, without a constant beside them."""
    make = functools.partial(TopK, k=2, gates="sigmoid", losses=(BalanceLoss(1.0),))
    logits_TE = np.array([[2.0, 1, 0, -1], [2, 1.5, 0, -1], [1, 2, 0, 0]])

    def balance(shift):
        router, inputs = on_logits(make, logits_TE + shift, "float32")
        return float(router(inputs).losses["balance"])

    assert balance(shift) == pytest.approx(balance(-15.0), rel=1e-4)
    assert balance(shift) > 1.5
