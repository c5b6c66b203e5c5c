"""What every router must keep in whole models: stacks, micro-batches, meshes, precision, state.

A new router is one row of ROUTERS in rows.py. L layers, E experts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import (
    DISPATCHERS,
    ROUTERS,
    B,
    D,
    T,
    assert_keeps,
    bench_of,
    compiled,
    draw,
    evaluated,
    every_model,
    layer_of,
    same_tree,
    tokens,
    values_of,
)

from layers.dispatch import OneHotEinsum, Sorted
from moe.conformance import properties
from moe.conformance.whole_model import GATHERS, Setting, program, run_steps, start_of
from moe.runs.storage import checkpoint
from moe.training import train_step
from routing import Capacity

# The properties that `moe check` judges.


@pytest.mark.parametrize("look", properties.OF_A_MODEL, ids=lambda look: look.__name__)
@every_model
def test_every_kind_of_router_keeps(name, look):
    """Read off two steps of a whole model, which the properties share."""
    assert_keeps(name, look)


# What only tests need: compilation, precision.


@pytest.mark.thorough
def test_rematerialisation_sorts_once_and_computes_again_only_what_it_should():
    args = (layer_of("switch")[1], draw(0, B, T, D), tokens(), draw(1, B, T, D))

    def counts(remat):
        run = compiled("switch", Sorted(kernel="loop"), remat=remat)
        text = jax.jit(run).lower(*args).as_text()
        return text.count("stablehlo.sort"), text.count("dot_general")

    sorts, products = counts("none")
    assert sorts > 0 and products > 0
    assert counts("dots_with_batch") == (sorts, products)
    again = counts("full")
    assert again[0] == sorts and again[1] > products


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sigmoid_bias", "expert_choice", "soft_moe", "lory"])
def test_compiled_is_interpreted(name):
    graph, params, state = layer_of(name)
    x_BTD, batch = jnp.asarray(draw(0, B, T, D)), tokens(train=False)
    same_tree(graph.merge(params, state)(x_BTD, batch), evaluated(name)(x_BTD, batch))


@every_model
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
    names = [field.name for field in dataclasses.fields(one) if field.name != "stats"]
    same_tree(*({name: getattr(a, name) for name in names} for a in (one, other)), rtol=1e-6)
    stats = [dataclasses.replace(a.stats, batch_sums={}) for a in (one, other)]
    same_tree(*stats, rtol=1e-6)


# The whole model: stacking, micro-batches, meshes, router state.

EXPERTS, STEPS = 8, 3


def setting_of(name, mesh=(1,), dispatcher=GATHERS, **more) -> Setting:
    """Switch has a random priority beside its jitter: all draws."""
    capacity = Capacity(0.75, priority="random") if name == "switch" else Capacity()
    return Setting(mesh, dispatcher, capacity=capacity, **more)


def model_of(name):
    return bench_of(name, EXPERTS)


def steps_of(name, *, ragged=False, **setting):
    return run_steps(model_of(name), setting_of(name, **setting), steps=STEPS, ragged=ragged)


@functools.cache
def one_device(name, ragged=False):
    """What one device finds with all rows at once: whatever the mesh, nothing else is right."""
    return steps_of(name, ragged=ragged)


@pytest.mark.thorough
@pytest.mark.parametrize("change", [{"scan": False}, {"remat": "dots"}], ids=str)
def test_scanned_is_unrolled_and_rematerialised_is_not(change):
    """With jitter and a random priority, so that routing a second time would show."""
    same_tree(steps_of("switch", **change), one_device("switch"))


@pytest.mark.parametrize(
    ("name", "ragged"),
    [
        ("sigmoid_bias", True),
        pytest.param("sigmoid_bias", False, marks=pytest.mark.thorough),
        pytest.param("switch", True, marks=pytest.mark.thorough),
        pytest.param("switch", False, marks=pytest.mark.thorough),
    ],
)
def test_micro_batches_change_nothing_for_three_steps(name, ragged):
    """Gradients, all losses (global balance too) and statistics: four micro-batches or one."""
    expected = one_device(name, ragged)
    same_tree(steps_of(name, accumulate=4, ragged=ragged), expected)
    losses = expected[0][0].routers.losses
    assert set(losses) == {"balance", "sequence", "z", "entropy"}
    assert (np.abs(losses["balance"] - losses["sequence"]) > 1e-3).all(), "scopes have to differ"


# Sizes of the axes data, fsdp, expert, tensor and sequence.
MESHES = [
    ("sigmoid_bias", (8, 1, 1, 1), GATHERS),
    ("sigmoid_bias", (1, 2, 2, 2), OneHotEinsum()),
    ("sigmoid_bias", (2, 1, 4, 1), Sorted(buffer=0.5)),
    ("sigmoid_bias", (2, 4, 1, 1), Sorted()),
    ("switch", (1, 1, 8, 1), GATHERS),
    ("switch", (1, 2, 2, 2), Sorted()),
    ("switch", (2, 1, 2, 1, 2), Sorted()),
    ("switch", (1, 1, 2, 2, 2), GATHERS),
    ("expert_choice", (1, 8, 1, 1), GATHERS),
    ("expert_choice", (1, 2, 2, 1, 2), GATHERS),
    ("soft_moe", (4, 1, 1, 1, 2), GATHERS),
    ("hash", (2, 2, 1, 1, 2), OneHotEinsum()),
]


# Between them every axis, every dispatcher, and an exchange that overflows.
MAIN_MESHES = [MESHES[1], MESHES[2], MESHES[9]]


@pytest.mark.parametrize(
    ("name", "mesh", "dispatcher"),
    [pytest.param(*m, marks=() if m in MAIN_MESHES else pytest.mark.thorough) for m in MESHES],
    ids=str,
)
def test_eight_devices_are_one(name, mesh, dispatcher):
    """Three steps' losses, statistics, gradient norms, raw gradients and router state."""
    same_tree(steps_of(name, mesh=mesh, dispatcher=dispatcher), one_device(name))


FURTHER = {(2, 2, 2, 1), (4, 1, 2, 1), (4, 1, 1, 2), (1, 1, 4, 2)}
SHAPES = sorted({mesh for _, mesh, _ in MESHES} | FURTHER)
ON_EVERY_MESH = ("sigmoid_bias", "switch", "expert_choice", "base", "soft_moe", "hash")
# Two routers on each mesh, so that each of them is on a third of the meshes.
THOROUGH = [
    (name, mesh, DISPATCHERS[(i + j) % len(DISPATCHERS)])
    for i, name in enumerate(ON_EVERY_MESH)
    for j, mesh in enumerate(SHAPES)
    if (i + j) % 3 == 0
]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "mesh", "dispatcher"), THOROUGH, ids=str)
def test_on_every_mesh_there_are_two_kinds_of_routers(name, mesh, dispatcher):
    """As `test_eight_devices_are_one`, which takes one router for each mesh."""
    same_tree(steps_of(name, mesh=mesh, dispatcher=dispatcher), one_device(name))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_router_state_moves_once_a_step_from_the_whole_steps_counts(accumulate):
    state = start_of(model_of("sigmoid_bias"))
    (name,) = state.router_state
    assert name not in state.params and name.endswith("router.balancer.bias_E")
    optimizer_leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert not any("bias_E" in jax.tree_util.keystr(path) for path, _ in optimizer_leaves)
    before_LE = np.asarray(state.router_state[name])
    for metrics, _, router_state in steps_of("sigmoid_bias", accumulate=accumulate):
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


@pytest.mark.thorough
def test_every_layer_and_expert_starts_with_its_own_weights_on_every_mesh():
    def first(**setting):
        return jax.device_get(program(model_of("switch"), setting_of("switch", **setting)).init(0))

    one, mesh = first(), first(mesh=(1, 1, 8, 1))
    for found in (mesh.params, mesh.router_state):
        for name, value in found.items():
            expected = {**one.params, **one.router_state}[name]
            np.testing.assert_array_equal(value, expected, err_msg=name)
    deep = first(layers=4, moe_every=2)
    loop = first(layers=4, moe_every=2, scan=False)
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
