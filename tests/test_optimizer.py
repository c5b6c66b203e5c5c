"""Optimizers and schedules: what decays, what Muon makes orthogonal, where rates begin and end."""

import dataclasses

import jax
import jax.numpy as jnp
from marks import mainly
import numpy as np
import optax
import pytest

from moe.training.optimizer import Adafactor, AdamW, Declared, Lion, Muon, matrix_axes
from moe.training.schedules import Cosine, Linear, Rsqrt, WarmupStableDecay

# Parameters by name with their logical axes and roles: two layers, three experts.
PARAMETERS = {
    "embedding_VD": Declared(("vocab", "embed"), "embedding"),
    "blocks.norm.scale_D": Declared(("layer", None), "norm"),
    "blocks.attention.query_DHK": Declared(("layer", "embed", "heads", None), "attention"),
    "blocks.attention.out_HKD": Declared(("layer", "heads", None, "embed"), "attention"),
    "blocks.moe.router.weight_DE": Declared(("layer", "embed", None), "router"),
    "blocks.moe.experts.up_EDF": Declared(("layer", "expert", "embed", "mlp"), "expert"),
    "blocks.moe.experts.down_EFD": Declared(("layer", "expert", "mlp", "embed"), "expert"),
    "blocks.hash.experts.up_ENDF": Declared(
        ("layer", "expert", "segment", "embed", "mlp"), "expert"
    ),
    "blocks.feed_forward.bias_F": Declared(("layer", "mlp"), "feed_forward"),
    "blocks.feed_forward.bias_EF": Declared(("layer", "expert", "mlp"), "feed_forward"),
}
SHAPES = dict(
    zip(
        PARAMETERS,
        [
            (20, 8),
            (2, 8),
            (2, 8, 2, 4),
            (2, 2, 4, 8),
            (2, 8, 3),
            (2, 3, 8, 16),
            (2, 3, 16, 8),
            (2, 3, 2, 8, 4),
            (2, 16),
            (2, 3, 16),
        ],
        strict=True,
    )
)
MATRICES = {name for name in PARAMETERS if "scale" not in name and "bias" not in name}
EXPERTS = {name for name in PARAMETERS if ".experts." in name}


def arrays(seed: int):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    named = zip(keys, SHAPES.items(), strict=True)
    return {name: jax.random.normal(key, shape) for key, (name, shape) in named}


def update(optimizer, grads, params, steps: int = 10):
    transformation = optimizer.build({name: PARAMETERS[name] for name in params}, steps)
    return transformation.update(grads, transformation.init(params), params)[0]


KINDS = {
    "adamw": AdamW(schedule=Cosine(warmup=0.0)),
    "lion": Lion(schedule=Cosine(warmup=0.0)),
    "muon": Muon(schedule=Cosine(warmup=0.0)),
    "adafactor": Adafactor(schedule=Cosine(warmup=0.0)),
}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_given_rate_does_what_a_schedule_does(kind):
    optimizer, params = dataclasses.replace(KINDS[kind], learning_rate=0.1), arrays(0)
    scheduled, given = optimizer.build(PARAMETERS, 3), optimizer.build(PARAMETERS)
    states, rate = (scheduled.init(params), given.init(params)), optimizer.rate(3)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for step in range(3):
        grads = arrays(step + 1)
        ours, mine = optax.with_extra_args_support(given).update(
            grads, states[1], params, rate=rate(step)
        )
        theirs, other = scheduled.update(grads, states[0], params)
        states = other, mine
        for name, value in ours.items():
            np.testing.assert_allclose(value, theirs[name], rtol=1e-6)


@pytest.mark.parametrize("kind", mainly(["adamw", "adafactor"], KINDS))
def test_without_a_gradient_matrices_shrink_by_rate_times_decay(kind):
    """Whatever the rate: at 0.001 with a decay of 0.1, p loses 0.0001 p. Nothing else moves."""
    params = arrays(0)
    for peak in (1e-3, 0.5):
        optimizer = dataclasses.replace(KINDS[kind], learning_rate=peak, weight_decay=0.1)
        changes = update(optimizer, jax.tree.map(jnp.zeros_like, params), params)
        for name, change in changes.items():
            lost = -0.1 * peak * params[name] if name in MATRICES else np.zeros(SHAPES[name])
            np.testing.assert_allclose(change, lost, rtol=1e-5, atol=1e-12, err_msg=name)


def moments(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], kind: str):
    """Two updates of one parameter, with gradients that differ in size by layer and expert."""
    optimizer = dataclasses.replace(KINDS[kind], clip_norm=None, weight_decay=0.0)
    transformation = optimizer.build({name: Declared(axes, "expert")}, 10)

    def run(params, *grads):
        state, changes = transformation.init({name: params}), {}
        for grad in grads:
            changes, state = transformation.update({name: grad}, state, {name: params})
        return changes[name]

    return jax.jit(run)


# (shape of one, its axes, how many are stacked): Adafactor factors sides of 128 or more, and of
# (E, D, F) with as many experts optax would factor over the experts.
STACKS = {
    "small": ((8, 12), ("embed", "mlp"), (2, 3)),
    "many experts": ((128, 130), ("embed", "mlp"), (1, 160)),
    "many layers": ((128, 2, 64), ("embed", "heads", None), (140, 1)),
    "vectors": ((9,), (None,), (2, 3)),
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", mainly(["muon", "adafactor"], KINDS))
def test_a_weight_among_many_experts_and_layers_learns_as_if_it_were_alone(kind, stack):
    shape, axes, stacked = STACKS[stack]
    keys = jax.random.split(jax.random.key(5), 4)
    params, *grads = (jax.random.normal(key, (*stacked, *shape)) for key in keys[:3])
    # Rank-one structure within a weight, and very different sizes between them.
    size = 10.0 ** jax.random.uniform(keys[3], (*stacked, *(1 for _ in shape)), minval=-3, maxval=3)
    grads = [grad * size for grad in grads]
    every = moments("w", (*stacked, *shape), ("layer", "expert", *axes), kind)(params, *grads)
    alone = moments("w", shape, axes, kind)
    for layer, expert in [(0, 0), (stacked[0] - 1, stacked[1] - 1)]:
        one = alone(params[layer, expert], *(grad[layer, expert] for grad in grads))
        np.testing.assert_allclose(every[layer, expert], one, rtol=1e-3, atol=1e-6)


def test_adafactors_moments_are_of_rows_and_columns_of_each_weight():
    parameters = {"up": Declared(("layer", "expert", "embed", "mlp"), "expert")}
    params = {"up": jax.ShapeDtypeStruct((2, 3, 128, 130), jnp.float32)}
    state = jax.eval_shape(Adafactor().build(parameters, 10).init, params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (2, 3, 128) in shapes and (2, 3, 130) in shapes
    assert not any(len(shape) == 4 for shape in shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_goes_downhill(kind):
    """sum of squares of all parameters, 60 steps"""
    params = arrays(1)
    transformation = KINDS[kind].build(PARAMETERS, 1000)
    state = transformation.init(params)

    def loss(params):
        return sum(jnp.sum(value**2) for value in params.values())

    @jax.jit
    def step(params, state):
        changes, state = transformation.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, changes), state

    first = loss(params)
    for _ in range(60):
        params, state = step(params, state)
    assert loss(params) < 0.99 * first
    assert all(value.dtype == jnp.float32 for value in params.values())


def test_muon_makes_each_experts_matrix_orthogonal():
    grads = arrays(2)
    changes = update(Muon(weight_decay=0.0, clip_norm=None), grads, arrays(0))
    for name in EXPERTS:
        values = np.linalg.svd(np.asarray(changes[name]), compute_uv=False)
        assert values.shape[:2] == (2, 3)
        # Five iterations bring singular values to 0.7 to 1.2 of the common scale.
        assert (values.max(-1) / values.min(-1) < 2.0).all()
        sizes = np.sqrt(np.mean(np.square(np.asarray(changes[name])), axis=(-2, -1)))
        np.testing.assert_allclose(sizes, sizes.mean(), rtol=0.2)


def test_muon_leaves_embedding_router_and_vectors_to_adam():
    for name, declared in PARAMETERS.items():
        muon = matrix_axes(declared)
        assert (muon is None) == (
            name not in MATRICES or name.startswith("emb") or "router" in name
        )

    def sides(*axes):
        found = matrix_axes(Declared(axes, "attention"))
        return found.reduction_axis, found.output_axis

    assert sides("layer", "embed", "heads", None) == ((1,), (2, 3))
    assert sides("layer", "heads", None, "embed") == ((1, 2), (3,))
    assert sides("layer", "expert", "mlp", "embed") == ((2,), (3,))


def test_gradients_are_clipped_by_the_global_norm():
    """Lion's first update is a sign, Adam's a ratio: take plain momentum-free Adam moments."""
    params, grads = arrays(0), arrays(3)
    norm = float(optax.tree.norm(grads))
    clipped, unclipped = (AdamW(clip_norm=c).build(PARAMETERS, 10) for c in (1.0, None))
    _, state = clipped.update(grads, clipped.init(params), params)
    _, scaled = unclipped.update(
        jax.tree.map(lambda g: g / norm, grads), unclipped.init(params), params
    )
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(scaled), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


SCHEDULES = {
    # schedule: (step, share of the peak) of 100 steps
    Cosine(warmup=0.1, final=0.1): [(0, 0.1), (9, 1), (10, 1), (55, 0.55), (100, 0.1), (999, 0.1)],
    Cosine(warmup=0.0, final=0.0): [(0, 1), (50, 0.5), (100, 0)],
    Linear(warmup=0.1, final=0.0): [(0, 0.1), (4, 0.5), (9, 1), (10, 1), (55, 0.5), (100, 0)],
    Rsqrt(warmup=0.1): [(0, 0.1), (9, 1), (10, 1), (40, 0.5), (90, 1 / 3)],
    WarmupStableDecay(warmup=0.1, decay=0.2, final=0.0): [
        (0, 0.1),
        (9, 1),
        (10, 1),
        (79, 1),
        (90, 0.5),
        (100, 0),
    ],
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_passes_through_its_points(schedule):
    rate = schedule.build(0.01, 100)
    for step, share in SCHEDULES[schedule]:
        assert float(rate(step)) == pytest.approx(0.01 * share, abs=1e-7), step


def test_one_step_of_warm_up_is_the_peak_at_once():
    for schedule in (Cosine(warmup=0.01), Rsqrt(warmup=0.01)):
        assert float(schedule.build(1.0, 100)(0)) == pytest.approx(1.0)
        assert float(schedule.build(1.0, 100)(1)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("wrong", [{"warmup": -0.1}, {"warmup": 1.5}, {"final": 2.0}], ids=str)
def test_shares_lie_between_0_and_1(wrong):
    with pytest.raises(ValueError, match="is a share and must lie between 0 and 1"):
        Cosine(**wrong)
    with pytest.raises(ValueError, match="is a share"):
        WarmupStableDecay(warmup=0.5, decay=0.6)
