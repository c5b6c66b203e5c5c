"""Mixture-of-Depths: golden 12, what stays untouched, causality, its guess, and what it costs."""

import dataclasses
import functools

from goldens import golden, inputs_of, same
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_flops
from test_flops import built

from layers.attention import Attention
from layers.experts.feed_forward import hidden_width
from layers.mixture_of_depths import DepthBlock
from layers.moe_layer import MoELayer
from moe.model import functional
from moe.model.transformer import Transformer
from routing import (
    Causality,
    ExpertChoiceRouter,
    MixtureOfDepths,
    Sizes,
    TokenChoice,
    TopK,
    initialize,
)
from routing.inputs import Tokens

B, T, D, V = 4, 16, 16, 11


def router_of(given, dtype, **options):
    router = initialize(MixtureOfDepths(Sizes(2, 1, 5), capacity=given["k"] / 8, **options), 0)
    router.weight_D.set_value(jnp.asarray(given["w_router"], dtype))
    return router


class Toy:
    """The example's block adds tanh(x) and the mean of all tokens that go through."""

    is_moe, router, attention = False, None, Attention(4, num_heads=1)

    def added(self, x_BCD, tokens):
        real = (tokens.segment_BT > 0)[..., None]
        mean = jnp.where(real, x_BCD, 0).sum(1, keepdims=True) / real.sum(1, keepdims=True)
        return jnp.tanh(x_BCD) + mean, None


def tokens_of(x_BTD, train=True, token_BT=None, key=0):
    batch, length = x_BTD.shape[:2]
    place_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Tokens(
        token_BT=place_BT if token_BT is None else token_BT,
        segment_BT=jnp.ones((batch, length), jnp.int32),
        position_BT=place_BT,
        index_B=jnp.arange(batch, dtype=jnp.int32),
        key=jax.random.key(key),
        train=train,
    )


def test_the_example(dtype):
    given, told = golden("12_mixture_of_depths")
    router = router_of(given, dtype)
    routing = router.route(inputs_of(given["x"], dtype))
    same(routing.logits_GTE[0, :, 0], told["router_weights"], dtype)
    np.testing.assert_array_equal(routing.decision.token_GEC[0, 0], told["selected_sorted"])
    chosen_T = np.isin(np.arange(8), told["selected_sorted"]).astype(dtype)
    np.testing.assert_array_equal(chosen_T, told["bce_targets"])
    x_BTD = jnp.asarray(given["x"], jnp.float32)[None]
    y_BTD, _, _ = DepthBlock(Toy(), router_of(given, jnp.float32))(x_BTD, tokens_of(x_BTD))
    same(y_BTD[0], told["y"], "float32")
    unselected = chosen_T == 0
    np.testing.assert_array_equal(y_BTD[0][unselected], x_BTD[0][unselected])


def test_the_auxiliary_loss_and_its_gradient(dtype):
    given, told = golden("12_mixture_of_depths")
    inputs = inputs_of(given["x"], dtype)
    router = router_of(given, dtype, guess="auxiliary")
    same(router(inputs).losses["guess"], told["bce_aux_on_router_logits"], dtype)
    target_T = jnp.asarray(told["bce_targets"], dtype)

    def loss(r_T):
        return jnp.mean(jax.nn.softplus(r_T) - target_T * r_T)

    r_T = jnp.asarray(told["router_weights"], dtype)
    same(jax.grad(loss)(r_T), told["grad_bce_router"], dtype)
    by_x = jax.grad(lambda x: router(dataclasses.replace(inputs, x_GTD=x)).losses["guess"])
    expected = np.outer(told["grad_bce_router"], given["w_router"])
    same(by_x(inputs.x_GTD)[0], expected, dtype)


def test_the_predictor(dtype):
    """The example's logits by a predictor that reads them off the token."""
    given, told = golden("12_mixture_of_depths")
    router = MixtureOfDepths(Sizes(3, 1, 5), capacity=2 / 8, predictor_width=2)
    x_TD = np.concatenate([given["x"], np.asarray(given["predictor_logits"])[:, None]], 1)
    router.weight_D.set_value(jnp.asarray([*given["w_router"], 0.0], dtype))
    router.hidden_DH.set_value(jnp.asarray([[0, 0], [0, 0], [1.0, -1.0]], dtype))
    router.guess_H.set_value(jnp.asarray([1.0, -1.0], dtype))
    router.guess_bias.set_value(jnp.asarray(0.0, dtype))
    output = router(inputs_of(x_TD, dtype))
    same(output.losses["guess"], told["predictor_bce"], dtype)
    assert int(output.stats.batch_sums["router"]["guessed"]) / 8 == told["predictor_accuracy"]
    later = router(inputs_of(x_TD, dtype, train=False)).decision
    np.testing.assert_array_equal(later.keep_GTK[0, :, 0], told["predictor_decisions"])
    # It changes nothing but itself.
    by_x = jax.grad(
        lambda x: router(dataclasses.replace(inputs_of(x_TD, dtype), x_GTD=x)).losses["guess"]
    )
    assert not by_x(inputs_of(x_TD, dtype).x_GTD).any()


@functools.cache
def model(**settings):
    made = Transformer(
        V,
        d_model=D,
        num_layers=4,
        num_heads=2,
        depth_router=functools.partial(MixtureOfDepths, capacity=0.25),
        **settings,
    )
    return initialize(made, 0)


moe = functools.partial(MoELayer, router=functools.partial(TopK, k=2), num_experts=4, d_ff=8)
MODELS = {
    "dense": {},
    "staged": {"moe": functools.partial(moe, sequences_per_group=2)},
    "staged apart": {"moe": moe, "moe_every": 2},
}


def batch(seed, train):
    token_BT = np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)
    return tokens_of(token_BT[..., None], train, jnp.asarray(token_BT))


@pytest.mark.thorough
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_a_model_sees_the_future_in_training_and_never_at_evaluation(settings):
    built = model(**settings)
    for depth in [b for s in built.stacks for b in s.unit.blocks if isinstance(b, DepthBlock)]:
        assert depth.depth_router.causality is Causality.CAUSAL_AT_EVALUATION
        # At the start the guess is that nothing goes through: make it one that varies.
        guess_LH = depth.depth_router.guess_H[...]
        signs_H = (-1.0) ** jnp.arange(guess_LH.shape[-1])
        depth.depth_router.guess_H.set_value(jnp.broadcast_to(signs_H, guess_LH.shape))
    run = jax.jit(lambda tokens: built(tokens))
    for train in (True, False):
        first, other = batch(0, train), batch(1, train)
        later_BT = jnp.arange(T)[None] >= T // 2
        mixed_BT = jnp.where(later_BT, other.token_BT, first.token_BT)
        one, two = run(first), run(dataclasses.replace(first, token_BT=mixed_BT))
        moved_BT = np.asarray(one.hidden_BTD != two.hidden_BTD).any(-1)
        assert moved_BT[:, T // 2 :].any()
        assert moved_BT[:, : T // 2].any() == train
        assert np.isfinite(one.hidden_BTD).all()
        through_L = np.asarray(one.mod_routers.stats.count_E)[:, 0]
        assert through_L.shape == (2,)
        if train:
            np.testing.assert_array_equal(through_L, B * T // 4)
        else:
            assert (through_L > 0).all() and (through_L < B * T).all()


@pytest.mark.thorough
def test_the_experts_inside_tell_of_all_tokens():
    decision = model(**MODELS["staged"])(batch(0, True)).routers.decision
    assert isinstance(decision, TokenChoice) and decision.expert_GTK.shape == (4, B // 2, 2 * T, 2)
    kept_L = np.asarray(decision.keep_GTK).any(-1).sum((1, 2))
    assert kept_L[0] > kept_L[1] and kept_L[1] <= B * T // 4


def test_the_gradient_reaches_the_router():
    built = model()
    graph, params, state = functional.split(built)

    def loss(params):
        return jnp.sum(jnp.square(graph.merge(params, state)(batch(0, True)).hidden_BTD[:, ::3]))

    grads = jax.jit(jax.grad(loss))(params)
    mine = {n.rpartition(".")[2]: np.asarray(g) for n, g in grads.items() if "depth_router" in n}
    assert set(mine) == {"weight_D", "hidden_DH", "guess_H", "guess_bias"}
    assert (np.abs(mine["weight_D"]) > 1e-8).all()
    # The predictor changes nothing else, so that nothing but its own loss changes it.
    assert not any(grad.any() for name, grad in mine.items() if name != "weight_D")


def test_an_eighth_of_the_tokens_costs_an_eighth_of_the_block():
    plain = built().costs.flops_per_token
    depths = functools.partial(MixtureOfDepths, capacity=0.5)
    half = built(depth_router=depths, depth_every=1).costs
    # Half of the blocks' matmuls, a quarter of their attention; router and predictor are new.
    width, layers, length = test_flops.D, test_flops.L, test_flops.T
    block = test_flops.ATTENTION + 3 * width * hidden_width(width, "swiglu")
    saved = 6 * block * 0.5 + 12 * length * width * 0.5 * 0.75
    new = 6 * (width + 32 * width + 32)
    assert plain - half.flops_per_token == round(layers * (saved - new))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="has one expert, the block, not 4"):
        MixtureOfDepths(Sizes(D, 4, V))
    with pytest.raises(ValueError, match=r"capacity=1.5 must lie in \(0, 1\]"):
        MixtureOfDepths(Sizes(D, 1, V), capacity=1.5)
    choice = functools.partial(MoELayer, router=ExpertChoiceRouter, num_experts=4, d_ff=8)
    with pytest.raises(ValueError, match="has to choose for each token"):
        model(moe=choice, moe_every=2)(batch(0, True))
    with pytest.raises(ValueError, match="depth_every=5 leaves no such layer among 4"):
        model(depth_every=5)
