"""What every router must keep in whole models: stacks, micro-batches, meshes, precision, state.

A new router is one row of ROUTERS in rows.py. L layers, E experts.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rows import (
    DISPATCHERS,
    ROUTERS,
    B,
    D,
    F,
    T,
    V,
    compiled,
    draw,
    evaluated,
    every_kind,
    every_router,
    layer_of,
    ragged_BT,
    router_of,
    same_tree,
    tokens,
    values_of,
)

from layers.dispatch import Dispatcher, OneHotEinsum, Sorted
from layers.logical_axes import sharding_rules
from layers.moe_layer import MoELayer
from moe.data.batch import Batch
from moe.model import functional, sharding
from moe.model.transformer import Transformer
from moe.runs.storage import checkpoint
from moe.training import train_step
from moe.training.objective import EVALUATION, MaskedToken, NextToken, step_key, tokens_of
from routing import (
    Capacity,
    Causality,
)

# Rematerialisation, compilation, precision.


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("name", ["switch", "expert_choice"])
def test_rematerialised_is_the_same(name, remat):
    args = (layer_of(name)[1], draw(0, B, T, D), tokens(), draw(1, B, T, D))
    same_tree(compiled(name, remat=remat)(*args), compiled(name)(*args))


def test_rematerialisation_sorts_once_and_computes_again_only_what_it_should():
    args = (layer_of("switch")[1], draw(0, B, T, D), tokens(), draw(1, B, T, D))

    def counts(remat):
        run = compiled("switch", Sorted(kernel="loop"), remat=remat)
        text = run.lower(*args).as_text()
        return text.count("stablehlo.sort"), text.count("dot_general")

    sorts, products = counts("none")
    assert sorts > 0 and products > 0
    assert counts("dots_with_batch") == (sorts, products)
    again = counts("full")
    assert again[0] == sorts and again[1] > products


@pytest.mark.parametrize("name", ["sigmoid_bias", "expert_choice", "soft_moe", "lory"])
def test_compiled_is_interpreted(name):
    graph, params, state = layer_of(name)
    x_BTD, batch = jnp.asarray(draw(0, B, T, D)), tokens(train=False)
    same_tree(graph.merge(params, state)(x_BTD, batch), evaluated(name)(x_BTD, batch))


@every_router
def test_the_router_works_in_float32_whatever_the_layer_does(name):
    graph, params, state = layer_of(name)

    def both(x_BTD, tokens):
        layer = graph.merge(params, state)
        return layer(x_BTD, tokens), layer.router.route(layer._group(x_BTD, tokens))

    x_BTD = jnp.asarray(draw(0, B, T, D), jnp.bfloat16)
    (y_BTD, output), routing = jax.eval_shape(both, x_BTD, tokens())
    assert y_BTD.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves((output, routing)):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_)
    stats = output.stats
    assert {a.dtype for a in (stats.token_count, stats.count_E, stats.kept_E)} == {
        jnp.dtype("int32")
    }
    assert {a.dtype for a in params.values()} == {jnp.dtype("float32")}


@every_kind
def test_bfloat16_is_float32_to_two_digits(name):
    """Output and gradients in training, and the output at evaluation; the decision is the same."""
    x_BTD, weight_BTD = jnp.asarray(draw(0, B, T, D), jnp.bfloat16), draw(1, B, T, D)
    run, params = compiled(name), values_of(name)[0]
    half = run(params, x_BTD, tokens(), weight_BTD)
    full = run(params, x_BTD.astype(jnp.float32), tokens(), weight_BTD)
    same_router_output(half[3], full[3])
    for a, b in zip(jax.tree.leaves(half[:3]), jax.tree.leaves(full[:3]), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.abs(a - b).max() <= 0.05 * np.abs(b).max()
    y_BTD, output = evaluated(name)(x_BTD, tokens(train=False))
    b_BTD, same = evaluated(name)(x_BTD.astype(jnp.float32), tokens(train=False))
    same_router_output(output, same)
    assert half[2].dtype == y_BTD.dtype == jnp.bfloat16
    assert np.abs(np.asarray(y_BTD, np.float32) - b_BTD).max() <= 0.05 * np.abs(b_BTD).max()


def same_router_output(one, other):
    """To float32's rounding, but for what the layer itself adds to the statistics."""
    same_tree(*(dataclasses.replace(a, stats=None) for a in (one, other)), rtol=1e-6)
    stats = [dataclasses.replace(a.stats, batch_sums={}) for a in (one, other)]
    same_tree(*stats, rtol=1e-6)


# The whole model: stacking, micro-batches, meshes, router state.

ROWS, LENGTH, EXPERTS, STEPS = 16, 6, 8, 3
MODEL_CAPACITY = {"switch": Capacity(0.75, priority="random")}  # with the jitter: all draws


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a tiny model is built and trained with."""

    name: str
    mesh: tuple[int, ...] = (1,)
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
                **ROUTERS[setting.name].layer,
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
    return graph, train_step.TrainingFunctions(
        graph,
        tuple(abstract),
        objective=objective,
        optimizer=optimizer,
        # Token 0 is not of text: what is told of text is not the loss, and some documents start.
        num_bytes_2V=np.minimum(np.arange(graph.merge(*abstract).vocab_size), [[1], [2]]),
        mesh=shape.build(jax.devices()[: math.prod(setting.mesh)]),
        seed=1,
        accumulate=setting.accumulate,
        global_batch_losses=setting.accumulate > 1 and router_of(setting.name).needs_global_batch,
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


@pytest.mark.parametrize(
    ("name", "ragged"),
    [("sigmoid_bias", False), ("sigmoid_bias", True), ("switch", False), ("switch", True)]
    + [(name, True) for name in ("hierarchical", "gshard", "remoe", "reinforce", "default_moe")],
)
def test_micro_batches_change_nothing(name, ragged):
    """Gradients, all losses (global balance too) and statistics: four micro-batches or one."""
    expected = one_device(name, ragged)
    same_tree(run_steps(Setting(name, accumulate=4), ragged=ragged), expected)
    losses = expected[0][0].routers.losses
    if name not in ("sigmoid_bias", "switch"):
        return
    assert set(losses) == {"balance", "sequence", "z", "entropy"}
    assert (np.abs(losses["balance"] - losses["sequence"]) > 1e-3).all(), "scopes have to differ"


# Sizes of the axes data, fsdp, expert, tensor and sequence.
MESHES = [
    Setting("sigmoid_bias", (8, 1, 1, 1)),
    Setting("sigmoid_bias", (1, 2, 2, 2), OneHotEinsum()),
    Setting("sigmoid_bias", (2, 1, 4, 1), Sorted(buffer=0.5)),
    Setting("sigmoid_bias", (2, 4, 1, 1), Sorted()),
    Setting("switch", (1, 1, 8, 1)),
    Setting("switch", (1, 2, 2, 2), Sorted()),
    Setting("switch", (2, 1, 2, 1, 2), Sorted()),
    Setting("switch", (1, 1, 2, 2, 2)),
    Setting("expert_choice", (1, 8, 1, 1)),
    Setting("expert_choice", (1, 2, 2, 1, 2)),
    Setting("soft_moe", (4, 1, 1, 1, 2)),
    Setting("base", (2, 2, 2, 1)),
    Setting("hash", (4, 1, 2, 1), Sorted()),
    Setting("hash", (2, 2, 1, 1, 2), OneHotEinsum()),
]


@pytest.mark.parametrize("setting", MESHES, ids=lambda s: f"{s.name}-{s.mesh}-{s.dispatcher}")
def test_eight_devices_are_one(setting):
    """Three steps' losses, statistics, gradient norms, raw gradients and router state."""
    same_tree(run_steps(setting), one_device(setting.name))


SHAPES = sorted({setting.mesh for setting in MESHES} | {(4, 1, 1, 2), (1, 1, 4, 2)})
KINDS = ("sigmoid_bias", "switch", "expert_choice", "base", "soft_moe", "hash")
THOROUGH = [
    Setting(name, mesh, DISPATCHERS[(i + j) % len(DISPATCHERS)])
    for i, name in enumerate(KINDS)
    for j, mesh in enumerate(SHAPES)
]


@pytest.mark.thorough
@pytest.mark.parametrize("setting", THOROUGH, ids=lambda s: f"{s.name}-{s.mesh}-{s.dispatcher}")
def test_every_kind_of_router_on_every_mesh(setting):
    """As `test_eight_devices_are_one`, which takes one router for each mesh."""
    same_tree(run_steps(setting), one_device(setting.name))


@every_kind
def test_every_router_is_the_same_on_a_mesh(name):
    """One layer on data 2 x expert 4, rematerialised, against the plain one on one device.

    Gradients, outputs and statistics, with ragged padding.
    """
    dispatcher = DISPATCHERS[list(ROUTERS).index(name) % 2]
    graph, params, _ = layer_of(name)
    run = compiled.__wrapped__(name, dispatcher, remat="full")  # compiled for this mesh alone
    mesh = sharding.MeshShape(data=2, expert=4).build()
    args = (draw(0, B, T, D), tokens(valid_BT=ragged_BT), draw(1, B, T, D) * ragged_BT[..., None])
    rows = sharding.sharding(mesh, ("batch",), (B,))
    x_BTD, weight_BTD = (jax.device_put(a, rows) for a in (args[0], args[2]))
    placed = {
        n: jax.device_put(p, sharding.sharding(mesh, graph.axes[n], p.shape))
        for n, p in params.items()
    }
    assert {len(p.sharding.device_set) for p in placed.values()} == {8}
    with sharding_rules(sharding.rule(mesh)):
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


def test_every_routers_state_survives_a_checkpoint_bit_for_bit(tmp_path):
    """The parameters and state of all rows in one checkpoint; the state with bits of its own."""
    values, state = {}, {}
    for name in ROUTERS:
        params, kept = values_of(name)
        values |= {f"{name}/{key}": value for key, value in params.items()}
        state |= {f"{name}/{key}": value for key, value in kept.items()}
    bits = np.random.default_rng(0)
    for name, value in state.items():
        if value.dtype == jnp.float32:
            state[name] = jnp.asarray(bits.standard_normal(value.shape), jnp.float32)
    assert {row.state for row in ROUTERS.values() if row.state} and state
    saved = train_step.TrainState(jnp.int32(3), values, state, ())
    with checkpoint.opened(tmp_path / "checkpoints") as saves:
        saves.save(saved, {})
        saves.wait()
        found, _ = saves.restore(jax.eval_shape(lambda: saved))
    for name, value in state.items():
        assert np.asarray(found.router_state[name]).tobytes() == np.asarray(value).tobytes(), name
    same_tree(found.params, values, rtol=0, atol=0)


def test_evaluation_leaves_router_state_alone():
    graph, prog = program(Setting("sigmoid_bias"))
    state = prog.init(0)

    @jax.jit
    def evaluate(params, router_state, batch):
        model = graph.merge(params, router_state)
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
