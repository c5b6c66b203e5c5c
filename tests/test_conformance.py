"""What every router, dispatcher and mesh must have in common; a new router is one row of ROUTERS.

The properties are those of `moe check`, in moe/conformance. What was broken on purpose, once each,
and the property (or the test, here or in test_conformance_model.py) that went red:

- top-k's logits see the group's last token: causality
- later tokens are served first under capacity: causality
- gates without a gradient: gradients
- padding is not set to zero, or is counted and takes places: padding
- an empty slot reads the first token: causality, and the slow loop
- half the gate's gradient in the fast combine: the slow loop
- the balance loss on a micro-batch's own counts: micro_batches
- jitter at evaluation too: determinism
- the balancing bias moves the wrong way: router state once a step, from the whole step's counts
- the bias is updated twice, or not where a dense layer comes first: router_state
- counts are doubled where micro-batches are summed: router_state
- Muon takes the expert axis for a side of the matrix: muon
- the router's losses are added without their coefficients: coefficients
- the step halves them, or reports them with the task's loss: at_once, reported_loss
- the z-loss is a mean over padding, too: at_once, reported_loss (padding to a length)

Routers that are broken in further ways stand in test_check.py.

G groups (B sequences here), T tokens, D model width, F hidden width, E experts, K experts a token.
"""

import dataclasses
from fractions import Fraction
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import (
    DISPATCHERS,
    ROUTERS,
    B,
    D,
    E,
    T,
    assert_keeps,
    bench_of,
    compiled,
    draw,
    evaluated,
    every_dispatcher,
    every_kind,
    every_router,
    finite,
    layer_of,
    ragged_BT,
    router_of,
    same_tree,
    tokens,
    values_of,
)

from layers.dispatch import OneHotEinsum, SlotGather, Sorted, as_soft_slots
from moe.conformance import properties
from moe.conformance.causality import moved_by_the_future, moved_by_the_length
import routing
from routing import (
    Capacity,
    ExpertChoice,
    MixtureOfDepths,
    Router,
    RouterInputs,
    SoftMoE,
    TokenChoice,
)
from routing.selection import top_k_indices

# The properties that `moe check` judges.


@pytest.mark.parametrize("look", properties.OF_A_LAYER, ids=lambda look: look.__name__)
@every_kind
def test_every_router_keeps(name, look):
    """Read off programs of one small layer, which the properties share."""
    assert_keeps(name, look)


@every_router
def test_a_row_names_what_its_router_learns_and_keeps(name):
    """What is named as learned has a gradient of the output alone, without any loss's."""
    params, state = values_of(name)
    args = draw(0, B, T, D), tokens(), draw(1, B, T, D)
    grads = compiled(name)(params, *args, penalty=0.0)[0]
    mine = {n.removeprefix("router."): g for n, g in grads.items() if n.startswith("router.")}
    for parameter in ROUTERS[name].by_loss:
        assert not np.asarray(mine.pop(parameter)).any()
    assert set(mine) == set(ROUTERS[name].learned)
    assert all(np.asarray(grad).any() for grad in mine.values())
    assert {n.removeprefix("router.") for n in state} == set(ROUTERS[name].state)
    assert finite(grads)


# What only tests need.


@pytest.mark.parametrize("order", ["token-major", "choice-major"])
@pytest.mark.parametrize("priority", ["position", "gate", "random"])
def test_a_capacity_policy_leaks_exactly_where_it_says(order, priority):
    policy = Capacity(0.5, priority=priority, order=order)
    assert policy.leaks == ((order, priority) != ("token-major", "position"))
    bench = bench_of("top2")
    assert moved_by_the_future(bench.run(True, policy), True)[0].any() == policy.leaks
    # Evaluation drops nothing, so that nothing can leak.
    if priority == "gate":
        assert not moved_by_the_future(bench.evaluate(policy), False)[0].any()


@pytest.mark.parametrize("name", ["top1", "top2", "switch", "gshard", "moe_plus_plus"])
def test_a_capacity_at_evaluation_changes_nothing_before_a_texts_end(name):
    """Tokens are served in their order, by the room that the tokens so far give."""
    for factor in (0.5, 1.0):
        policy = Capacity(eval_factor=factor)
        assert not policy.leaks_at_evaluation
        run = evaluated(name, policy)
        stats = run(draw(0, B, T, D), tokens(train=False))[1].stats
        assert stats.kept_E.sum() < stats.count_E.sum()
        assert not moved_by_the_length(run).any()
    leak = Capacity(eval_factor=0.5, order="choice-major", priority="gate")
    assert leak.leaks_at_evaluation
    assert moved_by_the_length(evaluated(name, leak)).any()


@pytest.mark.parametrize("name", ["top2", "expert_choice_capped", "soft_moe_causal", "lory"])
def test_an_array_that_ends_with_the_text_is_routed_as_one_with_padding(name):
    run, x_BTD, shorter = evaluated(name), draw(0, B, T, D), 7
    whole = tokens(train=False)
    part = jax.tree.map(lambda a: a[:, :shorter] if a.ndim == 2 else a, whole)
    y_BTD, _ = run(x_BTD, whole)
    cut_BTD, _ = run(x_BTD[:, :shorter], part)
    np.testing.assert_allclose(cut_BTD, y_BTD[:, :shorter], rtol=1e-5, atol=1e-6)


def test_no_router_goes_round_the_base_class_which_sets_the_precision():
    """A depth router, too, which is in no row here."""
    shipped = [value for value in vars(routing).values() if isinstance(value, type)]
    routers = [value for value in shipped if issubclass(value, Router) and value is not Router]
    assert len(routers) > 25 and MixtureOfDepths in routers
    assert not [router for router in routers if router.__call__ is not Router.__call__]


@pytest.mark.parametrize("k", [1, 3, E])
def test_selection_is_by_value_and_then_by_the_lowest_index(k):
    """Against an exact, stable sort; a third of the scores are equal."""
    score_GTE = np.round(draw(0, B, T, E))
    expected = np.argsort(-score_GTE, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(top_k_indices(jnp.asarray(score_GTE), k), expected)


# Dispatchers.


def expert_out(params, e, x):
    up, gate, down = (params[f"experts.{n}"][e] for n in ("up_EDF", "gate_EDF", "down_EFD"))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def served(expert_GTK, keep_GTK, slots_G):
    """First come, first served: a loop over groups, tokens and choices."""
    keep_GTK = np.array(keep_GTK)
    for g in range(keep_GTK.shape[0]):
        taken = [0] * E
        for t, k in np.ndindex(keep_GTK.shape[1:]):
            if keep_GTK[g, t, k]:
                e = int(expert_GTK[g, t, k])
                keep_GTK[g, t, k] = taken[e] < slots_G[g]
                taken[e] += 1
    return keep_GTK


def slow_layer(params, x_GTD, decision):
    """What a reader would write first: every expert on every token, weighted by what it gets."""
    y_GTD = jnp.zeros_like(x_GTD)
    for e in range(E):
        if isinstance(decision, TokenChoice):
            for k in range(decision.expert_GTK.shape[-1]):
                mine_GT = (decision.expert_GTK[..., k] == e) & decision.keep_GTK[..., k]
                weight_GT = jnp.where(mine_GT, decision.gate_GTK[..., k], 0.0)
                y_GTD += weight_GT[..., None] * expert_out(params, e, x_GTD)
        elif isinstance(decision, ExpertChoice):
            for c in range(decision.token_GEC.shape[-1]):
                row_G = decision.token_GEC[:, e, c]
                mine_GT = row_G[:, None] == jnp.arange(x_GTD.shape[1])[None]
                mine_GT &= decision.keep_GEC[:, e, c][:, None]
                weight_GT = jnp.where(mine_GT, decision.gate_GEC[:, e, c][:, None], 0.0)
                y_GTD += weight_GT[..., None] * expert_out(params, e, x_GTD)
        else:
            for s in range(decision.dispatch_GTES.shape[-1]):
                slot_GD = jnp.sum(decision.dispatch_GTES[..., e, s, None] * x_GTD, axis=1)
                out_G1D = expert_out(params, e, slot_GD)[:, None]
                y_GTD += decision.combine_GTES[..., e, s, None] * out_G1D
    return y_GTD


def slots_of(factor, k, valid_GT):
    """C = ceil(factor K T / E) for the valid tokens of each group."""
    return [math.ceil(Fraction(factor) * k * int(n) / E) for n in valid_GT.sum(1)]


# Decisions of every kind; beyond its decision a dispatcher knows nothing of the router.
LOOPS = [
    ("top1", 1.25),
    ("top2", None),
    ("top2", 0.5),
    ("sigmoid_bias", 0.5),
    ("gshard", 1.25),
    ("dselect_k", 1.25),
    ("expert_choice", 1.25),
    ("soft_moe", 1.25),
    ("soft_moe_causal", 1.25),
]


@functools.cache
def slow_gradients(name, factor):
    """The layer by loops: gradients to parameters and x, the output, and what was kept."""
    graph, params, state = layer_of(name, SlotGather(), Capacity(factor))
    x_BTD, weight_BTD, batch = draw(0, B, T, D), draw(1, B, T, D), tokens(valid_BT=ragged_BT)
    weight_BTD = weight_BTD * ragged_BT[..., None]

    def decided(params, x_BTD):
        layer = graph.merge(params, state)
        inputs = RouterInputs.of(x_BTD, batch)
        return layer.router(inputs), inputs

    # Which experts, from the compiled layer; who keeps a place, by the loop.
    run = compiled(name, SlotGather(), Capacity(factor))
    chosen, keep_GTK = run(params, x_BTD, batch, weight_BTD)[3].decision, None
    if isinstance(chosen, TokenChoice):
        keep_GTK = np.asarray(jax.jit(decided)(params, x_BTD)[0].decision.keep_GTK)
        if factor is not None:
            slots_G = slots_of(factor, keep_GTK.shape[-1], ragged_BT)
            keep_GTK = served(np.asarray(chosen.expert_GTK), keep_GTK, slots_G)

    def loss(both):
        output, inputs = decided(*both)
        decision = output.decision
        if keep_GTK is not None:
            decision = dataclasses.replace(decision, keep_GTK=jnp.asarray(keep_GTK))
        y_BTD = slow_layer(both[0], inputs.x_GTD, decision)
        return jnp.sum(y_BTD * weight_BTD) + output.auxiliary_loss, y_BTD

    grads, y_BTD = jax.jit(jax.grad(loss, has_aux=True))((params, x_BTD))
    return *grads, y_BTD, keep_GTK


# Sorted moves only choices of tokens by itself.
SLOTTED = ("expert_choice", "soft_moe", "soft_moe_causal")
MOVES = [
    pytest.param(name, factor, dispatcher, id=f"{name}-{factor}-{type(dispatcher).__name__}")
    for dispatcher in DISPATCHERS
    for name, factor in LOOPS
    if not (isinstance(dispatcher, Sorted) and name in SLOTTED)
]


@pytest.mark.parametrize(("name", "factor", "dispatcher"), MOVES)
def test_every_dispatcher_equals_the_slow_loop(name, factor, dispatcher):
    """Forward, and backward to x, the experts and the router, with ragged padding and drops."""
    *expected, keep_GTK = slow_gradients(name, factor)
    run = compiled(name, dispatcher, Capacity(factor))
    params = layer_of(name, dispatcher, Capacity(factor))[1]
    weight_BTD = draw(1, B, T, D) * ragged_BT[..., None]
    *found, output = run(params, draw(0, B, T, D), tokens(valid_BT=ragged_BT), weight_BTD)
    if keep_GTK is not None:
        np.testing.assert_array_equal(output.decision.keep_GTK, keep_GTK)
        kept_E = [np.sum(keep_GTK & (output.decision.expert_GTK == e)) for e in range(E)]
        np.testing.assert_array_equal(output.stats.kept_E, kept_E)
    same_tree(found, expected)


def hand_made(k, allowed_E, seed):
    """A decision for one group: K distinct experts of those allowed, or as many as there are."""
    random = np.random.default_rng(seed)
    expert_TK, keep_TK = np.zeros((T, k), np.int32), np.zeros((T, k), bool)
    for t in range(T):
        some = random.permutation(np.flatnonzero(allowed_E))[:k]
        expert_TK[t, : len(some)], keep_TK[t, : len(some)] = some, True
    gate_TK = random.uniform(0.1, 1, (T, k)).astype(np.float32)
    return expert_TK, keep_TK & (random.uniform(size=(T, 1)) < 0.9), gate_TK


@functools.cache
def moved(dispatcher, slow):
    """For one group: output and gradients to x, the experts and the gates; padding holds NaN."""
    graph, every, state = layer_of("top2")
    params = {n: p for n, p in every.items() if n.startswith("experts.")}

    def loss(args, expert_TK, keep_TK, weight_TD):
        x_TD, params, gate_TK = args
        valid_T = keep_TK.any(1)
        x_GTD = jnp.where(valid_T[:, None], x_TD, 0)[None]
        decision = TokenChoice(expert_TK[None], gate_TK[None], keep_TK[None], E)
        if slow:
            y_TD = slow_layer(params, x_GTD, decision)[0]
        else:
            ids = jnp.zeros((1, T), jnp.int32)
            index, key = jnp.zeros(1, jnp.int32), jax.random.key(0)
            inputs = RouterInputs(x_GTD, valid_T[None], ids, ids, index, key, True)
            fitted = Capacity(None).fit(decision, inputs)
            experts = graph.merge(every | params, state).experts
            y_EGCD = experts.on_rows(dispatcher.dispatch(x_GTD, fitted))
            y_TD = dispatcher.combine(y_EGCD, fitted)[0]
        return jnp.sum(jnp.where(valid_T[:, None], y_TD * weight_TD, 0)), y_TD

    def run(x_TD, expert_TK, keep_TK, gate_TK):
        args = (x_TD, params, gate_TK)
        weight_TD = jnp.asarray(draw(7, T, D))
        return jax.grad(loss, has_aux=True)(args, expert_TK, keep_TK, weight_TD)

    return jax.jit(jax.vmap(run))


@pytest.mark.thorough
@every_dispatcher
@pytest.mark.parametrize("k", range(1, E + 1))
def test_every_pattern_of_empty_experts(k, dispatcher):
    """All 2^E - 1 sets of experts that get anything, and the empty set; padding holds NaN."""
    patterns = [np.array([bool(n >> e & 1) for e in range(E)]) for n in range(2**E)]
    made = [hand_made(k, allowed_E, n) for n, allowed_E in enumerate(patterns)]
    expert_PTK, keep_PTK, gate_PTK = (np.stack(a) for a in zip(*made, strict=True))
    x_PTD = draw(0, len(patterns), T, D)
    x_PTD[~keep_PTK.any(2)] = np.nan
    args = (x_PTD, expert_PTK, keep_PTK, gate_PTK)
    found = moved(dispatcher, False)(*args)
    same_tree(found, moved(None, True)(*args))
    assert finite(found)
    for grad in jax.tree.leaves(found[0][1]):
        for grad_EXX, allowed_E in zip(np.asarray(grad), patterns, strict=True):
            assert not grad_EXX[~allowed_E].any()


@pytest.mark.parametrize("name", ["sigmoid_bias", "expert_choice", "soft_moe"])
def test_the_common_form_moves_the_same(name):
    """as_soft_slots(decision), run as soft slots, gives what the decision itself gives."""
    graph, params, state = layer_of(name)
    x_BTD, batch = jnp.asarray(draw(0, B, T, D)), tokens(valid_BT=ragged_BT)

    @jax.jit
    def both():
        layer = graph.merge(params, state)
        y_BTD, output = layer(x_BTD, batch)
        soft = as_soft_slots(output.decision)
        x_EGCD = OneHotEinsum().dispatch(RouterInputs.of(x_BTD, batch).x_GTD, soft)
        return y_BTD, OneHotEinsum().combine(layer.experts.on_rows(x_EGCD), soft), soft

    y_BTD, slow_BTD, soft = both()
    same_tree(y_BTD, slow_BTD)
    if not isinstance(router_of(name), SoftMoE):
        assert set(np.unique(soft.dispatch_GTES)) <= {0.0, 1.0}
        assert (np.asarray(soft.dispatch_GTES).sum(1) <= 1).all(), "one token in a slot at most"
