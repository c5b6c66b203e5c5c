"""What router losses are taken over: sequences in a group, documents, groups, layers; and what
they count. Expectations are slow loops over the papers' equations.

G groups, S sequences in each, T tokens of a sequence, D model width, E experts, K choices.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import inputs_of

from layers.moe_layer import MoELayer
from moe import assemble
from moe.model import Transformer
from moe.objective import NextToken
from routing import (
    BalanceLoss,
    BiasBalancer,
    ImportanceLoss,
    LoadLoss,
    NoisyTopK,
    Sizes,
    TopK,
    ZLoss,
    gates_GTE,
    initialize,
)

S, T, D, E, K = 4, 6, 5, 8, 2


def equation_17_to_20(score_TE, k) -> float:
    """DeepSeek-V3: sum_i f_i P_i of one sequence, f from the K largest of its plain scores."""
    tokens, experts = score_TE.shape
    f_E, p_E = np.zeros(experts), np.zeros(experts)
    for score_E in score_TE:
        for i in np.argsort(-score_E, kind="stable")[:k]:
            f_E[i] += experts / (k * tokens)
        p_E += score_E / score_E.sum() / tokens
    return float(f_E @ p_E)


def sigmoid_router(losses, **options):
    router = TopK(Sizes(D, E, 7), k=K, gates="sigmoid", renormalise=True, losses=losses, **options)
    return initialize(router, 0)


def grouped(inputs, sequences):
    """The same sequences, so many to a group."""

    def put(a):
        return a.reshape(a.shape[0] // sequences, -1, *a.shape[2:])

    return dataclasses.replace(
        inputs,
        x_GTD=put(inputs.x_GTD),
        valid_GT=put(inputs.valid_GT),
        token_id_GT=put(inputs.token_id_GT),
        position_GT=put(inputs.position_GT),
        index_G=inputs.index_G[::sequences],
        segment_GT=None if inputs.segment_GT is None else put(inputs.segment_GT),
        sequences=sequences,
    )


def collapsing():
    """Four sequences, each of which prefers experts of its own."""
    x_STD = np.random.default_rng(0).standard_normal((S, T, D))
    return inputs_of(0.1 * x_STD + 3 * np.random.default_rng(1).standard_normal((S, 1, D)))


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_a_loss_by_sequence_is_the_same_however_sequences_are_grouped(sequences):
    router, inputs = sigmoid_router((BalanceLoss(scope="sequence"),)), collapsing()
    output = router(grouped(inputs, sequences))
    logits_STE = np.asarray(inputs.x_GTD) @ np.asarray(router.weight_DE[...])
    expected = np.mean([equation_17_to_20(1 / (1 + np.exp(-one_TE)), K) for one_TE in logits_STE])
    assert expected > 1.5  # a loss over groups of four would be lower
    assert float(output.losses["balance"]) == pytest.approx(expected, rel=1e-5)


def test_a_loss_by_document_takes_packed_documents_apart():
    """Two documents in every sequence; padding at the end belongs to none."""
    router, inputs = sigmoid_router((BalanceLoss(scope="document"),)), collapsing()
    segment_ST = np.array([[1, 1, 2, 2, 2, 0]] * S, np.int32)
    valid_ST = jnp.asarray(segment_ST > 0)
    inputs = dataclasses.replace(
        inputs,
        segment_GT=jnp.asarray(segment_ST),
        valid_GT=valid_ST,
        x_GTD=jnp.where(valid_ST[..., None], inputs.x_GTD, 0),
    )
    logits_STE = np.asarray(inputs.x_GTD) @ np.asarray(router.weight_DE[...])
    score_STE = 1 / (1 + np.exp(-logits_STE))
    parts = [(2, score_TE[:2]) for score_TE in score_STE] + [(3, s[2:5]) for s in score_STE]
    expected = sum(n * equation_17_to_20(part, K) for n, part in parts) / (5 * S)
    for sequences in (1, 2):
        found = router(grouped(inputs, sequences)).losses["balance"]
        assert float(found) == pytest.approx(expected, rel=1e-5)


def test_by_default_a_loss_by_sequence_counts_raw_choices_and_others_what_was_made():
    """Logits [1, .5, 0] for two tokens, one choice, a bias of [-.5, 0, .5] that turns it round."""
    scores = 1 / (1 + np.exp(-np.array([1.0, 0.5, 0.0])))
    first, last = 3 * scores[[0, 2]] / scores.sum()  # 1.183 by eq. 18; 0.809 of what was chosen
    expected = {"sequence": (first, last), "global": (last, last), "group": (last, last)}

    def balance(scope, counts):
        loss = BalanceLoss(scope=scope, counts=counts)
        options = {"gates": "sigmoid", "balancer": BiasBalancer, "losses": (loss,)}
        router = TopK(Sizes(3, 3, 7), k=1, **options)
        router.weight_DE.set_value(jnp.eye(3))
        router.balancer.bias_E.set_value(jnp.asarray([-0.5, 0, 0.5]))
        output = router(inputs_of(np.tile([1.0, 0.5, 0.0], (1, 2, 1))))
        np.testing.assert_array_equal(output.decision.expert_GTK.ravel(), [2, 2])
        return float(output.losses["balance"])

    assert first == pytest.approx(1.183, abs=1e-3) and last == pytest.approx(0.809, abs=1e-3)
    for scope, (default, made) in expected.items():
        assert balance(scope, None) == pytest.approx(default, rel=1e-5)
        assert balance(scope, "made") == pytest.approx(made, rel=1e-5)
        assert balance(scope, "raw") == pytest.approx(first, rel=1e-5)


def test_raw_choices_need_tokens_that_choose():
    with pytest.raises(ValueError, match="counts='all': one of raw, made"):
        BalanceLoss(counts="all")


def cv_squared(sum_E) -> float:
    return float(np.var(sum_E) / np.mean(sum_E) ** 2)


@pytest.mark.parametrize("scope", ["global", "group"])
def test_importance_and_load_are_over_the_step_or_over_each_group(scope):
    losses = (ImportanceLoss(scope=scope), LoadLoss(scope=scope))
    router = initialize(NoisyTopK(Sizes(D, E, 7), k=K, losses=losses), 0)
    router.weight_DE.set_value(jnp.asarray(np.random.default_rng(2).standard_normal((D, E))))
    inputs = collapsing()
    output, routing = router(inputs), router.route(inputs)
    values = {"importance": gates_GTE(routing.decision), "load": routing.load_GTE}
    for name, value_GTE in values.items():
        sum_GE = np.asarray(value_GTE).sum(1)
        over_step, over_groups = cv_squared(sum_GE.sum(0)), np.mean([*map(cv_squared, sum_GE)])
        assert over_groups > 1.5 * over_step
        expected = over_step if scope == "global" else over_groups
        assert float(output.losses[name]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("over_layers", ["sum", "mean"])
def test_a_loss_is_summed_or_averaged_over_the_sparse_layers(over_layers):
    """Four layers, two of them sparse: what is added to the loss, and what is told of it."""
    losses = (BalanceLoss(0.5, over_layers=over_layers), ZLoss(0.25))
    router = functools.partial(TopK, k=2, losses=losses)
    moe = functools.partial(MoELayer, router=router, num_experts=4, d_ff=8)
    made = functools.partial(Transformer, d_model=8, num_layers=4, moe=moe, moe_every=2)
    model = assemble.assemble(
        made, NextToken(), token_vocabulary=16, batch_size=2, sequence_length=8
    )
    weight = 0.25 if over_layers == "mean" else 0.5
    assert model.loss_coefficients == {"balance": weight, "z": 0.25}
    (layer,) = model.module.moe_layers_of_units()
    assert layer.router.weight_of(losses[0]) == weight
