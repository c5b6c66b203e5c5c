"""Whose choices a router loss counts, over which tokens, and how layers are combined.

Every expected value is a plain NumPy loop over the paper's sums.
"""

import dataclasses
import functools

from goldens import inputs_of
import jax
import jax.numpy as jnp
from marks import mainly
import numpy as np
import pytest
import rows

from layers.moe_layer import MoELayer
from moe.model import functional
from moe.model.transformer import Transformer
from moe.training import metrics
from routing import (
    BalanceLoss,
    BiasBalancer,
    Capacity,
    ExpertChoiceRouter,
    GShard,
    ImportanceLoss,
    LoadLoss,
    NoisyTopK,
    RouterInputs,
    Sizes,
    Switch,
    TopK,
    VMoE,
    ZLoss,
    initialize,
)
from routing.balance_losses import cv_squared

D = E = 4


def equation_17(raw_TE, k):
    """L_Bal of DeepSeek-V3, eq. 17-20 without alpha, for the tokens of one sequence."""
    tokens, experts = raw_TE.shape
    loss = 0.0
    for i in range(experts):
        f, p = 0.0, 0.0
        for t in range(tokens):
            best = sorted(range(experts), key=lambda e, t=t: (-raw_TE[t, e], e))[:k]
            f += experts / (k * tokens) * (i in best)
            p += raw_TE[t, i] / raw_TE[t].sum() / tokens
        loss += f * p
    return loss


def collapsed():
    """Four sequences of eight tokens; each is 94 % sure of an expert of its own."""
    return 3.847 * np.eye(E, dtype=np.float32)[:, None].repeat(8, 1)


def layer_with(loss, per_group, k=1, **options):
    """A layer whose router's logits are its input."""
    router = functools.partial(TopK, k=k, losses=(loss,), **options)
    layer = MoELayer(D, 13, router, E, 4, capacity=Capacity(None), sequences_per_group=per_group)
    layer = initialize(layer, 0)
    layer.router.weight_DE.set_value(jnp.eye(E))
    return layer


def balance_of(x_BTD, loss, per_group, segment_BT=None, **options):
    tokens = rows.tokens(*x_BTD.shape[:2])
    if segment_BT is not None:
        tokens = dataclasses.replace(tokens, segment_BT=jnp.asarray(segment_BT, jnp.int32))
    layer = layer_with(loss, per_group, **options)
    return float(jax.jit(lambda x_BTD, t: layer(x_BTD, t)[1].losses["balance"])(x_BTD, tokens))


@pytest.mark.parametrize("per_group", mainly([2], [1, 2, 4]))
def test_a_sequence_counts_alone_however_many_a_group_holds(per_group):
    x_BTD = collapsed()
    softmax_BTE = np.exp(x_BTD) / np.exp(x_BTD).sum(-1, keepdims=True)
    expected = np.mean([equation_17(raw_TE, k=1) for raw_TE in softmax_BTE])
    assert expected == pytest.approx(3.7593, abs=1e-4)
    for scope in ("sequence", "document"):
        assert balance_of(x_BTD, BalanceLoss(scope=scope), per_group) == pytest.approx(expected)
    of_the_group = balance_of(x_BTD, BalanceLoss(scope="group"), per_group)
    assert of_the_group == pytest.approx({1: 3.7593, 2: 1.9198, 4: 1.0}[per_group], abs=1e-4)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def ragged():
    """Logits of four sequences; two to eight valid tokens in each."""
    return rows.draw(3, 4, 8, D), np.arange(8)[None] < np.array([8, 2, 5, 3])[:, None]


@pytest.mark.parametrize("per_group", [1, 2, 4])
def test_sequences_weigh_as_many_tokens_as_they_have(per_group):
    x_BTD, valid_BT = ragged()
    each = [equation_17(sigmoid(x_TD[v_T]), k=2) for x_TD, v_T in zip(x_BTD, valid_BT, strict=True)]
    expected = np.average(each, weights=valid_BT.sum(1))
    options = {"k": 2, "gates": "sigmoid"}
    found = balance_of(x_BTD, BalanceLoss(scope="sequence"), per_group, valid_BT, **options)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("per_group", [1, 4])
def test_packed_documents_count_alone(per_group):
    """Numbers of documents may skip, and padding between a document's tokens doesn't end it."""
    x_BTD = rows.draw(5, 4, 8, D)
    segment_BT = np.array(
        [
            [1, 1, 1, 2, 2, 2, 2, 3],
            [1, 1, 1, 1, 1, 1, 1, 1],
            [1, 0, 1, 1, 9, 0, 9, 9],
            [4, 4, 5, 5, 5, 0, 0, 0],
        ]
    )
    losses, lengths = [], []
    for x_TD, segment_T in zip(x_BTD, segment_BT, strict=True):
        for document in set(segment_T) - {0}:
            losses.append(equation_17(sigmoid(x_TD[segment_T == document]), k=2))
            lengths.append(np.sum(segment_T == document))
    options = {"k": 2, "gates": "sigmoid"}
    found = balance_of(x_BTD, BalanceLoss(scope="document"), per_group, segment_BT, **options)
    assert found == pytest.approx(np.average(losses, weights=lengths), rel=1e-5)


def biased(loss, bias=(-0.5, 0.0, 0.5)):
    """E = 3, K = 1, logits [1, .5, 0] twice: expert 0 has the best score, the bias chooses 2."""
    router = TopK(Sizes(3, 3, 9), 1, "sigmoid", balancer=BiasBalancer, losses=(loss,))
    router.weight_DE.set_value(jnp.eye(3))
    router.balancer.bias_E.set_value(jnp.asarray(bias))
    inputs = inputs_of([[1.0, 0.5, 0.0]] * 2, "float32")

    def value(x_GTD):
        return router(dataclasses.replace(inputs, x_GTD=x_GTD)).losses["balance"]

    found, grad_GTD = jax.value_and_grad(value)(inputs.x_GTD)
    return float(found), np.asarray(grad_GTD[0, 0])


@pytest.mark.thorough
def test_equation_18_counts_the_raw_scores_and_not_what_the_bias_chose():
    raw = equation_17(sigmoid(np.array([[1.0, 0.5, 0.0]] * 2)), k=1)
    assert raw == pytest.approx(1.183, abs=5e-4)
    for loss in (BalanceLoss(scope="sequence"), BalanceLoss(counts="raw")):
        found, gradient = biased(loss)
        assert found == pytest.approx(raw, rel=1e-5)
        assert gradient[0] > 0 > gradient[2]
    for loss in (BalanceLoss(scope="sequence", counts="made"), BalanceLoss()):
        found, gradient = biased(loss)
        assert found == pytest.approx(0.809, abs=5e-4)
        assert gradient[0] < 0 < gradient[2]
    assert biased(BalanceLoss(counts="raw", choices="first"))[0] == pytest.approx(raw, rel=1e-5)


@pytest.mark.thorough
def test_raw_choices_are_not_limited_to_groups_of_experts():
    """Scores .8 .1 | .5 .6: the best two lie in two groups, and a token may use one of them."""
    score_TE = np.array([[0.8, 0.1, 0.5, 0.6], [0.8, 0.1, 0.5, 0.6]])
    loss = BalanceLoss(scope="sequence")
    options = {"expert_groups": 2, "groups_per_token": 1, "balancer": BiasBalancer}
    x_BTD = np.log(score_TE / (1 - score_TE)).astype(np.float32)[None]
    found = balance_of(x_BTD, loss, 1, k=2, gates="sigmoid", **options)
    assert found == pytest.approx(equation_17(score_TE, k=2), rel=1e-5)
    made = dataclasses.replace(loss, counts="made")  # 1.1 > 0.9: the second group's two
    found = balance_of(x_BTD, made, 1, k=2, gates="sigmoid", **options)
    assert found == pytest.approx(2 * (0.5 + 0.6) / 2.0, rel=1e-5)


def test_raw_needs_tokens_that_choose():
    router = ExpertChoiceRouter(Sizes(D, E, 9), losses=(BalanceLoss(counts="raw"),))
    with pytest.raises(ValueError, match='counts="raw" needs a router whose tokens choose'):
        initialize(router, 0)(inputs_of(rows.draw(0, 6, D), "float32"))


# Groups of three tokens, as a V-MoE routes images in groups.
G, T = 4, 3


def groups_of_three(valid_GT) -> RouterInputs:
    inputs = inputs_of(np.zeros((T, D)), "float32")
    zero_GT = jnp.zeros((G, T), jnp.int32)
    return dataclasses.replace(
        inputs,
        x_GTD=jnp.asarray(rows.draw(2, G, T, D)),
        valid_GT=jnp.asarray(valid_GT),
        token_id_GT=zero_GT,
        position_GT=zero_GT,
        index_G=jnp.arange(G, dtype=jnp.int32),
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("loss", "of"),
    [
        (ImportanceLoss(of="scores", scope="group"), "score_GTE"),
        (ImportanceLoss(scope="group"), "gates"),
        (LoadLoss(scope="group"), "load_GTE"),
    ],
    ids=["scores", "gates", "load"],
)
def test_importance_and_load_of_each_group(loss, of):
    valid_GT = np.arange(T)[None] < np.array([3, 3, 1, 2])[:, None]
    inputs = groups_of_three(valid_GT)
    router = initialize(VMoE(Sizes(D, E, 9), losses=(loss,)), 0)
    routing, found = router.route(inputs), router(inputs).losses[loss.name]
    value_GTE = getattr(routing, of, None)
    if of == "gates":
        value_GTE = np.zeros((G, T, E))
        at = np.asarray(routing.decision.expert_GTK)
        np.put_along_axis(value_GTE, at, np.asarray(routing.decision.gate_GTK), -1)
    losses = []
    for value_TE, valid_T in zip(np.asarray(value_GTE), valid_GT, strict=True):
        sum_E = value_TE[valid_T].sum(0)
        losses.append(sum_E.var() / sum_E.mean() ** 2)
    assert float(found) == pytest.approx(np.average(losses, weights=valid_GT.sum(1)), rel=1e-4)

    router.losses = (dataclasses.replace(loss, scope="global"),)
    over_all = float(router(inputs).losses[loss.name])
    expected = cv_squared(np.asarray(value_GTE)[valid_GT].sum(0))
    assert over_all == pytest.approx(float(expected), rel=1e-4)
    assert float(found) > 1.2 * over_all, "groups of three lean further than all tokens together"
    assert router.needs_global_batch and not loss.uses_global_batch


def test_each_papers_router_has_its_papers_scope():
    """Shazeer et al. over the batch; V-MoE's code, and GShard's algorithm 1, for each group."""
    sizes = Sizes(D, E, 9)
    assert {loss.scope for loss in NoisyTopK(sizes).losses} == {"global"}
    assert {loss.scope for loss in VMoE(sizes).losses} == {"group"}
    assert {loss.scope for loss in GShard(sizes).losses} == {"group"}
    assert {loss.scope for loss in Switch(sizes).losses} == {"global"}


@pytest.mark.parametrize("loss", [ImportanceLoss, LoadLoss])
def test_other_scopes_are_refused(loss):
    with pytest.raises(ValueError, match="scope='sequence': one of global, group"):
        loss(scope="sequence")


# How layers are combined: sparse ones in several stacks, and beside them dense ones.


@pytest.mark.parametrize("sparse", mainly([(0, 2, 3)], [(0, 1, 2, 3), (0, 2, 3), (1,)]), ids=str)
def test_the_mean_over_layers_weighs_the_same_at_any_depth(sparse):
    losses = (BalanceLoss(0.1, over_layers="mean"), ZLoss(0.01, over_layers="mean"))
    added = penalty(sparse, losses)
    assert float(added.auxiliary_loss.sum()) == pytest.approx(
        0.1 * float(added.losses["balance"].mean()) + 0.01 * float(added.losses["z"].mean()),
        rel=1e-5,
    )


def test_a_sum_over_layers_beside_a_mean():
    added = penalty((0, 2, 3), (BalanceLoss(0.1), ZLoss(0.01, over_layers="mean")))
    assert float(added.auxiliary_loss.sum()) == pytest.approx(
        0.1 * float(added.losses["balance"].sum()) + 0.01 * float(added.losses["z"].mean()),
        rel=1e-5,
    )


def penalty(sparse, losses):
    """What a model's routers say; what is reported as scaled is what enters the loss."""
    moe = functools.partial(
        MoELayer, router=functools.partial(TopK, losses=losses), num_experts=E, d_ff=4
    )

    def make():
        return Transformer(13, d_model=8, num_layers=4, num_heads=2, moe=moe, moe_layers=sparse)

    graph, *_ = functional.abstract(make)
    values = functional.split(initialize(make(), 0))[1:]
    routers = jax.jit(lambda tokens: graph.merge(*values)(tokens).routers)(rows.tokens(2, 6))
    assert routers.auxiliary_loss.shape == (len(sparse),)
    router = graph.merge(*values).moe_layers_of_units()[0].router
    weights = {loss.name: router.weight_of(loss) for loss in losses}
    told = metrics.routing_scalars(metrics.Routing.of(routers), weights)
    scaled = sum(value for name, value in told.items() if name.startswith("router_loss_scaled/"))
    assert scaled == pytest.approx(float(routers.auxiliary_loss.sum()), rel=1e-5)
    return routers


def test_layers_are_summed_or_averaged_and_nothing_else():
    router = initialize(TopK(Sizes(D, E, 9), losses=(ZLoss(over_layers="product"),)), 0)
    with pytest.raises(ValueError, match=r"ZLoss.over_layers='product': sum or mean"):
        router(inputs_of(rows.draw(0, 6, D), "float32"))
