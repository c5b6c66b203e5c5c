"""MoE++: the residual from the layer before, the shares of capacity, the weighted balance."""

import dataclasses
import functools

from flax import nnx
from goldens import inputs_of
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.experts.base import LayerSizes
from layers.experts.neurons import NeuronExperts
from layers.experts.zero_computation import ZeroCopyConstant
from layers.moe_layer import MoELayer
from moe.conformance.harness import draw, tokens
from moe.model.transformer import Transformer
from routing import BalanceLoss, Capacity, Context, Sizes, TokenChoice, TopK, initialize

D, V, E, T = 8, 29, 4, 6  # V: the ids that `tokens` draws


def test_logits_are_of_the_token_and_of_the_layer_before():
    router = initialize(TopK(Sizes(D, E, V), residual=True), 1)
    x_TD, before_TE = draw(0, T, D), draw(1, T, E)
    inputs = inputs_of(x_TD, jnp.float32)
    found = router.route(
        dataclasses.replace(inputs, context=Context(None, jnp.asarray(before_TE)[None]))
    )
    own_TE = x_TD @ np.asarray(router.weight_DE[...])
    passed_TE = before_TE @ np.asarray(router.residual_EE[...])
    np.testing.assert_allclose(found.logits_GTE[0], own_TE + passed_TE, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(router.route(inputs).logits_GTE[0], own_TE, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("sparse", [(0, 1, 2), (1, 3), (0, 2, 3)], ids=str)
def test_logits_pass_through_all_layers_of_a_model(sparse):
    """Through the scans, from one to the next, and past dense layers: as by a plain loop."""
    moe = functools.partial(
        MoELayer,
        router=functools.partial(TopK, residual=True, losses=(BalanceLoss(zero_computation=4),)),
        num_experts=E,
        d_ff=8,
        sequences_per_group=2,
        companions=(ZeroCopyConstant,),
    )
    layers = 3 if len(sparse) == 3 and sparse[2] == 2 else 4
    settings = {"d_model": D, "num_layers": layers, "num_heads": 2, "moe": moe}
    model = initialize(Transformer(V, moe_layers=sparse, **settings), 1)
    batch = tokens(2, T, train=False)
    found = jax.jit(lambda batch: model(batch))(batch)

    x_BTD, logits_BTE, sums = model.embedding_VD[...][batch.token_BT] / 0.02, None, []
    for stack in model.stacks:
        graphdef, state = nnx.split(stack.unit)
        for i in range(stack.repeats):
            unit = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))
            for block in unit.blocks:
                here = batch.with_previous_logits(logits_BTE)
                x_BTD, output = jax.jit(lambda x_BTD, t, block=block: block(x_BTD, t))(x_BTD, here)
                if output is not None:
                    logits_BTE = output.logits_GTE.reshape(2, T, -1)
                    sums.append(output.stats.logit_square_sum)
    assert len(sums) == len(sparse)
    np.testing.assert_allclose(found.routers.stats.logit_square_sum, sums, rtol=1e-4)
    np.testing.assert_allclose(found.hidden_BTD, model.final_norm(x_BTD), rtol=1e-4, atol=1e-4)


def test_capacity_is_divided_by_shares():
    """Equation 8 with tau = 1/4, 2 experts, 3 others, 16 tokens: 8/7 and 32/7, rounded up."""
    companion = functools.partial(ZeroCopyConstant, zero=1, copy=1, constant=1, share=0.25)
    router = functools.partial(TopK, k=1, losses=())
    capacity = Capacity(1.0)
    settings = {"capacity": capacity, "companions": (companion,)}
    layer = initialize(MoELayer(D, V, router, 2, 8, **settings), 1)
    to_DE = np.zeros((D, 5), np.float32)
    to_DE[np.arange(5), np.arange(5)] = 9.0
    layer.router.weight_DE.set_value(jnp.asarray(to_DE))
    train = jax.jit(lambda x_BTD: layer(x_BTD, tokens(1, 16))[1])
    evaluate = jax.jit(lambda x_BTD: layer(x_BTD, tokens(1, 16, train=False))[0])
    for expert, kept in enumerate([2, 2, 16, 5, 5]):  # nothing is dropped on the way to zero
        x_BTD = jnp.zeros((1, 16, D)).at[..., expert].set(1.0)
        output = train(x_BTD)
        assert output.stats.count_E[expert] == 16
        np.testing.assert_array_equal(output.stats.kept_E, kept * np.eye(5, dtype=int)[expert])
        y_BTD = evaluate(x_BTD)
        assert (np.asarray(y_BTD) != 0).any(-1).sum() == (0 if expert == 2 else 16)


@pytest.mark.thorough
def test_beside_neurons_nothing_is_dropped():
    """Their layer has no capacity, and so its zero-computation experts have none."""
    router = functools.partial(TopK, k=1, losses=())
    companion = functools.partial(ZeroCopyConstant, zero=0, constant=0)
    settings = {"experts": NeuronExperts, "companions": (companion,), "capacity": Capacity(0.5)}
    layer = initialize(MoELayer(D, V, router, 2, **settings), 1)
    layer.router.weight_DE.set_value(jnp.zeros((D, 3)).at[0, 2].set(9.0))
    _, output = layer(jnp.zeros((1, 16, D)).at[..., 0].set(1.0), tokens(1, 16))
    np.testing.assert_array_equal(output.stats.kept_E, [0, 0, 16])


def test_gates_without_a_zero():
    """2 experts, zero, copy: a token that chose a zero gives its gate to the other choice."""
    expert_GTK = jnp.asarray([[[0, 2], [2, 3], [0, 1], [2, 2]]])
    gate_GTK = jnp.asarray([[[0.5, 0.3], [0.6, 0.2], [0.4, 0.3], [0.5, 0.5]]])
    decision = TokenChoice(expert_GTK, gate_GTK, jnp.ones_like(expert_GTK, bool), 4)
    plain, alone = (
        ZeroCopyConstant(LayerSizes(2, D, 8), 1, 1, 0, renormalise=renormalise).split(decision, 2)
        for renormalise in (False, True)
    )
    np.testing.assert_array_equal(plain[0].gate_GTK, gate_GTK)
    expected_GTK = [[[1.0, 0.0], [0.0, 1.0], [0.4, 0.3], [0.0, 0.0]]]
    np.testing.assert_allclose(alone[0].gate_GTK, expected_GTK, rtol=1e-6)
    np.testing.assert_array_equal(alone[0].keep_GTK, [[[1, 0], [0, 0], [1, 1], [0, 0]]])
    np.testing.assert_array_equal(alone[1].keep_GTK, [[[0, 1], [1, 1], [0, 0], [1, 1]]])
    np.testing.assert_array_equal(alone[1].expert_GTK, [[[0, 0], [0, 1], [0, 0], [0, 0]]])


def test_the_balance_loss_weights_zero_computation_experts():
    """E / K sum_e w_e f_e P_e by hand; the last two of four count half."""
    router = TopK(
        Sizes(4, 4, V), k=1, losses=(BalanceLoss(zero_computation=2, zero_computation_weight=0.5),)
    )
    router.weight_DE.set_value(jnp.eye(4))
    output = router(inputs_of(draw(3, 16, 4), jnp.float32, train=True))
    mean_E = np.asarray(output.stats.score_sum_E) / 16
    share_E = np.asarray(output.stats.count_E) / 16
    expected = 4 * np.sum([1, 1, 0.5, 0.5] * mean_E * share_E)
    np.testing.assert_allclose(output.losses["balance"], expected, rtol=1e-5)
