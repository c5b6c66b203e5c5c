"""Parameters and moments in bfloat16: unbiased rounding, equality with float32 masters, sharding.

Broken once, each seen red: noise of 15 bits; rounding to the nearest in place of the random one;
masters that start from rounded parameters; a sum of micro-batches in bfloat16.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layers.moe_layer import MoELayer
from moe.data.batches import train_batch
from moe.model.sharding import MeshShape
from moe.model.transformer import Transformer
from moe.runs.storage import checkpoint
from moe.training.abstract_model import Vocabulary
from moe.training.optimizer import Adafactor, AdamW, Lion, Muon
from moe.training.precision import Precision
from moe.training.rounding import noise, stochastically
from moe.training.run_spec import RunSpec
from moe.training.train_step import to_devices
from routing import TopK

HALF = Precision("bfloat16", "bfloat16")


def test_rounding_is_to_a_neighbour_and_right_on_average():
    """1 + 1/512 lies a quarter of the way from 1 to 1 + 1/128."""
    x_N = jnp.full(4096, 1 + 1 / 512, jnp.float32)
    for sign in (1.0, -1.0):
        y_N = np.asarray(stochastically(sign * x_N, jnp.uint32(7)), np.float64)
        assert set(np.abs(y_N)) == {1.0, 1 + 1 / 128}
        share = (np.abs(y_N) > 1).mean()
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4096) ** 0.5, share


def test_rounding_keeps_what_bfloat16_holds_and_what_is_not_finite():
    exact = [0.0, -0.0, 1.0, -3.5, 2.0**100, np.inf, -np.inf]
    y = stochastically(jnp.array([*exact, np.nan], jnp.float32), jnp.uint32(3))
    assert np.asarray(y[:-1], np.float32).tolist() == exact and jnp.isnan(y[-1])


def test_noise_differs_by_seed_and_index_and_is_even():
    one, other = (np.asarray(noise((64, 128), jnp.uint32(s))) for s in (1, 2))
    assert (one != other).mean() > 0.999 and len(np.unique(one)) > 8190
    bits = np.unpackbits(one.reshape(-1, 1).view(np.uint8), axis=1).mean(0)
    assert np.abs(bits - 0.5).max() < 0.03
    assert abs(np.corrcoef(one[:-1].ravel(), one[1:].ravel())[0, 1]) < 0.05


def test_small_updates_add_up_where_rounding_to_the_nearest_would_lose_all():
    """64 updates of a sixteenth of a step of bfloat16 at 1: four steps, give or take."""

    def add(x_N, seed):
        return stochastically(x_N.astype(jnp.float32) + 2.0**-11, seed), None

    x_N, _ = jax.lax.scan(add, jnp.ones(2048, jnp.bfloat16), jnp.arange(64, dtype=jnp.uint32))
    assert abs(float(x_N.astype(jnp.float32).mean()) - (1 + 64 * 2.0**-11)) < 2e-3
    nearest = jnp.bfloat16(1 + 2.0**-11)
    assert nearest == 1


@functools.cache
def program_of(precision, optimizer=None, mesh=(1, 1), accumulate=1, base_width=None):
    moe = functools.partial(MoELayer, num_experts=4, d_ff=16, router=TopK)
    make = functools.partial(Transformer, d_model=16, num_layers=2, moe=moe, base_width=base_width)
    shape = MeshShape(data=1, fsdp=mesh[0], expert=mesh[1], tensor=1, sequence=1)
    spec = RunSpec(
        None,
        make,
        optimizer=optimizer or AdamW(learning_rate=1e-2),
        precision=precision,
        mesh=shape,
        steps=20,
        batch_size=8,
        sequence_length=16,
        accumulate=accumulate,
    )
    devices = jax.devices()[: mesh[0] * mesh[1]]
    model, program = spec.build(Vocabulary(64), spec.build_mesh(devices))
    return model, program


def trained(*settings, steps=3, **more):
    """The program's states before and after some steps, and the losses."""
    _, program = program_of(*settings, **more)
    state = program.init(0)
    first = jax.device_get(state)
    losses = []
    for step in range(steps):
        window_BW = np.random.default_rng(step).integers(0, 64, (8, 17), np.int32)
        rows = to_devices(
            train_batch(window_BW, np.arange(8, dtype=np.int32)), program.batch_sharding, 8
        )
        state, metrics = program.step(state, rows)
        losses.append(float(metrics.loss))
    return first, jax.device_get(state), losses


def wide(a):
    return np.asarray(a, np.float32)


def test_what_is_kept_in_which_type():
    state = program_of(HALF)[1].abstract_state
    low = {n for n, a in state.params.items() if a.dtype == jnp.bfloat16}
    assert {"embedding_VD"} < low and any("experts.up" in name for name in low)
    assert not any("router" in name or "norm" in name for name in low)
    moments = state.opt_state[1]
    assert {n for n, a in moments.mu.items() if a.dtype == jnp.bfloat16} == low
    assert {n for n, a in moments.nu.items() if a.dtype == jnp.bfloat16} == low


@pytest.mark.thorough
def test_float32_is_what_it_was_without_the_setting():
    """The same optimizer applied by hand to the program's own gradients."""
    model, program = program_of(Precision())
    state = program.init(0)
    window_BW = np.random.default_rng(0).integers(0, 64, (8, 17), np.int32)
    rows = train_batch(window_BW, np.arange(8, dtype=np.int32))
    rows = to_devices(rows, program.batch_sharding, 8)
    grads, _ = program.gradients(state, rows)
    rule = AdamW(learning_rate=1e-2).build(model.graph.declared)
    rate = program.step.given.rate_N[0]
    updates, _ = rule.update(grads, state.opt_state, state.params, rate=rate)
    by_hand = jax.device_get(optax.apply_updates(state.params, updates))
    after, _ = program.step(state, rows)
    for name, value in by_hand.items():
        np.testing.assert_allclose(after.params[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.thorough
def test_parameters_are_their_masters_rounded_and_masters_start_unrounded():
    plain, _, _ = trained(Precision(), steps=1)
    first, state, _ = trained(Precision("masters"))
    for found in (first, state):
        for name, master in found.opt_state.masters.items():
            nearest = np.asarray(jnp.asarray(master).astype(jnp.bfloat16))
            np.testing.assert_array_equal(found.params[name], nearest, err_msg=name)
    for name, master in first.opt_state.masters.items():
        np.testing.assert_allclose(master, plain.params[name], rtol=1e-6, err_msg=name)


OTHER = Precision("masters", "bfloat16")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [
        (HALF, AdamW(1e-2)),
        (OTHER, AdamW(1e-2)),
        (HALF, Lion(1e-3)),
        (OTHER, Lion(1e-3)),
    ],
    ids=str,
)
def test_it_learns_as_float32_does(precision, optimizer):
    """Parameters stay within a few steps of bfloat16 of those in float32; losses are close."""
    _, full, losses = trained(Precision(), optimizer)
    _, half, near = trained(precision, optimizer)
    np.testing.assert_allclose(near, losses, rtol=0.02)
    for name, value in full.params.items():
        apart = np.abs(wide(half.params[name]) - value).mean()
        assert apart < 0.25 * np.abs(value).mean(), name


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", [Adafactor(), Muon()], ids=["adafactor", "muon"])
def test_every_optimizer_takes_it(optimizer):
    _, state, losses = trained(HALF, optimizer, steps=2)
    assert np.isfinite(losses).all()
    assert state.params["embedding_VD"].dtype == jnp.bfloat16


@pytest.mark.thorough
def test_a_mesh_rounds_as_one_device_does():
    """The first update of every value is the same, or one step of bfloat16 away."""
    _, one, _ = trained(HALF, steps=1)
    _, many, _ = trained(HALF, mesh=(2, 4), steps=1)
    for name, value in one.params.items():
        same = wide(many.params[name]) == wide(value)
        assert same.mean() > 0.9, (name, same.mean())


def test_masters_and_half_moments_are_sharded_as_their_parameters():
    _, program = program_of(Precision("masters", "bfloat16"), mesh=(2, 4))
    state = program.abstract_state
    name = next(n for n in state.params if "experts.up" in n)
    spec = state.params[name].sharding.spec
    assert "expert" in spec and "fsdp" in spec
    moments = state.opt_state.optimizer[1]
    for tree in (state.opt_state.masters, moments.mu, moments.nu):
        assert tree[name].sharding.spec == spec


@pytest.mark.thorough
def test_micro_batches_are_summed_in_float32():
    _, program = program_of(HALF, accumulate=4)
    state = program.init(0)
    window_BW = np.random.default_rng(0).integers(0, 64, (8, 17), np.int32)
    rows = train_batch(window_BW, np.arange(8, dtype=np.int32))
    rows = to_devices(rows, program.batch_sharding, 8)
    grads, _ = program.gradients(state, rows)
    assert {a.dtype for a in grads.values()} == {jnp.dtype("float32")}
    whole, _ = program_of(HALF)[1].gradients(state, rows)
    for name, grad in whole.items():
        np.testing.assert_allclose(wide(grads[name]), wide(grad), rtol=0.1, atol=3e-3, err_msg=name)


@pytest.mark.thorough
def test_rates_of_width_and_decay_reach_the_rounded_parameters():
    """With a zero gradient decay is left: embedding and experts shrink, norms do not."""
    model, _ = program_of(Precision("masters"), base_width=8)
    declared = model.graph.declared
    rule = AdamW(learning_rate=1.0, weight_decay=0.5).build(declared)
    rule = optax.with_extra_args_support(rule)
    precision = Precision("masters")
    params = jax.tree.map(lambda a: jnp.ones(a.shape), model.shapes[0])
    kept, state = precision.init(rule, params, declared)
    zero = jax.tree.map(jnp.zeros_like, kept)
    after, _, updates = precision.update(rule, zero, state, kept, declared, jnp.uint32(1), rate=0.5)
    for name, value in after.items():
        decays = "norm" not in name
        assert wide(value).ravel()[0] == (0.75 if decays else 1.0), name
        assert updates[name].dtype == jnp.float32
    one = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), kept)
    rule = optax.with_extra_args_support(AdamW(weight_decay=0.0, clip_norm=None).build(declared))
    _, _, updates = precision.update(rule, one, state, kept, declared, jnp.uint32(1), rate=1.0)
    name = next(n for n in updates if "experts.up" in n)
    np.testing.assert_allclose(updates[name], -0.5, rtol=1e-3)
    np.testing.assert_allclose(updates["embedding_VD"], -1.0, rtol=1e-3)


@pytest.mark.thorough
def test_a_checkpoint_holds_the_kept_types_and_goes_on_bit_for_bit(tmp_path):
    precision = dataclasses.replace(HALF, parameters="masters")
    _, program = program_of(precision)
    _, state, _ = trained(precision)
    with checkpoint.opened(tmp_path / "checkpoints") as saves:
        saves.save(jax.device_put(state), {})
        saves.wait()
        found, _ = saves.restore(program.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), state)
