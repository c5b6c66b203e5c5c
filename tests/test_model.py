"""The transformer: which layers are sparse, how they stack, groups, the dense model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from models import B, D, T, V, model, moe, runner, tokens
import numpy as np
import pytest

from layers.experts.feed_forward import feed_forward
from layers.experts.feed_forward_experts import FeedForwardExperts
from layers.experts.shared import SharedExpert
from layers.kernels.cross_entropy import cross_entropy_of_each
from layers.moe_layer import MoELayer
from layers.norms import LayerNorm
from moe.model import functional
from moe.model.transformer import runs_of_layers, sparse_layers
from routing import (
    Capacity,
    Hash,
    MixtureOfDepths,
    SoftMoE,
    Switch,
    TopK,
    initialize,
)


def names(**options):
    return set(functional.abstract(lambda: model(**options))[1])


# Which layers are sparse, and how they stack.


@pytest.mark.parametrize(
    ("layers", "runs"),
    [
        ("1111", [("1", 4)]),
        ("0101", [("01", 2)]),
        ("001001", [("001", 2)]),
        ("0111", [("0", 1), ("1", 3)]),
        ("0", [("0", 1)]),
        ("01", [("0", 1), ("1", 1)]),
        ("00110", [("0", 2), ("1", 2), ("0", 1)]),
    ],
)
def test_runs_of_layers(layers, runs):
    def bits(text):
        return tuple(c == "1" for c in text)

    found = runs_of_layers(bits(layers))
    assert found == [(bits(pattern), repeats) for pattern, repeats in runs]
    assert sum((pattern * repeats for pattern, repeats in found), ()) == bits(layers)


@pytest.mark.parametrize(
    ("options", "sparse"),
    [
        ({"moe_every": 1}, [0, 1, 2, 3, 4, 5]),
        ({"moe_every": 2}, [1, 3, 5]),
        ({"moe_every": 4}, [3]),
        ({"moe_layers": [0, 5]}, [0, 5]),
        ({"moe_layers": []}, []),
    ],
    ids=str,
)
def test_which_layers_are_sparse(options, sparse):
    assert [
        n for n, is_moe in enumerate(model(num_layers=6, moe=moe(), **options).is_moe) if is_moe
    ] == sparse


MIXES = [
    {"num_layers": 4, "moe_every": 2},
    {"num_layers": 4, "moe_layers": (1, 2, 3)},
    {"num_layers": 3, "moe_layers": (0, 2)},
]


@pytest.mark.thorough
@pytest.mark.parametrize("options", MIXES, ids=str)
def test_a_stack_is_its_blocks_one_after_another(options):
    """Every layer's own slice of the stacked parameters, run by hand without stack or scan."""
    options = options | {"moe": moe(functools.partial(Switch, jitter=0.1))}
    built = initialize(model(**options), 0)
    batch = tokens(train=True)
    logits, routers = runner(**options)(batch)
    x_BTD = built.embedding_VD[...][batch.token_BT] / 0.02
    layer, outputs = 0, []
    for stack in built.stacks:
        graph, params, state = functional.split(stack.unit)
        for i in range(stack.repeats):
            unit = graph.merge(*({n: a[i] for n, a in v.items()} for v in (params, state)))
            for block in unit.blocks:
                run = jax.jit(lambda x_BTD, t, block=block: block(x_BTD, t))
                x_BTD, output = run(x_BTD, batch.for_layer(layer, None))
                layer += 1
                outputs += [output] if output is not None else []
    assert layer == options["num_layers"] and len(outputs) == sum(built.is_moe)
    expected = built.logits(built.final_norm(x_BTD))
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-5)
    for n, output in enumerate(outputs):
        np.testing.assert_array_equal(routers.stats.count_E[n], output.stats.count_E)
        np.testing.assert_allclose(routers.losses["balance"][n], output.losses["balance"], 1e-5)


def test_layers_draw_their_own_randomness():
    """The same weights in both layers still jitter differently: the key names the layer."""
    one, two = (tokens(train=True).for_layer(n, None).key for n in (0, 1))
    assert (jax.random.key_data(one) != jax.random.key_data(two)).any()


# The dense model and the head.


def test_the_dense_model_is_the_same_model_without_routers():
    logits, routers = runner()(tokens())
    assert routers is None and logits.shape == (B, T, V)
    assert not any("router" in name for name in names())
    shared = {name for name in names() if "feed_forward." not in name}
    assert shared == {name for name in names(moe=moe()) if "feed_forward." not in name}


@pytest.mark.thorough
def test_one_expert_of_top_1_is_the_dense_layer():
    """A softmax over one expert is 1: with its weights, the sparse model is the dense one."""
    single = functools.partial(
        MoELayer, router=functools.partial(TopK, k=1), num_experts=1, d_ff=48
    )
    graph, params, state = functional.split(initialize(model(moe=single), 0))
    dense_graph, dense_params, _ = functional.split(initialize(model(), 0))
    for name in dense_params:
        kind = name.rsplit(".", 1)[-1]
        wide = {"up_DF": "up_EDF", "gate_DF": "gate_EDF", "down_FD": "down_EFD"}.get(kind)
        if wide and "feed_forward." in name:
            dense_params[name] = params[name.replace(kind, f"experts.{wide}")][:, 0]
        else:
            dense_params[name] = params[name]
    batch = tokens()
    found = graph.merge(params, state)(batch).hidden_BTD
    expected = dense_graph.merge(dense_params, {})(batch).hidden_BTD
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_tied_and_untied_heads():
    assert "head_DV" not in names() and "head_DV" in names(tie_embeddings=False)
    for tied in (True, False):
        built = initialize(model(tie_embeddings=tied), 0)
        hidden_BTD = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
        head_DV = built.embedding_VD[...].T / (0.02 * D**0.5) if tied else built.head_DV[...]
        logits = built.logits(jnp.asarray(hidden_BTD))
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, hidden_BTD @ np.asarray(head_DV), rtol=1e-4, atol=1e-5)
        # Unit-variance logits at the start, tied or not.
        assert 0.5 < float(np.std(logits)) < 1.5


@pytest.mark.parametrize("positions", ["rotary", "alibi", "learned", "sinusoidal", "none"])
def test_positions_and_causality_of_the_whole_model(positions):
    run = runner(positions=positions, max_length=T, moe=moe())
    batch = tokens()
    logits, _ = run(batch)
    changed = dataclasses.replace(batch, token_BT=batch.token_BT.at[:, -1].set(0).at[:, -2].set(1))
    np.testing.assert_array_equal(run(changed)[0][:, :-2], logits[:, :-2])
    assert (run(changed)[0][:, -2:] != logits[:, -2:]).any()
    # The same token at every place: only positions tell the places apart.
    same = dataclasses.replace(batch, token_BT=jnp.ones((B, T), jnp.int32))
    apart = np.abs(np.diff(np.asarray(run(same)[0]), axis=1)).max()
    assert (apart > 1e-3) == (positions in ("learned", "sinusoidal"))


def test_an_encoder_sees_both_sides():
    run = runner(causal=False, moe=moe(SoftMoE))
    batch = tokens()
    changed = dataclasses.replace(batch, token_BT=(batch.token_BT.at[:, -1].add(1)) % V)
    assert (run(changed)[0][:, 0] != run(batch)[0][:, 0]).any()


def test_bfloat16_compute_keeps_parameters_and_logits_in_float32():
    options = {"compute_dtype": "bfloat16", "moe": moe(), "norm": LayerNorm}
    graph, params, _ = functional.abstract(lambda: model(**options))
    assert {p.dtype for p in params.values()} == {jnp.dtype("float32")}
    logits, routers = runner(**options)(tokens())
    assert logits.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(routers)} <= {
        jnp.dtype(name) for name in ("float32", "int32", "bool")
    }
    full, _ = runner(moe=moe(), norm=LayerNorm)(tokens())
    assert float(jnp.abs(logits - full).mean()) < 0.05


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("router", "options"),
    [
        (Switch, {}),
        (functools.partial(TopK, k=2), {}),
        (Switch, {"depth_router": functools.partial(MixtureOfDepths, capacity=0.7)}),
    ],
    ids=["switch", "mixtral", "depths"],
)
def test_a_decoder_with_a_capacity_at_evaluation_knows_no_texts_length(router, options):
    """Every prefix, padded and alone, against the whole; it differed by 0.3 and 1.7."""
    run = runner(moe=moe(router, capacity=Capacity(eval_factor=1.0)), **options)
    whole = tokens()
    logits_BTV, routers = run(whole)
    assert routers.stats.kept_E.sum() < routers.stats.count_E.sum()
    for length in range(1, T):
        padded = dataclasses.replace(whole, segment_BT=whole.segment_BT.at[:, length:].set(0))
        found_BTV = run(padded)[0][:, :length]
        np.testing.assert_allclose(found_BTV, logits_BTV[:, :length], rtol=1e-5, atol=1e-5)
    fields = ("token_BT", "segment_BT", "position_BT")
    short = dataclasses.replace(whole, **{name: getattr(whole, name)[:, :3] for name in fields})
    np.testing.assert_allclose(run(short)[0], logits_BTV[:, :3], rtol=1e-5, atol=1e-5)


def test_bfloat16_logits_are_summed_and_kept_in_float32():
    """Rounded to bfloat16, 0.8 % of greedy tokens were others, and rows had ties."""
    made = initialize(model(compute_dtype="bfloat16"), 0)
    hidden_BTD = jax.random.normal(jax.random.key(0), (B, T, D)).astype(jnp.bfloat16)
    head_DV = np.asarray(made.head().astype(jnp.bfloat16), np.float64)
    expected = np.asarray(hidden_BTD, np.float64) @ head_DV
    logits_BTV = np.asarray(made.logits(hidden_BTD))
    np.testing.assert_allclose(logits_BTV, expected, rtol=1e-5, atol=1e-5)
    rounded = np.asarray(jnp.asarray(logits_BTV).astype(jnp.bfloat16), np.float32)
    assert (rounded != logits_BTV).mean() > 0.9
    target_BT = np.zeros((B, T), np.int32)
    nats = cross_entropy_of_each(made.head(), hidden_BTD, target_BT).sum()
    log_prob = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    assert float(nats) == pytest.approx(-log_prob[..., 0].sum(), rel=1e-5)


@pytest.mark.thorough
def test_shared_experts_add_what_every_token_uses():
    with_shared = initialize(
        MoELayer(D, V, TopK, 4, 8, companions=(functools.partial(SharedExpert, count=2),)), 0
    )
    without = initialize(MoELayer(D, V, TopK, 4, 8), 0)
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)
    y_BTD, plain_BTD = with_shared(x_BTD, tokens())[0], without(x_BTD, tokens())[0]
    assert with_shared.shared.up_DF.shape == (D, 16)
    shared = with_shared.shared
    weights = shared.up_DF, shared.gate_DF, shared.down_FD
    expected = plain_BTD + feed_forward(x_BTD, *weights, "swiglu")
    np.testing.assert_allclose(y_BTD, expected, rtol=1e-5, atol=1e-5)


def test_groups_of_several_sequences():
    """Capacity is counted over a group: two sequences of one group share the experts' places."""
    graph, *values = functional.split(
        initialize(MoELayer(D, V, TopK, 4, 8, sequences_per_group=2), 0)
    )
    layer = jax.jit(lambda x_BTD, tokens: graph.merge(*values)(x_BTD, tokens))
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)
    _, output = layer(x_BTD, tokens(train=True))
    assert output.decision.expert_GTK.shape == (1, 2 * T, 2)
    assert output.decision.capacity == 8  # ceil(1.25 * 2 * 12 / 4)

    def rows(number):
        ids_BT = jnp.ones((number, T), jnp.int32)
        return dataclasses.replace(
            tokens(),
            token_BT=ids_BT,
            segment_BT=ids_BT,
            position_BT=ids_BT,
            index_B=jnp.arange(number, dtype=jnp.int32),
        )

    alone = layer(x_BTD[:1], rows(1))[1]
    assert alone.decision.expert_GTK.shape == (1, T, 2), "a group is the one sequence then"
    with pytest.raises(ValueError, match="3 sequences does not divide"):
        layer(jnp.zeros((3, T, D)), dataclasses.replace(rows(3), train=True))
    assert layer(jnp.zeros((3, T, D)), rows(3))[0].shape == (3, T, D), "no groups at evaluation"


def dropping_out(rate):
    return functools.partial(FeedForwardExperts, dropout=rate)


def test_expert_dropout_drops_in_training_alone_and_keeps_the_mean():
    """Half of the hidden units, doubled: over many draws the output is that without dropout."""
    x_BTD = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
    plain, dropping = (
        initialize(MoELayer(D, V, TopK, 4, 8, experts=dropping_out(rate)), 0) for rate in (0.0, 0.5)
    )
    expected = plain(x_BTD, tokens(train=True))[0]
    same = dropping(x_BTD, tokens())[0]
    np.testing.assert_array_equal(same, plain(x_BTD, tokens())[0])

    @jax.jit
    @jax.vmap
    def draw(key):
        return dropping(x_BTD, dataclasses.replace(tokens(train=True), key=key))[0]

    found = draw(jax.random.split(jax.random.key(0), 2000))
    assert np.abs(found[0] - found[1]).max() > 0.01
    error = np.abs(found.mean(0) - expected)
    assert error.max() < 5 * (found.std(0) / np.sqrt(2000)).max()
    with pytest.raises(ValueError, match=r"FeedForwardExperts.dropout=1.0 must lie in \[0, 1\)"):
        MoELayer(D, V, TopK, 4, 8, experts=dropping_out(1.0))


def test_the_expert_of_a_hash_is_the_same_at_every_place():
    built = initialize(model(moe=moe(Hash)), 0)
    routers = built(tokens(token_BT=jnp.full((B, T), 4, jnp.int32))).routers
    for expert_GTK in np.asarray(routers.decision.expert_GTK):
        assert len(np.unique(expert_GTK)) == 1


def test_sparse_layers_of_a_dense_model_are_none():
    assert sparse_layers(3, False, 1, None) == (False,) * 3
