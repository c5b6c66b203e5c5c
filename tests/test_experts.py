"""Options of a layer's experts and companions, each against the formula written out slowly.

Broken on purpose, once each: gates on the output as well as on the input; the shared expert's
sigmoid taken of its output; the router of a latent layer reading z.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import B, D, E, T, V, draw, tokens

from layers.dispatch import OneHotEinsum, SlotGather, Sorted
from layers.experts.feed_forward_experts import FeedForwardExperts
from layers.experts.latent import LatentExperts
from layers.experts.neurons import NeuronExperts
from layers.experts.shared import SharedExpert
from layers.moe_layer import MoELayer
from moe.conformance.harness import F
from moe.model import functional
from routing import Capacity, ExpertChoiceRouter, ProductKeys, SoftMoE, TopK, gates_GTE, initialize

Z = 4  # width of latent experts


def layer_of(router=functools.partial(TopK, k=2), **settings):
    return initialize(MoELayer(D, V, router, E, F, **settings), 3)


def run(layer, x_BTD, train=True):
    return jax.jit(lambda x_BTD: layer(x_BTD, tokens(train=train)))(x_BTD)


def expert_outputs(experts, x_ND, scale_NE):
    """(N, E, width): each expert's output for every row times scale."""
    x_NED = x_ND[:, None] * scale_NE[..., None]
    up, gate = (
        np.einsum("ned,edf->nef", x_NED, np.asarray(w[...]))
        for w in (experts.up_EDF, experts.gate_EDF)
    )
    hidden = np.asarray(jax.nn.silu(gate)) * up
    return np.einsum("nef,efd->ned", hidden, np.asarray(experts.down_EFD[...]))


@pytest.mark.parametrize(
    "dispatcher", [OneHotEinsum(), SlotGather(), Sorted()], ids=lambda d: type(d).__name__
)
@pytest.mark.parametrize(
    "router", [functools.partial(TopK, k=2, gates="sigmoid"), ExpertChoiceRouter], ids=["k2", "ec"]
)
def test_gates_on_the_input(router, dispatcher):
    """y = sum over the chosen experts of E_e(gate_e x); the router's gradient comes through x."""
    experts = functools.partial(FeedForwardExperts, gates_on="input")
    layer = layer_of(router, experts=experts, dispatcher=dispatcher, capacity=Capacity(None))
    x_BTD = draw(0, B, T, D)
    y_BTD, output = run(layer, x_BTD)
    gate_NE = np.asarray(gates_GTE(output.decision)).reshape(-1, E)
    made_NED = expert_outputs(layer.experts, x_BTD.reshape(-1, D), gate_NE)
    expected = np.where(gate_NE[..., None] > 0, made_NED, 0).sum(1).reshape(x_BTD.shape)
    np.testing.assert_allclose(y_BTD, expected, rtol=2e-4, atol=1e-5)

    graph, params, state = functional.split(layer)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(graph.merge(params, state)(x_BTD, tokens())[0] ** 2)

    assert np.abs(gradient(params)["router.weight_DE"]).max() > 1e-4


def test_a_gated_shared_expert():
    """sigmoid(w . x) times the shared output, and the parameters of the plain one are the same."""
    x_BTD = draw(0, B, T, D)
    none = run(layer_of(), x_BTD)[0]
    plain, gated = (
        layer_of(companions=(functools.partial(SharedExpert, gated=gated),))
        for gated in (False, True)
    )
    shared_BTD = run(plain, x_BTD)[0] - none
    share_BT1 = jax.nn.sigmoid(x_BTD @ gated.shared.sigmoid_D[...])[..., None]
    found = run(gated, x_BTD)[0]
    np.testing.assert_allclose(found, none + share_BT1 * shared_BTD, rtol=1e-4, atol=1e-5)


def test_latent_experts():
    """z = W_down x; y = W_up sum_e g_e E_e(z); the router and a shared expert read x."""
    experts = functools.partial(LatentExperts, width=Z)
    layer = layer_of(experts=experts, capacity=Capacity(None), companions=(SharedExpert,))
    x_BTD = draw(0, B, T, D)
    y_BTD, output = run(layer, x_BTD)
    plain = layer_of(capacity=Capacity(None), companions=(SharedExpert,))
    np.testing.assert_array_equal(output.stats.count_E, run(plain, x_BTD)[1].stats.count_E)
    z_NZ = x_BTD.reshape(-1, D) @ np.asarray(layer.experts.down_DZ[...])
    gate_NE = np.asarray(gates_GTE(output.decision)).reshape(-1, E)
    made_NEZ = expert_outputs(layer.experts.inner, z_NZ, np.ones_like(gate_NE))
    routed_ND = np.einsum("ne,nez->nz", gate_NE, made_NEZ) @ np.asarray(layer.experts.up_ZD[...])
    shared_BTD = run(plain, x_BTD)[0] - run(layer_of(capacity=Capacity(None)), x_BTD)[0]
    expected = routed_ND.reshape(x_BTD.shape) + shared_BTD
    np.testing.assert_allclose(y_BTD, expected, rtol=1e-4, atol=1e-5)


def test_any_kind_of_experts_may_be_latent():
    inner = functools.partial(LatentExperts, width=Z, experts=NeuronExperts)
    layer = layer_of(functools.partial(ProductKeys, heads=2, k=2), experts=inner)
    assert layer.experts.are_neurons and layer.experts.inner.down_ED.shape == (E, Z)
    assert np.isfinite(run(layer, draw(0, B, T, D))[0]).all()


def test_decisions_that_experts_do_not_take_are_refused():
    experts = functools.partial(FeedForwardExperts, gates_on="input")
    with pytest.raises(ValueError, match="take a TokenChoice or ExpertChoice; SoftMoE decides by"):
        run(layer_of(SoftMoE, experts=experts), draw(0, B, T, D))
    experts = functools.partial(LatentExperts, experts=NeuronExperts)
    with pytest.raises(ValueError, match="LatentExperts as they are set take a TokenChoice; "):
        run(layer_of(SoftMoE, experts=experts), draw(0, B, T, D))
