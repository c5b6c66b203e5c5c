"""A tiny whole model around a router, and one optimizer step of it in many settings.

B rows, T tokens, L sparse layers, V token ids.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layers.dispatch import Dispatcher, SlotGather
from layers.remat import Remat
from moe.conformance.harness import Bench, D, V
from moe.data.batch import Batch
from moe.model import functional, sharding
from moe.model.transformer import Transformer
from moe.training import objective as objectives
from moe.training import train_step
from moe.training.objective import MaskedToken, NextToken
from routing import Capacity, Causality

ROWS, LENGTH, SEED = 32, 6, 1
GATHERS, CAPACITY = SlotGather(), Capacity()


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a tiny model is built and trained with; mesh: sizes of its axes, as in `MeshShape`."""

    mesh: tuple[int, ...] = (1,)
    dispatcher: Dispatcher = GATHERS
    accumulate: int = 1
    remat: Remat = "none"
    scan: bool = True
    layers: int = 2
    moe_every: int = 1
    capacity: Capacity = CAPACITY


def objective_of(bench: Bench):
    """The next token, or masked ones for a router that no decoder may have."""
    causal = bench.router.causality is not Causality.NEVER
    return NextToken() if causal else MaskedToken(0.15)


@functools.cache
def step_of(bench: Bench, setting: Setting) -> train_step.TrainingFunctions:
    """A model, and an optimizer with everything that could touch router state."""
    objective = objective_of(bench)

    def make():
        return Transformer(
            V + objective.extra_tokens,
            objective.causal,
            bench.text,
            d_model=D,
            num_layers=setting.layers,
            num_heads=2,
            moe=functools.partial(
                bench.make_layer, capacity=setting.capacity, dispatcher=setting.dispatcher
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
    return train_step.TrainingFunctions(
        graph,
        (abstract[0], abstract[1]),
        objective=objective,
        optimizer=optimizer,
        num_bytes_2V=num_bytes_2V(objective),
        mesh=shape.build(jax.devices()[: math.prod(setting.mesh)]),
        seed=SEED,
        accumulate=setting.accumulate,
        global_batch_losses=setting.accumulate > 1 and bench.router.needs_global_batch,
    )


@functools.cache
def program(bench: Bench, setting: Setting) -> train_step.Program:
    """The step's functions, jitted for its mesh."""
    return step_of(bench, setting).program()


def num_bytes_2V(objective) -> np.ndarray:
    """Token 0 is not of text: what is told of text is not the loss, and some documents start."""
    return np.minimum(np.arange(V + objective.extra_tokens), [[1], [2]])


def batch_of(seed: int, *, ragged: bool = False) -> Batch:
    """Skewed text: losses on a part of it are not those on the whole."""
    random = np.random.default_rng(seed)
    token_BT = random.integers(0, V, (ROWS, LENGTH + 1)).astype(np.int32)
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
def start_of(bench: Bench, plain: Setting = Setting()) -> train_step.TrainState:
    """The state before the first step, whatever the mesh; not jitted, so as to compile little."""
    return jax.device_get(step_of(bench, plain).init(0))


def run_steps(
    bench: Bench, setting: Setting, *, steps: int = 3, ragged: bool = False
) -> list[tuple]:
    """For each step what it measured, the raw gradients and the router state it left."""
    prog = program(bench, setting)
    plain = Setting(layers=setting.layers, moe_every=setting.moe_every)
    where = jax.tree.map(lambda a: a.sharding, prog.abstract_state)
    state, found = jax.device_put(start_of(bench, plain), where), []
    for n in range(steps):
        batch = jax.device_put(batch_of(n, ragged=ragged), prog.batch_sharding)
        state, metrics = prog.step(state, batch)
        assert metrics.routers is not None
        metrics = dataclasses.replace(
            metrics, routers=dataclasses.replace(metrics.routers, decision=None)
        )
        # The step gives its argument's memory away.
        found.append(
            jax.device_get((metrics, state.opt_state[0].trace, state.router_state))  # pyright: ignore
        )
    return found


def padded_to(batch: Batch, more: int) -> Batch:
    """The same rows with so many more positions of padding."""

    def longer(a):
        return np.pad(a, ((0, 0), (0, more))) if np.ndim(a) == 2 else a

    return jax.tree.map(longer, jax.device_get(batch))


@functools.cache
def by_hand(bench: Bench, setting: Setting):
    """(parameters, router state, batch) -> the task's loss, what the routers said, gradients.

    The gradients are those of the task's loss and each router loss times its coefficient.
    """
    graph = step_of(bench, setting).graph

    def total(params, router_state, batch: Batch):
        model = graph.merge(params, router_state)
        key = objectives.step_key(SEED, 0)
        out = model(objectives.tokens_of(batch, key, train=True))
        log_BTV = jax.nn.log_softmax(model.logits(out.hidden_BTD))
        target_BT1 = jnp.asarray(batch.target_BT)[..., None]
        nats_BT = -jnp.take_along_axis(log_BTV, target_BT1, axis=-1)[..., 0]
        scored_BT = jnp.asarray(batch.scored_BT)
        loss = jnp.where(scored_BT, nats_BT, 0).sum() / jnp.maximum(scored_BT.sum(), 1)
        router = model.moe_layers_of_units()[0].router
        scaled = [router.weight_of(one) * out.routers.losses[one.name] for one in router.losses]
        auxiliary_L = sum(scaled, jnp.zeros(()))
        return loss + auxiliary_L.sum(), (loss, out.routers.losses, out.routers.stats)

    return jax.jit(jax.grad(total, has_aux=True))


def prepared(bench: Bench, batch: Batch) -> Batch:
    """The batch as the first step's objective wants it."""
    objective = objective_of(bench)
    key = objectives.step_key(SEED, 0)
    return objectives.prepared(objective, batch, key, jnp.asarray(num_bytes_2V(objective)))
