"""What every router, dispatcher and mesh must have in common; a new router is one row of ROUTERS.

What was broken on purpose, once each, and the test that went red here or in
test_conformance_model.py:

- top-k's logits see the group's last token: declared causality
- later tokens are served first under capacity: declared causality
- gates without a gradient: every parameter of the router
- padding is not set to zero, or is counted and takes places: padding in training
- an empty slot reads the first token: declared causality, and the slow loop
- half the gate's gradient in the fast combine: the slow loop
- the balance loss on a micro-batch's own counts: micro-batches
- jitter at evaluation too: evaluation is deterministic
- the balancing bias moves the wrong way: router state

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
    compiled,
    draw,
    evaluated,
    every_dispatcher,
    every_router,
    finite,
    layer_of,
    per_token,
    ragged_BT,
    router_of,
    same_tree,
    tokens,
    values_of,
)

from layers.dispatch import OneHotEinsum, SlotGather, Sorted, as_soft_slots
from moe.conformance.harness import router_matmuls
import routing
from routing import (
    Capacity,
    Causality,
    ExpertChoice,
    MixtureOfDepths,
    Router,
    RouterInputs,
    SoftMoE,
    TokenChoice,
)
from routing.selection import top_k_indices

# Causality, determinism, padding.


def moved_prefixes(run, train):
    """For B trials: did anything before a random cut change when all from the cut on changed?"""
    cut_B = np.random.default_rng(5).integers(1, T, B)
    later_BT = np.arange(T)[None] >= cut_B[:, None]
    first, other = tokens(train=train), tokens(train=train, seed=1)
    mixed_BT = jnp.where(later_BT, other.token_BT, first.token_BT)
    second = dataclasses.replace(first, token_BT=mixed_BT)
    x_BTD = draw(0, B, T, D)
    y_1, output_1 = run(x_BTD, first)
    y_2, output_2 = run(np.where(later_BT[..., None], draw(1, B, T, D), x_BTD), second)
    moved_B = np.zeros(B, bool)
    ones, others = per_token(output_1.decision), per_token(output_2.decision)
    for a, b in zip([np.asarray(y_1), *ones], [np.asarray(y_2), *others], strict=True):
        different_BT = (a != b).reshape(B, T, -1).any(-1)
        moved_B |= (different_BT & ~later_BT).any(1)
    suffix_BT = (np.asarray(y_1) != np.asarray(y_2)).any(-1)
    assert (suffix_BT & later_BT).any(), "the perturbation has to reach the suffix itself"
    return moved_B


def trainer(name, capacity=Capacity()):
    run, params = compiled(name, capacity=capacity), layer_of(name, capacity=capacity)[1]
    return lambda x_BTD, tokens: run(params, x_BTD, tokens, jnp.ones_like(x_BTD))[2:]


@every_router
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_declared_causality_is_the_true_one(name, train):
    moved_B = moved_prefixes(trainer(name) if train else evaluated(name), train)
    causality = router_of(name).causality
    causal = causality is Causality.CAUSAL
    if causality is Causality.CAUSAL_AT_EVALUATION:
        causal = not train
    assert not moved_B.any() if causal else moved_B.any()


@pytest.mark.parametrize("order", ["token-major", "choice-major"])
@pytest.mark.parametrize("priority", ["position", "gate", "random"])
def test_a_capacity_policy_leaks_exactly_where_it_says(order, priority):
    policy = Capacity(0.5, priority=priority, order=order)
    assert policy.leaks == ((order, priority) != ("token-major", "position"))
    assert moved_prefixes(trainer("top2", policy), True).any() == policy.leaks
    # Evaluation drops nothing, so that nothing can leak.
    if priority == "gate":
        assert not moved_prefixes(evaluated("top2", policy), False).any()


def prefixes_that_move(run):
    """Whether anything differs in a text that ends somewhere from the same text that goes on."""
    cut_B1 = np.random.default_rng(6).integers(1, T, (B, 1))
    before_BT = np.arange(T)[None] < cut_B1
    x_BTD, whole = draw(0, B, T, D), tokens(train=False)
    part = tokens(train=False, valid_BT=before_BT)
    y_BTD, output = run(x_BTD, whole)
    cut_BTD, cut = run(x_BTD, part)
    pairs = zip(
        [np.asarray(y_BTD), *per_token(output.decision)],
        [np.asarray(cut_BTD), *per_token(cut.decision)],
        strict=True,
    )
    return any(not np.allclose(a[before_BT], b[before_BT], 1e-5, 1e-6) for a, b in pairs)


@every_router
def test_a_longer_text_changes_nothing_before_it_at_evaluation(name):
    """A text's length is a part of its future, too."""
    causal = router_of(name).causality is not Causality.NEVER
    assert prefixes_that_move(evaluated(name)) != causal


@pytest.mark.parametrize("name", ["top1", "top2", "switch", "gshard", "moe_plus_plus"])
def test_a_capacity_at_evaluation_changes_nothing_before_a_texts_end(name):
    """Tokens are served in their order, by the room that the tokens so far give."""
    for factor in (0.5, 1.0):
        policy = Capacity(eval_factor=factor)
        assert not policy.leaks_at_evaluation
        run = evaluated(name, policy)
        stats = run(draw(0, B, T, D), tokens(train=False))[1].stats
        assert stats.kept_E.sum() < stats.count_E.sum()
        assert not prefixes_that_move(run)
    leak = Capacity(eval_factor=0.5, order="choice-major", priority="gate")
    assert leak.leaks_at_evaluation
    assert prefixes_that_move(evaluated(name, leak))


@pytest.mark.parametrize("name", ["top2", "expert_choice_capped", "soft_moe_causal", "lory"])
def test_an_array_that_ends_with_the_text_is_routed_as_one_with_padding(name):
    run, x_BTD, shorter = evaluated(name), draw(0, B, T, D), 7
    whole = tokens(train=False)
    part = jax.tree.map(lambda a: a[:, :shorter] if a.ndim == 2 else a, whole)
    y_BTD, _ = run(x_BTD, whole)
    cut_BTD, _ = run(x_BTD[:, :shorter], part)
    np.testing.assert_allclose(cut_BTD, y_BTD[:, :shorter], rtol=1e-5, atol=1e-6)


@every_router
def test_evaluation_is_deterministic_and_knows_no_neighbours(name):
    run, x_BTD = evaluated(name), draw(2, B, T, D)
    batch = tokens(train=False)
    one, again = run(x_BTD, batch), run(x_BTD, dataclasses.replace(batch, key=jax.random.key(9)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    # Sequence 0 at place 7, under another number, among others of other lengths.
    valid_BT = np.arange(T)[None] < np.random.default_rng(3).integers(1, T, B)[:, None]
    valid_BT[7] = True
    others = tokens(train=False, seed=8, valid_BT=valid_BT)
    others = dataclasses.replace(others, token_BT=others.token_BT.at[7].set(batch.token_BT[0]))
    strange_BTD = 3 * draw(4, B, T, D)
    strange_BTD[7] = x_BTD[0]
    moved = run(strange_BTD, others)
    np.testing.assert_allclose(moved[0][7], one[0][0], rtol=1e-5, atol=1e-6)
    for a, b in zip(per_token(moved[1].decision), per_token(one[1].decision), strict=True):
        np.testing.assert_allclose(a[7], b[0], rtol=1e-5, atol=1e-6)


@every_router
def test_order_and_token_ids_matter_where_declared(name):
    """At evaluation: tokens permuted inside their groups; then other ids for the same vectors."""
    router, run, x_BTD = router_of(name), evaluated(name), draw(0, B, T, D)
    batch = tokens(train=False)
    order_BT = np.argsort(np.random.default_rng(2).random((B, T)), axis=1)
    token_BT = jnp.take_along_axis(batch.token_BT, order_BT, axis=1)
    moved = run(
        np.take_along_axis(x_BTD, order_BT[..., None], axis=1),
        dataclasses.replace(batch, token_BT=token_BT),
    )
    y_BTD, output = run(x_BTD, batch)
    plain = [np.asarray(y_BTD), *per_token(output.decision)]
    back = [np.take_along_axis(a, order_BT.reshape(B, T, *[1] * (a.ndim - 2)), 1) for a in plain]
    pairs = zip([np.asarray(moved[0]), *per_token(moved[1].decision)], back, strict=True)
    same = all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    assert same != router.order_matters
    other = per_token(run(x_BTD, tokens(train=False, seed=9))[1].decision)
    same = all(np.array_equal(a, b) for a, b in zip(other, plain[1:], strict=True))
    assert same != router.needs_token_ids


def with_padding(train, more=2, longer=3):
    """The batch of `tokens()` with padded positions and whole padded groups; a mask; how to pad."""
    grow = ((0, more), (0, longer), (0, 0))
    valid_BT = np.pad(np.ones((B, T), bool), grow[:2])
    padded = tokens(*valid_BT.shape, train=train, seed=6, valid_BT=valid_BT)
    token_BT = padded.token_BT.at[:B, :T].set(tokens().token_BT)
    return dataclasses.replace(padded, token_BT=token_BT), valid_BT, grow


@every_router
def test_padding_changes_nothing_in_training(name):
    """Padding full of NaN: outputs, losses, counts, and the gradients to everything.

    The padded batch moves by the reference einsum, the other one by gathers: they are equal, too.
    """
    params = values_of(name)[0]
    x_BTD, weight_BTD = draw(0, B, T, D), draw(1, B, T, D)
    plain = compiled(name)(params, x_BTD, tokens(), weight_BTD)
    batch, valid_BT, grow = with_padding(True)
    full_BTD = np.pad(x_BTD, grow, constant_values=np.nan)
    run = compiled(name, OneHotEinsum())
    padded = run(params, full_BTD, batch, np.pad(weight_BTD, grow))
    assert finite(padded[:2]) and not np.asarray(padded[2])[~valid_BT].any()
    cut = [padded[0], padded[1][:B, :T], padded[2][:B, :T]]
    same_tree(cut, list(plain[:3]))
    same_tree(told(padded[3]), told(plain[3]))


@every_router
def test_padding_changes_nothing_at_evaluation(name):
    run, x_BTD = evaluated(name), draw(0, B, T, D)
    batch, valid_BT, grow = with_padding(False)
    y_BTD, output = run(np.pad(x_BTD, grow, constant_values=np.nan), batch)
    plain_BTD, plain = run(x_BTD, tokens(train=False))
    assert not np.asarray(y_BTD)[~valid_BT].any()
    same_tree(y_BTD[:B, :T], plain_BTD)
    same_tree(told(output), told(plain))


def told(output):
    return output.losses, output.auxiliary_loss, output.stats


@every_router
def test_every_matmul_of_a_router_is_in_float32_on_every_machine(name):
    """Forward and backward: by default a TPU multiplies in bfloat16 and a GPU in TF32."""
    found = router_matmuls(*layer_of(name), draw(0, B, T, D), tokens())
    highest = jax.lax.Precision.HIGHEST
    assert all(eqn.params["precision"] == (highest, highest) for eqn in found)
    assert found or not ROUTERS[name].learned


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


# Gradients and dispatchers.


@every_router
def test_the_gradient_reaches_every_parameter_of_the_router(name):
    """Of the output alone, without any loss of the router's."""
    params, state = values_of(name)
    x_BTD, weight_BTD, batch = draw(0, B, T, D), draw(1, B, T, D), tokens()
    grads = compiled(name)(params, x_BTD, batch, weight_BTD, penalty=0.0)[0]
    mine = {n.removeprefix("router."): g for n, g in grads.items() if n.startswith("router.")}
    for parameter in ROUTERS[name].by_loss:
        assert not np.asarray(mine.pop(parameter)).any()
    assert set(mine) == set(ROUTERS[name].learned)
    assert {n.removeprefix("router.") for n in state} == set(ROUTERS[name].state)
    assert finite(grads)
    for grad in mine.values():
        # Every expert's column, too.
        columns = np.abs(np.asarray(grad)).reshape(D if grad.ndim else 1, -1).max(0)
        assert (columns > 1e-5).all(), columns


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
        inputs = layer._group(x_BTD, batch)
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
        x_EGCD = OneHotEinsum().dispatch(layer._group(x_BTD, batch).x_GTD, soft)
        return y_BTD, OneHotEinsum().combine(layer.experts(x_EGCD), soft), soft

    y_BTD, slow_BTD, soft = both()
    same_tree(y_BTD, slow_BTD)
    if not isinstance(router_of(name), SoftMoE):
        assert set(np.unique(soft.dispatch_GTES)) <= {0.0, 1.0}
        assert (np.asarray(soft.dispatch_GTES).sum(1) <= 1).all(), "one token in a slot at most"
