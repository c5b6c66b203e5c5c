"""What every router, dispatcher and mesh must have in common; a new router is one row of ROUTERS.

BROKEN_ON_PURPOSE

G groups (B sequences here), T tokens, D model width, F hidden width, E experts, K experts a token.
"""

from collections.abc import Callable
import dataclasses
from fractions import Fraction
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layers.constrain import placing
from layers.dispatch import Dispatcher, OneHotEinsum, SlotGather, as_soft_slots
from layers.moe_layer import MoELayer
from layers.stack import rematerialised
from layers.tokens import Tokens
from moe import functional, sharding, step
from moe.batch import Batch
from moe.model import Transformer
from moe.objective import EVALUATION, MaskedToken, NextToken, step_key, tokens_of
from routing import (
    Balanced,
    BalanceLoss,
    BiasBalancer,
    Capacity,
    Causality,
    EntropyLoss,
    ExpertChoice,
    ExpertChoiceRouter,
    RandomHash,
    Router,
    RouterInputs,
    Sizes,
    SoftMoE,
    Switch,
    TokenChoice,
    TopK,
    UniformRandom,
    ZLoss,
    initialize,
)
from routing.router import largest

B, T, D, E, F, V = 24, 11, 8, 4, 8, 13
LOSSES = (BalanceLoss(), ZLoss(), EntropyLoss(), BalanceLoss(scope="group", name="group"))


@dataclasses.dataclass(frozen=True)
class Row:
    """A router and what must hold of it beyond what its class declares."""

    make: Callable[[Sizes], Router]
    learned: tuple[str, ...] = ("weight_DE",)
    state: tuple[str, ...] = ()


def row(make, learned=("weight_DE",), state=(), **options):
    return Row(functools.partial(make, **options), learned, state)


ROUTERS = {
    "top2": row(TopK, k=2, losses=LOSSES),
    "top1": row(TopK, k=1, losses=LOSSES),
    "top2_of_selected": row(TopK, k=2, gates="softmax_of_selected"),
    "sigmoid": row(TopK, k=2, gates="sigmoid", renormalise=True, losses=LOSSES),
    "sigmoid_bias": row(
        TopK,
        k=3,
        gates="sigmoid",
        renormalise=True,
        scale=2.5,
        balancer=BiasBalancer,
        losses=LOSSES,
        state=("balancer.bias_E",),
    ),
    "switch": row(Switch, jitter=0.1, losses=LOSSES),
    "hash": row(RandomHash, learned=(), state=("table_V",)),
    "expert_choice": row(ExpertChoiceRouter, losses=LOSSES),
    "soft_moe": row(SoftMoE, slots_per_expert=2, learned=("phi_DES", "scale"), losses=LOSSES),
    "soft_moe_raw": row(SoftMoE, normalise=False, learned=("phi_DES",), losses=LOSSES),
    "uniform": row(UniformRandom, learned=()),
    "balanced": row(Balanced, learned=()),
}
DISPATCHERS = (OneHotEinsum(), SlotGather())
every_router = pytest.mark.parametrize("name", ROUTERS)
every_dispatcher = pytest.mark.parametrize(
    "dispatcher", DISPATCHERS, ids=lambda value: type(value).__name__
)


# One layer, compiled once for each router, dispatcher and shape, and shared by the tests.


@functools.cache
def values_of(name):
    """First parameters and router state, whatever moves the tokens; a bias that selects."""
    layer = initialize(MoELayer(D, V, ROUTERS[name].make, E, F), 3)
    if getattr(layer.router, "balancer", None) is not None:
        layer.router.balancer.bias_E.set_value(jnp.linspace(-0.1, 0.1, E))
    return functional.split(layer)[1:]


@functools.cache
def layer_of(name, dispatcher=SlotGather(), capacity=Capacity()):
    router = ROUTERS[name].make
    layer = MoELayer(D, V, router, E, F, capacity=capacity, dispatcher=dispatcher)
    return functional.split(layer)[0], *values_of(name)


@functools.cache
def compiled(name, dispatcher=SlotGather(), capacity=Capacity(), remat="none"):
    """Gradients of sum(y * weight) + penalty to (parameters, x); the output; the router's."""
    graph, _, state = layer_of(name, dispatcher, capacity)

    def forward(params, x_BTD, tokens):
        return graph.join(params, state)(x_BTD, tokens)

    def loss(both, tokens, weight_BTD, penalty):
        y_BTD, output = rematerialised(forward, remat)(*both, tokens)
        total = jnp.sum(y_BTD * weight_BTD) + penalty * output.penalty
        return total, (y_BTD, output)

    @jax.jit
    def run(params, x_BTD, tokens, weight_BTD, penalty=1.0):
        grad = jax.grad(loss, has_aux=True)
        grads, (y_BTD, output) = grad((params, x_BTD), tokens, weight_BTD, penalty)
        return *grads, y_BTD, output

    return run


@functools.cache
def evaluated(name, capacity=Capacity()):
    graph, params, state = layer_of(name, SlotGather(), capacity)
    return jax.jit(lambda x_BTD, tokens: graph.join(params, state)(x_BTD, tokens))


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens(batch=B, length=T, *, train=True, seed=0, valid_BT=None, key=0):
    random = np.random.default_rng(seed)
    valid_BT = np.ones((batch, length), bool) if valid_BT is None else valid_BT
    return Tokens(
        token_BT=jnp.asarray(random.integers(0, V, (batch, length)), jnp.int32),
        segment_BT=jnp.asarray(valid_BT, jnp.int32),
        position_BT=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)),
        index_B=jnp.arange(batch, dtype=jnp.int32),
        key=jax.random.key(key),
        train=train,
    )


def per_token(decision) -> list[np.ndarray]:
    """The decision as arrays (G, T, ...): what each token got."""
    if isinstance(decision, TokenChoice):
        gate_GTK = np.where(decision.keep_GTK, decision.gate_GTK, 0)
        return [np.asarray(decision.expert_GTK), gate_GTK, np.asarray(decision.keep_GTK)]
    return [np.asarray(as_soft_slots(decision).combine_GTES.sum(-1))]


def same_tree(one, other, rtol=2e-5, atol=2e-6):
    """Equal structure; integers equal, floats to rounding."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        where = jax.tree_util.keystr(path)
        if np.issubdtype(a.dtype, np.floating):
            size = np.abs(b).max(initial=0)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol + rtol * size, err_msg=where)
        else:
            np.testing.assert_array_equal(a, b, err_msg=where)


def finite(tree):
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


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


def router_of(name):
    graph, params, state = layer_of(name)
    return graph.join(params, state).router


@pytest.mark.parametrize("order", ["token-major", "choice-major"])
@pytest.mark.parametrize("priority", ["position", "gate", "random"])
def test_a_capacity_policy_leaks_exactly_where_it_says(order, priority):
    policy = Capacity(0.5, priority=priority, order=order)
    assert policy.leaks == ((order, priority) != ("token-major", "position"))
    assert moved_prefixes(trainer("top2", policy), True).any() == policy.leaks
    # Evaluation drops nothing, so that nothing can leak.
    if priority == "gate":
        assert not moved_prefixes(evaluated("top2", policy), False).any()


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


def with_padding(train, more=2, longer=3):
    """The batch of `tokens()` with padded positions and whole padded groups; a mask; how to pad."""
    grow = ((0, more), (0, longer), (0, 0))
    valid_BT = np.pad(np.ones((B, T), bool), grow[:2])
    padded = tokens(*valid_BT.shape, train=train, seed=6, valid_BT=valid_BT)
    token_BT = padded.token_BT.at[:B, :T].set(tokens().token_BT)
    return dataclasses.replace(padded, token_BT=token_BT), valid_BT, grow


@every_router
def test_padding_changes_nothing_in_training(name):
    """Padding full of NaN: outputs, losses, counts, and the gradients to everything."""
    run, params = compiled(name), values_of(name)[0]
    x_BTD, weight_BTD = draw(0, B, T, D), draw(1, B, T, D)
    plain = run(params, x_BTD, tokens(), weight_BTD)
    batch, valid_BT, grow = with_padding(True)
    full_BTD = np.pad(x_BTD, grow, constant_values=np.nan)
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
    return output.losses, output.penalty, output.stats


@pytest.mark.parametrize("k", [1, 3, E])
def test_selection_is_by_value_and_then_by_the_lowest_index(k):
    """Against an exact, stable sort; a third of the scores are equal."""
    score_GTE = np.round(draw(0, B, T, E))
    expected = np.argsort(-score_GTE, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(largest(jnp.asarray(score_GTE), k), expected)


# Gradients and dispatchers.


@every_router
def test_the_gradient_reaches_every_parameter_of_the_router(name):
    """Of the output alone, without any loss of the router's."""
    params, state = values_of(name)
    x_BTD, weight_BTD, batch = draw(0, B, T, D), draw(1, B, T, D), tokens()
    grads = compiled(name)(params, x_BTD, batch, weight_BTD, penalty=0.0)[0]
    mine = {n.removeprefix("router."): g for n, g in grads.items() if n.startswith("router.")}
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


ragged_BT = np.arange(T)[None] < np.random.default_rng(1).integers(2, T + 1, B)[:, None]
LOOPS = [(name, 1.25) for name in ROUTERS] + [("top2", None), ("top2", 0.5), ("sigmoid_bias", 0.5)]


@functools.cache
def slow_gradients(name, factor):
    """The layer by loops: gradients to parameters and x, the output, and what was kept."""
    graph, params, state = layer_of(name, SlotGather(), Capacity(factor))
    x_BTD, weight_BTD, batch = draw(0, B, T, D), draw(1, B, T, D), tokens(valid_BT=ragged_BT)
    weight_BTD = weight_BTD * ragged_BT[..., None]

    def decided(params, x_BTD):
        layer = graph.join(params, state)
        inputs = layer._group(x_BTD, batch)
        return layer.router(inputs), inputs

    # Which experts, from the compiled layer; who keeps a place, by the loop.
    run = compiled(name, SlotGather(), Capacity(factor))
    chosen, keep_GTK = run(params, x_BTD, batch, weight_BTD)[3].decision, None
    if isinstance(chosen, TokenChoice):
        keep_GTK = np.broadcast_to(ragged_BT[..., None], chosen.expert_GTK.shape)
        if factor is not None:
            slots_G = slots_of(factor, keep_GTK.shape[-1], ragged_BT)
            keep_GTK = served(np.asarray(chosen.expert_GTK), keep_GTK, slots_G)

    def loss(both):
        output, inputs = decided(*both)
        decision = output.decision
        if keep_GTK is not None:
            decision = dataclasses.replace(decision, keep_GTK=jnp.asarray(keep_GTK))
        y_BTD = slow_layer(both[0], inputs.x_GTD, decision)
        return jnp.sum(y_BTD * weight_BTD) + output.penalty, y_BTD

    grads, y_BTD = jax.jit(jax.grad(loss, has_aux=True))((params, x_BTD))
    return *grads, y_BTD, keep_GTK


@every_dispatcher
@pytest.mark.parametrize(("name", "factor"), LOOPS)
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
            experts = graph.join(every | params, state).experts
            y_EGCD = experts(dispatcher.dispatch(x_GTD, fitted))
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
        layer = graph.join(params, state)
        y_BTD, output = layer(x_BTD, batch)
        soft = as_soft_slots(output.decision)
        x_EGCD = OneHotEinsum().dispatch(layer._group(x_BTD, batch).x_GTD, soft)
        return y_BTD, OneHotEinsum().combine(layer.experts(x_EGCD), soft), soft

    y_BTD, slow_BTD, soft = both()
    same_tree(y_BTD, slow_BTD)
    if not isinstance(router_of(name), SoftMoE):
        assert set(np.unique(soft.dispatch_GTES)) <= {0.0, 1.0}
        assert (np.asarray(soft.dispatch_GTES).sum(1) <= 1).all(), "one token in a slot at most"


# Rematerialisation, compilation, precision.


REMATS = [(n, "full") for n in ROUTERS] + [(n, "dots") for n in ("switch", "expert_choice")]


@pytest.mark.parametrize(("name", "remat"), REMATS)
def test_rematerialised_is_the_same(name, remat):
    args = (layer_of(name)[1], draw(0, B, T, D), tokens(), draw(1, B, T, D))
    same_tree(compiled(name, remat=remat)(*args), compiled(name)(*args))


@every_router
def test_compiled_is_interpreted(name):
    graph, params, state = layer_of(name)
    x_BTD, batch = jnp.asarray(draw(0, B, T, D)), tokens(train=False)
    same_tree(graph.join(params, state)(x_BTD, batch), evaluated(name)(x_BTD, batch))


@every_router
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_router_works_in_float32_whatever_the_layer_does(name, dtype):
    graph, params, state = layer_of(name)

    def both(x_BTD, tokens):
        layer = graph.join(params, state)
        return layer(x_BTD, tokens), layer.router.route(layer._group(x_BTD, tokens))

    x_BTD = jnp.asarray(draw(0, B, T, D), dtype)
    (y_BTD, output), routing = jax.eval_shape(both, x_BTD, tokens())
    assert y_BTD.dtype == dtype
    for leaf in jax.tree.leaves((output, routing)):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_)
    stats = output.stats
    assert {a.dtype for a in (stats.token_count, stats.count_E, stats.kept_E)} == {
        jnp.dtype("int32")
    }
    assert {a.dtype for a in params.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("name", "dispatcher"),
    [("sigmoid", SlotGather()), ("expert_choice", SlotGather()), ("soft_moe", OneHotEinsum())],
    ids=str,
)
def test_bfloat16_is_float32_to_two_digits(name, dispatcher):
    run, params = compiled(name, dispatcher, Capacity(1.25)), values_of(name)[0]
    x_BTD = jnp.asarray(draw(0, B, T, D), jnp.bfloat16)
    weight_BTD = draw(1, B, T, D)
    half = run(params, x_BTD, tokens(), weight_BTD)
    full = run(params, x_BTD.astype(jnp.float32), tokens(), weight_BTD)
    same_tree(half[3], full[3], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(half[:3]), jax.tree.leaves(full[:3]), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.abs(a - b).max() < 0.05 * np.abs(b).max()


# The whole model: stacking, micro-batches, meshes, router state.

ROWS, LENGTH, EXPERTS, STEPS = 16, 6, 8, 3
MODEL_CAPACITY = {"switch": Capacity(0.75, priority="random")}  # with the jitter: all draws


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a tiny model is built and trained with."""

    name: str
    mesh: tuple[int, int, int, int] = (1, 1, 1, 1)
    dispatcher: Dispatcher = DISPATCHERS[1]
    accumulate: int = 1
    remat: str = "none"
    scan: bool = True
    layers: int = 2
    moe_every: int = 1


@functools.cache
def program(setting):
    """A model of two or more layers, an optimizer with everything that could touch router state."""
    causal = router_of(setting.name).causality is not Causality.NEVER
    objective = NextToken() if causal else MaskedToken(0.3)

    def make():
        return Transformer(
            V + objective.extra_tokens,
            causal,
            d_model=D,
            num_layers=setting.layers,
            num_heads=2,
            moe=functools.partial(
                MoELayer,
                router=ROUTERS[setting.name].make,
                num_experts=EXPERTS,
                d_ff=F,
                capacity=MODEL_CAPACITY.get(setting.name, Capacity()),
                dispatcher=setting.dispatcher,
            ),
            moe_every=setting.moe_every,
            remat=setting.remat,
            scan=setting.scan,
        )

    graph, *abstract = functional.abstract(make)
    shape = sharding.MeshShape(*setting.mesh)
    optimizer = optax.chain(
        optax.trace(decay=0.0),  # remembers the raw gradients, to be compared
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.1),
        optax.sgd(0.3, momentum=0.9),
    )
    return graph, step.Step(
        graph,
        tuple(abstract),
        objective=objective,
        optimizer=optimizer,
        mesh=shape.build(jax.devices()[: math.prod(setting.mesh)]),
        seed=1,
        accumulate=setting.accumulate,
        whole_step_losses=setting.accumulate > 1,
    ).program()


def batch_of(seed, *, ragged=False):
    random = np.random.default_rng(seed)
    token_BT = random.integers(0, V, (ROWS, LENGTH + 1)).astype(np.int32)
    # Skewed, so that losses on a part are not those on the whole.
    token_BT[: ROWS // 2, ::2] = 0
    valid_BT = np.ones((ROWS, LENGTH), bool)
    if ragged:
        valid_BT = np.arange(LENGTH)[None] < random.integers(1, LENGTH + 1, ROWS)[:, None]
        valid_BT[::4] = np.arange(LENGTH)[None] < 1
        valid_BT[4] = False
    return Batch(
        token_BT=token_BT[:, :-1],
        target_BT=token_BT[:, 1:],
        segment_BT=valid_BT.astype(np.int32),
        position_BT=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        scored_BT=valid_BT,
        index_B=np.arange(ROWS, dtype=np.int32),
    )


@functools.cache
def start_of(name):
    return jax.device_get(program(Setting(name))[1].init(0))


def run_steps(setting, *, ragged=False):
    """For each step what it measured, the raw gradients and the router state it left."""
    prog = program(setting)[1]
    where = jax.tree.map(lambda a: a.sharding, prog.abstract_state)
    state, found = jax.device_put(start_of(setting.name), where), []
    for n in range(STEPS):
        batch = jax.device_put(batch_of(n, ragged=ragged), prog.batch_sharding)
        state, metrics = prog.step(state, batch)
        found.append((without_decision(metrics), state.opt_state[0].trace, state.router_state))
        # The step gives its argument's memory away.
        found[-1] = jax.device_get(found[-1])
    return found


def without_decision(metrics):
    routers = dataclasses.replace(metrics.routers, decision=None)
    return dataclasses.replace(metrics, routers=routers)


@functools.cache
def one_device(name, ragged=False):
    """What one device finds with all rows at once: whatever the mesh, nothing else is right."""
    return run_steps(Setting(name), ragged=ragged)


@pytest.mark.parametrize("change", [{"scan": False}, {"remat": "full"}, {"remat": "dots"}], ids=str)
def test_scanned_is_unrolled_and_rematerialised_is_not(change):
    """With jitter and a random priority, so that routing a second time would show."""
    same_tree(run_steps(Setting("switch", **change)), one_device("switch"))


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("name", ["sigmoid_bias", "switch"])
def test_micro_batches_change_nothing(name, ragged):
    """Gradients, all losses (global balance too) and statistics: four micro-batches or one."""
    expected = one_device(name, ragged)
    same_tree(run_steps(Setting(name, accumulate=4), ragged=ragged), expected)
    losses = expected[0][0].routers.losses
    assert set(losses) == {"balance", "group", "z", "entropy"}
    assert (np.abs(losses["balance"] - losses["group"]) > 1e-3).all(), "scopes have to differ"


MESHES = [
    Setting("sigmoid_bias", (8, 1, 1, 1)),
    Setting("sigmoid_bias", (1, 2, 2, 2), OneHotEinsum()),
    Setting("switch", (1, 1, 8, 1)),
    Setting("expert_choice", (1, 8, 1, 1)),
    Setting("soft_moe", (1, 2, 2, 2)),
]


@pytest.mark.parametrize("setting", MESHES, ids=lambda s: f"{s.name}-{s.mesh}-{s.dispatcher}")
def test_eight_devices_are_one(setting):
    """Three steps' losses, statistics, gradient norms, raw gradients and router state."""
    same_tree(run_steps(setting), one_device(setting.name))


@every_router
def test_every_router_is_the_same_on_a_mesh(name):
    """One layer on data 2 x expert 4: gradients, outputs and statistics, with ragged padding."""
    dispatcher = DISPATCHERS[list(ROUTERS).index(name) % 2]
    graph, params, _ = layer_of(name)
    run = compiled.__wrapped__(name, dispatcher)  # compiled for this mesh alone
    mesh = sharding.MeshShape(data=2, expert=4).build()
    args = (draw(0, B, T, D), tokens(valid_BT=ragged_BT), draw(1, B, T, D) * ragged_BT[..., None])
    rows = sharding.sharding(mesh, ("batch",), (B,))
    x_BTD, weight_BTD = (jax.device_put(a, rows) for a in (args[0], args[2]))
    placed = {
        n: jax.device_put(p, sharding.sharding(mesh, graph.axes[n], p.shape))
        for n, p in params.items()
    }
    assert {len(p.sharding.device_set) for p in placed.values()} == {8}
    with placing(sharding.rule(mesh)):
        found = run(placed, x_BTD, args[1], weight_BTD)
    same_tree(jax.device_get(found), jax.device_get(compiled(name)(params, *args)))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_router_state_moves_once_a_step_from_the_whole_steps_counts(accumulate):
    setting = Setting("sigmoid_bias", accumulate=accumulate)
    state = program(setting)[1].init(0)
    (name,) = state.router_state
    assert name not in state.params and name.endswith("router.balancer.bias_E")
    optimizer_leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert not any("bias_E" in jax.tree_util.keystr(path) for path, _ in optimizer_leaves)
    before_LE = np.asarray(state.router_state[name])
    for metrics, _, router_state in run_steps(setting):
        count_LE = metrics.routers.stats.count_E
        # algorithm 1, then re-centred
        moved_LE = 1e-3 * np.sign(count_LE.mean(-1, keepdims=True) - count_LE)
        moved_LE -= moved_LE.mean(-1, keepdims=True)
        np.testing.assert_allclose(router_state[name], before_LE + moved_LE, atol=1e-7)
        assert np.abs(moved_LE).max() > 5e-4
        before_LE = router_state[name]


def test_evaluation_leaves_router_state_alone():
    graph, prog = program(Setting("sigmoid_bias"))
    state = prog.init(0)

    @jax.jit
    def evaluate(params, router_state, batch):
        model = graph.join(params, router_state)
        out = model(tokens_of(batch, step_key(0, EVALUATION), train=False))
        return functional.split(model)[2], out.routers.stats.count_E

    after, count_LE = evaluate(state.params, state.router_state, batch_of(0))
    assert np.asarray(count_LE).sum() > 0
    same_tree(after, state.router_state)


def test_every_layer_and_expert_starts_with_its_own_weights_on_every_mesh():
    one = jax.device_get(program(Setting("switch"))[1].init(0))
    mesh = jax.device_get(program(Setting("switch", (1, 1, 8, 1)))[1].init(0))
    for found in (mesh.params, mesh.router_state):
        for name, value in found.items():
            expected = {**one.params, **one.router_state}[name]
            np.testing.assert_array_equal(value, expected, err_msg=name)
    mixed = Setting("switch", layers=4, moe_every=2)
    deep = jax.device_get(program(mixed)[1].init(0))
    loop = jax.device_get(program(dataclasses.replace(mixed, scan=False))[1].init(0))
    same_tree(deep, loop, rtol=0, atol=0)
    for state in (one, deep):
        for name, value in state.params.items():
            if "norm" not in name and "stacks" in name:
                rows = value.reshape(-1, *value.shape[2:]) if "experts" in name else value
                assert len({row.tobytes() for row in rows}) == len(rows), name
    # Layers 1 and 3 of four, alone among dense ones, differ from layers 0 and 1 of two.
    up_LEDF = next(v for n, v in one.params.items() if "experts.up" in n)
    deeper_LEDF = next(v for n, v in deep.params.items() if "experts.up" in n)
    np.testing.assert_array_equal(up_LEDF[1], deeper_LEDF[0])
