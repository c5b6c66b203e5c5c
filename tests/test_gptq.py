"""Second-order rounding: the solver, the inputs it is given, and the commands that use it.

Broken on purpose, each seen red: errors that later rows of a block, or later blocks, don't make up
for; the factor's order of rows; experts that are given each other's inputs; float layers before a
rounded one; scalars among the parameters.
"""

import functools

import jax
import jax.numpy as jnp
from models import moe, tokens
import numpy as np
import pytest

from layers.dispatch import Sorted
from layers.experts.shared import SharedExpert
from moe.inference.calibration import calibrated, layers_of, programs, taken
from moe.inference.gptq import inverse_factor, second_order
from moe.inference.second_moments import with_moments
from moe.model import functional
from moe.model.functional import Declared
from moe.model.transformer import Transformer
from moe.training.few_bits import FORMATS
from moe.training.quantisation import Quantisation, matrices_shape
from routing import Switch
from routing.inputs import RouterInputs

S, R, C, N = 2, 32, 24, 500
EXPERTS = "feed_forward.experts.{}_EDF", "feed_forward.experts.{}_EFD"
MATRIX = Declared(("expert", "embed", "mlp"), "expert")


@pytest.fixture(scope="module")
def correlated():
    """Matrices (S, R, C) and inputs (S, N, R) with correlations between them."""
    draw = np.random.default_rng(0)
    mixed_RR = draw.normal(size=(R, R)) * 0.3 ** (np.arange(R)[:, None] ** 0.3)
    x_SNR = draw.normal(size=(S, N, R)) @ mixed_RR
    return jnp.asarray(draw.normal(size=(S, R, C)), jnp.float32), x_SNR


def gptq(how, w_SRC, x_SNR):
    hessian_SRR = jnp.asarray(np.einsum("snr,snq->srq", x_SNR, x_SNR), jnp.float32)
    inputs_S = jnp.full(S, x_SNR.shape[1])
    return second_order(w_SRC, hessian_SRR, inputs_S, how.format, how.block_of(R))


def errors(w_SRC, q_SRC, x_SNR):
    """||X (W - Q)|| of each matrix."""
    return np.linalg.norm(x_SNR @ np.asarray(w_SRC - q_SRC, np.float64), axis=(1, 2))


@pytest.mark.parametrize("text", ["int4", "int2:8", "nf4:16"])
def test_outputs_change_less_than_with_the_nearest_values(text, correlated):
    how, (w_SRC, x_SNR) = Quantisation.read(text), correlated
    found = gptq(how, w_SRC, x_SNR)
    nearest = how.rounded(w_SRC, MATRIX)
    ours, theirs = (errors(w_SRC, q, x_SNR) for q in (found, nearest))
    assert (ours < 0.6 * theirs).all()
    shape = S, R // how.block_of(R), how.block_of(R), C
    for column in np.moveaxis(np.asarray(found).reshape(shape), 2, -1).reshape(-1, shape[2]):
        assert len(np.unique(column)) <= 2 ** FORMATS[how.format]


@pytest.mark.parametrize("text", ["int4", "fp8:8"])
def test_independent_inputs_give_the_nearest_values(text, correlated):
    how, (w_SRC, x_SNR) = Quantisation.read(text), correlated
    one_of_each = np.broadcast_to(np.eye(R), (S, R, R))
    nearest = np.asarray(how.rounded(w_SRC, MATRIX))
    for inputs in (one_of_each, np.zeros_like(x_SNR[:, :0])):  # or none at all
        found = np.asarray(gptq(how, w_SRC, inputs))
        # The largest value of a block may lie between two levels.
        off = [np.abs(q - np.asarray(w_SRC)) for q in (found, nearest)]
        np.testing.assert_allclose(*off, atol=0.01)


def test_the_factor_is_that_of_the_damped_inverse(correlated):
    x_NR = correlated[1][0]
    hessian_RR = jnp.asarray(x_NR.T @ x_NR, jnp.float32)
    for inputs, share in ((N, 0.01), (R // 4, 0.04)):
        upper_RR = np.asarray(inverse_factor(hessian_RR, jnp.asarray(inputs)))
        damped_RR = hessian_RR / (np.trace(hessian_RR) / R) + share * np.eye(R)
        np.testing.assert_allclose(upper_RR.T @ upper_RR @ damped_RR, np.eye(R), atol=1e-3)
        assert not np.tril(upper_RR, -1).any()


@pytest.fixture(scope="module")
def model():
    """Two equal layers, in each eight experts of which a token takes one, and a shared one.

    Graph, first values, layers, and the layers' programs.
    """
    options = {"d_model": 16, "num_layers": 2, "num_heads": 2, "scan": True}
    sparse = moe(Switch, dispatcher=Sorted(), companions=(SharedExpert,))
    make = functools.partial(Transformer, 11, moe=functools.partial(sparse, num_experts=8))
    graph, *abstract = functional.abstract(functools.partial(make, **options))
    values = jax.jit(lambda: functional.initial_values(graph, *abstract, 0))()
    stacks = jax.eval_shape(lambda: graph.merge(*values)).stacks
    layers = list(layers_of(stacks))
    return graph, *values, stacks, layers, programs(layers[0])


def inputs_by_hand(layer, x_BTD, batch):
    """The inputs of attention, of its output weights and of the experts; who chose whom."""
    attention, h_BTD = layer.attention, layer.attention_norm(x_BTD)
    out_HKD = attention.out_HKD[...]
    attention.out_HKD[...] = jnp.eye(16).reshape(out_HKD.shape)
    mixed_BTD = attention(h_BTD, batch.position_BT, batch.segment_BT)
    middle_BTD = x_BTD + mixed_BTD @ out_HKD.reshape(16, 16)
    g_BTD = layer.feed_forward_norm(middle_BTD)
    decision = layer.feed_forward.router(RouterInputs.of(g_BTD, batch)).decision
    return h_BTD, mixed_BTD, g_BTD, decision.expert_GTK[..., 0]


def is_the_sum_of(found, vectors, expert: int = 0):
    """Whether moments are those of these inputs of an expert, one by one."""
    width = vectors.shape[-1]
    expected = sum((np.outer(x, x) for x in vectors), np.zeros((width, width)))
    np.testing.assert_allclose(found.hessian_SRR[expert], expected, atol=1e-3)
    assert found.inputs_S[expert] == len(vectors)


def test_hessians_are_those_of_a_slow_loop(model):
    _, params, state, _, layers, (observe, _) = model
    layer, batch = layers[1], tokens()
    x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 16)), jnp.float32)
    values = taken(layer, params | state)
    found = observe(values, x_BTD, batch, 1)
    merged = jax.jit(lambda values: inputs_by_hand(layer.block.merge(values, {}), x_BTD, batch))
    h_ND, mixed_ND, g_ND = (np.asarray(a).reshape(12, 16) for a in merged(values)[:3])
    expert_N = np.asarray(merged(values)[3]).reshape(12)
    for name, inputs in {"query_DHK": h_ND, "value_DNK": h_ND, "out_HKD": mixed_ND}.items():
        is_the_sum_of(found[f"attention.{name}"], inputs)
    rows = [g_ND, *(g_ND[expert_N == e] for e in range(8))]  # of the shared expert first
    assert min(map(len, rows)) == 0 and sum(map(len, rows)) == 24
    for e, inputs in enumerate(rows, start=-1):
        shared = "feed_forward.shared.{}_DF", "feed_forward.shared.{}_FD", 0
        up, down, index = shared if e < 0 else (*EXPERTS, e)
        weight = {n: np.asarray(values[up.format(n)]) for n in ("up", "gate")}
        weight = {n: w[index] if e >= 0 else w for n, w in weight.items()}
        hidden = np.asarray(jax.nn.silu(inputs @ weight["gate"])) * (inputs @ weight["up"])
        is_the_sum_of(found[up.format("up")], inputs, index)
        is_the_sum_of(found[up.format("gate")], inputs, index)
        is_the_sum_of(found[down.format("down")], hidden, index)


def test_weights_that_are_used_otherwise_have_no_moments():
    declared = {
        n: Declared(("embed", "mlp"), "feed_forward") for n in ("plain", "scaled", "turned")
    }
    params = {n: jnp.ones((4, 4)) for n in declared} | {"bias": jnp.ones(())}
    declared["bias"] = Declared((), "norm")

    def function(params, x):
        y = x @ params["plain"].T.T + x @ (2 * params["scaled"]) + x @ params["turned"].T
        return y * params["bias"]

    (_, found) = jax.jit(lambda p, x: with_moments(function, p, declared, x))(
        params, jnp.ones((3, 4))
    )
    assert list(found) == ["plain"]


def test_layers_are_rounded_by_what_rounded_layers_give(model):
    graph, params, state, stacks, (first, second), (observe, pass_on) = model
    how, batch = Quantisation("int2", 8), tokens()
    found = calibrated(how, graph, stacks, params, state, [batch], None)
    assert found.nearest == [] and found.starved == {0: 8, 1: 8}
    rounded = found.params
    # The second layer by hand: its inputs are what the first one gives with rounded weights.
    x_BTD, _ = jax.jit(lambda: graph.merge(rounded, state).embedded(batch))()
    x_BTD, _ = pass_on(taken(first, rounded | state), x_BTD, batch, 0)
    moments = observe(taken(second, params | state), x_BTD, batch, 1)
    for name, (hessian_SRR, inputs_S) in moments.items():
        whole, declared = second.names[name], second.declared[name]
        if declared.role not in how.roles:
            np.testing.assert_array_equal(rounded[whole], params[whole])
            continue
        w_SRC = params[whole][1].reshape(matrices_shape(params[whole].shape[1:], declared))
        expected = second_order(w_SRC, hessian_SRR, inputs_S, "int2", 8)
        np.testing.assert_array_equal(rounded[whole][1].reshape(w_SRC.shape), expected)
