"""Bits per byte of whole held-out documents, each router by its evaluation rule."""

from collections.abc import Callable
import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from layers.constrain import sharding_rules
from layers.kernels.cross_entropy import cross_entropy_sum
from moe.data.batches import ValidationBatches
from moe.errors import UserError
from moe.machine import processes
from moe.model import sharding
from moe.model.functional import Arrays
from moe.training import objective as objectives
from moe.training.abstract_model import AbstractModel
from moe.training.metrics import Routing, bits_per_byte
from moe.training.train_step import to_devices


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss in nats per scored token of text; bytes are those that the scored tokens give back.

    Of masked tokens, only the hidden ones are scored.
    """

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


def evaluation_step(model: AbstractModel, mesh: Mesh, *, training_rule: bool = False) -> Callable:
    """The jitted forward pass of one batch: nats, tokens and bytes of scored text, summed, and
    what the routers said.

    training_rule: routers decide as in training, with noise and capacity, though nothing learns.
    """
    graph, objective = model.graph, model.objective

    def step(params, router_state, batch):
        key = objectives.step_key(0, objectives.EVALUATION)
        module = graph.merge(params, router_state)
        num_bytes_2V = jnp.asarray(model.num_bytes_2V)
        batch = objectives.prepared(objective, batch, key, num_bytes_2V)
        text_BT, num_bytes = objectives.text_of(objective, batch, num_bytes_2V)
        with sharding_rules(sharding.rule(mesh)):
            out = module(objectives.tokens_of(batch, key, train=training_rule))
            nats = cross_entropy_sum(module.head(), out.hidden_BTD, batch.target_BT, text_BT)
        routers = out.routers and dataclasses.replace(out.routers, decision=None, policy=None)
        return (nats, text_BT.sum(), num_bytes), routers

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

    Raises:
        UserError: nothing is scored, so that there is nothing to divide by.
    """
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.RULES["batch"]))
    rows = processes.rows(where, batches.batch_size)
    nats, scored, num_bytes, routers = 0.0, 0, 0, None
    for i in range(len(batches)):
        batch = to_devices(batches.batch(i, rows), where, batches.batch_size)
        sums, routers_i = jax.device_get(step(state.params, state.router_state, batch))
        nats, scored, num_bytes = (
            nats + float(sums[0]),
            scored + int(sums[1]),
            num_bytes + int(sums[2]),
        )
        routers = routers_i if routers is None else _add(routers, routers_i)
        say(i + 1, len(batches))
    if not num_bytes:
        raise UserError(
            f"nothing was scored in {batches.num_documents} documents: give more text, or allow "
            "more of it (eval.max_bytes, train.eval_bytes)"
        )
    routing = Routing.of(routers) if routers is not None else None
    bpb = bits_per_byte(nats, num_bytes)
    return Evaluation(nats / scored, bpb, scored, num_bytes, batches.num_documents, routing)


def _add(a, b):
    """Statistics add up; losses are left as they were in the first batch."""
    return dataclasses.replace(a, stats=jax.tree.map(jnp.add, a.stats, b.stats))
