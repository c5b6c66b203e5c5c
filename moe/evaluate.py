"""Bits per byte of whole held-out documents, each router by its evaluation rule."""

from collections.abc import Callable
import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from layers.constrain import placing
from layers.cross_entropy import cross_entropy_sum
from moe import hosts, sharding
from moe import objective as objectives
from moe.assemble import Model
from moe.batches import ValidationBatches
from moe.functional import Arrays
from moe.metrics import Routing, bits_per_byte
from moe.step import to_devices


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss in nats per scored token; for masked tokens, bits per byte of the hidden ones."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    routing: Routing | None


class Values(Protocol):
    """What a model computes with."""

    @property
    def params(self) -> Arrays: ...

    @property
    def router_state(self) -> Arrays: ...


def evaluation_step(model: Model, mesh: Mesh, *, training_rule: bool = False) -> Callable:
    """The jitted forward pass of one batch: summed nats, scored tokens, what the routers said.

    training_rule: routers decide as in training, with noise and capacity, though nothing learns.
    """
    graph, objective = model.graph, model.objective

    def step(params, router_state, batch):
        key = objectives.step_key(0, objectives.EVALUATION)
        module = graph.join(params, router_state)
        batch = objectives.prepared(objective, batch, key, module.vocab_size)
        with placing(sharding.rule(mesh)):
            out = module(objectives.tokens_of(batch, key, train=training_rule))
            nats = cross_entropy_sum(
                module.head(), out.hidden_BTD, batch.target_BT, batch.scored_BT
            )
        routers = out.routers and dataclasses.replace(out.routers, decision=None, policy=None)
        return nats, batch.scored_BT.sum(), routers

    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(step, out_shardings=everywhere)


def evaluate(
    step: Callable,
    state: Values,
    batches: ValidationBatches,
    mesh: Mesh,
    say: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """Every token of the batches' documents scored once by an `evaluation_step`.

    state: whatever holds the parameters and router state: a TrainState, or a restored run.
    `say(done, of)` is called after each batch.
    """
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.RULES["batch"]))
    rows = hosts.rows(where, batches.batch_size)
    nats, scored, routers = 0.0, 0, None
    for i in range(len(batches)):
        batch = to_devices(batches.batch(i, rows), where, batches.batch_size)
        nats_i, scored_i, routers_i = jax.device_get(step(state.params, state.router_state, batch))
        nats, scored = nats + float(nats_i), scored + int(scored_i)
        routers = routers_i if routers is None else _add(routers, routers_i)
        say(i + 1, len(batches))
    loss = nats / max(scored, 1)
    bytes_per_token = batches.num_bytes / batches.num_tokens
    routing = Routing.of(routers) if routers is not None else None
    bpb = bits_per_byte(loss, bytes_per_token)
    return Evaluation(loss, bpb, scored, batches.num_bytes, batches.num_documents, routing)


def _add(a, b):
    """Statistics add up; losses are left as they were in the first batch."""
    return dataclasses.replace(a, stats=jax.tree.map(jnp.add, a.stats, b.stats))
