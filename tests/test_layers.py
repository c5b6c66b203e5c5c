"""Norms, positions, attention, feed-forwards and blocks, by their properties and by hand."""

import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.attention import Attention
from layers.block import Block
from layers.experts.base import LayerSizes
from layers.experts.feed_forward import ACTIVATIONS, GATED, FeedForward, hidden_width
from layers.experts.feed_forward_experts import FeedForwardExperts
from layers.linear import linear
from layers.norms import LayerNorm, RMSNorm
from layers.positions import LearnedPositions, Rotary, alibi, alibi_slopes, sinusoidal
from routing import initialize
from routing.inputs import Tokens

B, T, D, H = 2, 9, 16, 4


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rows(values_T):
    return jnp.broadcast_to(jnp.asarray(values_T, jnp.int32), (B, len(values_T)))


PLACES, ONE_DOCUMENT = rows(np.arange(T)), rows(np.ones(T))
put = jnp.asarray
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


# Norms.


def test_rms_norm():
    x_BTD, norm = 3 * draw(B, T, D), initialize(RMSNorm(D), 0)
    scale_D = draw(D, seed=1)
    norm.scale_D.set_value(jnp.asarray(scale_D))
    rms_BT1 = np.sqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-6)
    close(norm(put(x_BTD)), x_BTD / rms_BT1 * scale_D)


def test_layer_norm():
    x_BTD, norm = 3 * draw(B, T, D) + 5, initialize(LayerNorm(D), 0)
    scale_D, bias_D = draw(D, seed=1), draw(D, seed=2)
    norm.scale_D.set_value(jnp.asarray(scale_D))
    norm.bias_D.set_value(jnp.asarray(bias_D))
    std_BT1 = np.sqrt(x_BTD.var(-1, keepdims=True) + 1e-6)
    close(norm(put(x_BTD)), (x_BTD - x_BTD.mean(-1, keepdims=True)) / std_BT1 * scale_D + bias_D)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_compute_in_float32_and_start_as_plain_norms(norm):
    """In bfloat16 a row of 1, 256, 256, ... would lose its one before the mean is taken."""
    x_BTD = np.full((1, 1, 512), 256.0, np.float32)
    x_BTD[..., 0] = 1.0
    start = initialize(norm(512), 0)
    found = start(put(x_BTD, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, start(put(x_BTD)).astype(jnp.bfloat16))


# Positions.


def test_rotary_turns_every_pair_by_its_angle():
    x_BTHD = draw(B, T, H, 4)
    turned = np.asarray(Rotary(100.0)(put(x_BTHD), PLACES))
    for i in range(2):  # the pairs are (i, i + 2)
        pair = x_BTHD[..., i] + 1j * x_BTHD[..., i + 2]
        angle_T = np.arange(T) * 100.0 ** (-2 * i / 4)
        expected = pair * np.exp(1j * angle_T)[None, :, None]
        close(turned[..., i] + 1j * turned[..., i + 2], expected)


def test_rotary_scores_depend_on_the_distance_alone():
    query, key = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)

    def score(m, n):
        at = [Rotary()(put(x), jnp.array([[place]])) for x, place in ((query, m), (key, n))]
        return float(jnp.sum(at[0] * at[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    assert score(5, 5) == pytest.approx(float(np.sum(query * key)), abs=1e-5)


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (8, [2.0**-n for n in range(1, 9)]),
        (4, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]),
        # not a power of two: those of 2, then every other one of those of 4
        (3, [2.0**-4, 2.0**-8, 2.0**-2]),
        (1, [2.0**-8]),
    ],
)
def test_alibi_slopes(heads, slopes):
    close(alibi_slopes(heads), slopes)


def test_alibi_is_minus_slope_times_distance():
    bias_BHTT = np.asarray(alibi(PLACES, PLACES, 8))
    distance_TT = np.abs(np.arange(T)[:, None] - np.arange(T)[None])
    close(bias_BHTT[1, 2], -(2.0**-3) * distance_TT)


def test_sinusoidal_and_learned():
    found = np.asarray(sinusoidal(PLACES, 6))[0]
    frequency = 10_000.0 ** (-np.arange(3) / 3)
    angle = np.arange(T)[:, None] * frequency
    close(found, np.concatenate([np.sin(angle), np.cos(angle)], -1))
    table = initialize(LearnedPositions(T, 6), 0)
    close(table(PLACES)[1], table.table_TD[...])
    with pytest.raises(ValueError, match=r"9 tokens per sequence, but .*max_length=8"):
        LearnedPositions(T - 1, 6)(PLACES)
    with pytest.raises(ValueError, match="even d_model, not 5"):
        sinusoidal(PLACES, 5)


# Attention.


def attention(**options):
    return initialize(Attention(**{"d_model": D, "num_heads": H} | options), 0)


def slow_attention(layer, x_BTD):
    """One query at a time, one head at a time; without positions, in one document."""
    weights = (layer.query_DHK, layer.key_DNK, layer.value_DNK)
    query, key, value = (np.einsum("btd,dhk->bthk", x_BTD, np.asarray(w[...])) for w in weights)
    out_HKD = np.asarray(layer.out_HKD[...])
    y_BTD = np.zeros_like(x_BTD)
    group = query.shape[2] // key.shape[2]
    for b, t, h in np.ndindex(B, T, query.shape[2]):
        seen = range(t + 1) if layer.causal else range(T)
        seen = [s for s in seen if abs(s - t) < (layer.window or T)]
        score = key[b, seen, h // group] @ query[b, t, h] / np.sqrt(query.shape[-1])
        weight = np.exp(score - score.max())
        mixed = weight / weight.sum() @ value[b, seen, h // group]
        y_BTD[b, t] += mixed @ out_HKD[h]
    return y_BTD


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 3},
        {"window": 1},
        {"window": 3, "causal": False},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "window": 4},
        {"head_width": 6},
    ],
    ids=str,
)
def test_attention_is_the_slow_loop(options):
    layer, x_BTD = attention(positions="none", **options), draw(B, T, D)
    close(layer(put(x_BTD), PLACES, ONE_DOCUMENT), slow_attention(layer, x_BTD), atol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "alibi"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunk", [2, 4])
def test_chunks_of_queries_are_all_queries(positions, causal, window, chunk):
    """Forward and both gradients, with several documents; the last chunk is shorter."""
    options = {"positions": positions, "causal": causal, "window": window, "num_kv_heads": 2}
    found = []
    for size in (None, chunk):
        layer = attention(chunk=size, **options)

        graph, state = nnx.split(layer)

        def mixed(state, x_BTD, graph=graph):
            y_BTD = nnx.merge(graph, state)(x_BTD, INSIDE, DOCUMENTS)
            return jnp.sum(jnp.sin(y_BTD)), y_BTD

        grad = jax.jit(jax.value_and_grad(mixed, (0, 1), has_aux=True))
        found.append(grad(state, put(draw(B, T, D))))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        close(one, other, atol=2e-5)


def test_chunks_hold_no_square_of_the_length():
    """Nor compute it: 4 chunks of 16 tokens see 16, 32, 48 and 64; in a window of 8, 16 and 23."""
    x_BTD, places = jnp.ones((1, 64, D)), jnp.arange(64)[None]

    def text(chunk, window=None):
        layer = attention(chunk=chunk, window=window)
        graph, state = nnx.split(layer)

        def loss(state):
            return nnx.merge(graph, state)(x_BTD, places, places * 0 + 1).sum()

        return jax.jit(jax.grad(loss)).lower(state).as_text()

    def scores(text):
        """The shapes of float32 (1, H, queries, keys) in a program."""
        found = re.findall(rf"tensor<1x{H}x(\d+)x(\d+)xf32>", text)
        pairs = {(int(queries), int(keys)) for queries, keys in found}
        return {pair for pair in pairs if min(pair) > D // H}

    assert scores(text(None)) == {(64, 64)}
    assert scores(text(16)) == {(16, 16), (16, 32), (16, 48), (16, 64)}
    assert scores(text(16, window=8)) == {(16, 16), (16, 23)}


def test_grouped_heads_are_repeated_heads():
    """Query heads 0 and 1 read key-value head 0, 2 and 3 read 1."""
    few, all_heads, x_BTD = attention(num_kv_heads=2), attention(), draw(B, T, D)
    all_heads.query_DHK.set_value(few.query_DHK[...])
    all_heads.out_HKD.set_value(few.out_HKD[...])
    all_heads.key_DNK.set_value(jnp.repeat(few.key_DNK[...], 2, axis=1))
    all_heads.value_DNK.set_value(jnp.repeat(few.value_DNK[...], 2, axis=1))
    x_BTD = put(x_BTD)
    close(few(x_BTD, PLACES, ONE_DOCUMENT), all_heads(x_BTD, PLACES, ONE_DOCUMENT))


DOCUMENTS = rows([1, 1, 1, 2, 2, 2, 2, 3, 0])
INSIDE = rows([0, 1, 2, 0, 1, 2, 3, 0, 0])


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_token_of_another_document_changes_nothing(positions, causal):
    layer, x_BTD = attention(positions=positions, causal=causal), draw(B, T, D)
    other_BTD = x_BTD.copy()
    other_BTD[:, 3:7] = draw(B, 4, D, seed=9)
    one, two = (np.asarray(layer(put(x), INSIDE, DOCUMENTS)) for x in (x_BTD, other_BTD))
    outside = np.array([0, 1, 2, 7, 8])
    np.testing.assert_array_equal(one[:, outside], two[:, outside])
    assert (one[:, 3:7] != two[:, 3:7]).any()
    # A document by itself, at the start of a window, is the same document.
    alone_BTD = np.zeros_like(x_BTD)
    alone_BTD[:, :4] = x_BTD[:, 3:7]
    alone = layer(put(alone_BTD), rows([0, 1, 2, 3, 0, 0, 0, 0, 0]), rows([1] * 4 + [0] * 5))
    close(alone[:, :4], one[:, 3:7], atol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
def test_attention_is_causal(positions):
    layer, x_BTD = attention(positions=positions), draw(B, T, D)
    other_BTD = x_BTD.copy()
    other_BTD[:, -1] += 1
    one, two = (np.asarray(layer(put(x), PLACES, ONE_DOCUMENT)) for x in (x_BTD, other_BTD))
    np.testing.assert_array_equal(one[:, :-1], two[:, :-1])
    assert (one[:, -1] != two[:, -1]).any()


def test_alibi_adds_its_bias():
    layer, x_BTD = attention(positions="alibi"), draw(B, T, D)
    plain = attention(positions="none")
    apart = layer(put(x_BTD), PLACES, ONE_DOCUMENT) - plain(put(x_BTD), PLACES, ONE_DOCUMENT)
    assert np.abs(apart).max() > 0.01
    # With keys of zero the weights are the softmax of the bias alone.
    layer.key_DNK.set_value(jnp.zeros_like(layer.key_DNK[...]))
    value = np.einsum("btd,dhk->bthk", x_BTD, np.asarray(layer.value_DNK[...]))
    bias_HTT = np.asarray(alibi(PLACES, PLACES, H))[0]
    weight_HTT = np.where(np.tri(T, dtype=bool), np.exp(bias_HTT), 0)
    weight_HTT /= weight_HTT.sum(-1, keepdims=True)
    mixed = np.einsum("hts,bshk->bthk", weight_HTT, value)
    expected = np.einsum("bthk,hkd->btd", mixed, np.asarray(layer.out_HKD[...]))
    close(layer(put(x_BTD), PLACES, ONE_DOCUMENT), expected, atol=1e-5)


def test_qk_norm_bounds_the_scores():
    """Scores no longer grow with the input: scaling it a hundredfold changes next to nothing."""
    layer, x_BTD = attention(qk_norm=True), draw(B, T, D)
    y_BTD = layer(put(x_BTD), PLACES, ONE_DOCUMENT)
    np.testing.assert_allclose(
        layer(put(100 * x_BTD), PLACES, ONE_DOCUMENT), 100 * y_BTD, rtol=1e-2, atol=1e-2
    )
    plain = attention()
    apart = plain(put(100 * x_BTD), PLACES, ONE_DOCUMENT) - 100 * plain(
        put(x_BTD), PLACES, ONE_DOCUMENT
    )
    assert np.abs(apart).max() > 1
    width = layer.query_norm.scale_D.shape
    assert width == layer.key_norm.scale_D.shape == (D // H,)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"num_heads": 3}, "d_model=16 does not divide by num_heads=3; choose a multiple"),
        ({"num_kv_heads": 3}, "num_heads=4 does not divide by num_kv_heads=3"),
        ({"window": 0}, "Attention.window=0 must be at least 1"),
        ({"chunk": 0}, "Attention.chunk=0 must be at least 1"),
        ({"head_width": 5}, "even head width, not 5"),
    ],
)
def test_attention_refuses(options, part):
    with pytest.raises(ValueError, match=part):
        attention(**options)


# Feed-forwards and blocks.


FORMULAS = {
    "swiglu": lambda up, gate: gate / (1 + np.exp(-gate)) * up,
    "geglu": lambda up, gate: gelu(gate) * up,
    "gelu": lambda up, gate: gelu(up),
    "relu": lambda up, gate: np.maximum(up, 0),
    "relu2": lambda up, gate: np.maximum(up, 0) ** 2,
}


def gelu(x):
    """The tanh form, jax.nn.gelu's own (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_and_experts_are_their_formula(activation):
    layer, x_BTD = initialize(FeedForward(D, 24, activation), 0), draw(B, T, D)
    up = x_BTD @ np.asarray(layer.up_DF[...])
    gate = x_BTD @ np.asarray(layer.gate_DF[...]) if activation in GATED else None
    expected = FORMULAS[activation](up, gate) @ np.asarray(layer.down_FD[...])
    close(layer(put(x_BTD)), expected, atol=1e-5)
    # Experts are as many of them, each with its rows.
    experts = initialize(FeedForwardExperts(LayerSizes(3, D, 24, activation)), 0)
    x_EGND = draw(3, 2, 5, D)
    found = experts.on_rows(put(x_EGND))
    for e in range(3):
        layer.up_DF.set_value(experts.up_EDF[...][e])
        layer.down_FD.set_value(experts.down_EFD[...][e])
        if activation in GATED:
            layer.gate_DF.set_value(experts.gate_EDF[...][e])
        close(found[e], layer(put(x_EGND[e])), atol=1e-5)


def test_gated_kinds_have_the_parameters_of_plain_ones():
    assert hidden_width(96, "gelu") == 384 and hidden_width(96, "swiglu") == 256
    assert hidden_width(100, "swiglu") % 16 == 0


def test_unknown_activations_are_refused():
    def experts_of(activation):
        return FeedForwardExperts(LayerSizes(2, D, 8, activation))

    for make in (functools.partial(FeedForward, D), experts_of):
        with pytest.raises(ValueError, match="activation='tanh': one of swiglu"):
            make(activation="tanh")


@pytest.mark.parametrize(("contracted", "shape"), [(1, (5, 6, 7)), (2, (4, 5, 6))])
def test_linear_is_tensordot(contracted, shape):
    x, weight = draw(2, 3, 4, 5), draw(*shape, seed=1)
    close(linear(put(x), put(weight), contracted), np.tensordot(x, weight, contracted), atol=1e-5)


def tokens():
    return Tokens(
        token_BT=ONE_DOCUMENT,
        segment_BT=ONE_DOCUMENT,
        position_BT=PLACES,
        index_B=jnp.arange(B),
        key=jax.random.key(0),
        train=True,
    )


@pytest.mark.parametrize("parallel", [False, True])
def test_block(parallel):
    make_attention = functools.partial(Attention, num_heads=H)
    block = initialize(Block(D, make_attention, FeedForward, parallel=parallel), 0)
    x_BTD = jnp.asarray(draw(B, T, D))

    def attend(x):
        return block.attention(block.attention_norm(x), PLACES, ONE_DOCUMENT)

    if parallel:
        expected = x_BTD + attend(x_BTD) + block.feed_forward(block.attention_norm(x_BTD))
        assert block.feed_forward_norm is None
    else:
        middle = x_BTD + attend(x_BTD)
        expected = middle + block.feed_forward(block.feed_forward_norm(middle))
    y_BTD, output = block(x_BTD, tokens())
    assert output is None and not block.is_moe
    close(y_BTD, expected)
