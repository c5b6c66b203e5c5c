"""Bits per byte of whole held-out documents, each router by its evaluation rule."""

from collections.abc import Callable
import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from layers.kernels.cross_entropy import cross_entropy_sum
from layers.logical_axes import sharding_rules
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
    """The scores of some documents.

    Attributes:
        loss: nats per scored token. With masked tokens only the masked ones are scored.
        bits_per_byte: of the text that the scored tokens decode to.
        tokens: scored tokens of text.
        bytes: the bytes of text that they decode to.
        documents: how many were scored.
        routing: statistics over all batches; None for a dense model.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    routing: Routing | None


@runtime_checkable
class Values(Protocol):
    """Parameters and router state, as a TrainState or a restored run has them."""

    @property
    def params(self) -> Arrays: ...

    @property
    def router_state(self) -> Arrays: ...


def batch_scorer(model: AbstractModel, mesh: Mesh, *, training_rule: bool = False) -> Callable:
    """A jitted function score_batch(params, router_state, batch).

    It returns (nats, tokens, bytes), summed over the scored text, and the routers' output.

    training_rule: routers decide as in training, with noise and capacity, but nothing is learned.
    """
    graph, objective = model.graph, model.objective

    def score_batch(params, router_state, batch):
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
    return jax.jit(score_batch, out_shardings=everywhere)


def evaluate(
    score_batch: Callable,
    state: Values,
    batches: ValidationBatches,
    mesh: Mesh,
    say: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """Score every token of the batches' documents once.

    Args:
        score_batch: a function of `batch_scorer`.
        state: parameters and router state.
        batches: of the documents.
        mesh: the one that score_batch was made for.
        say: say(done, of) is called after each batch.

    Raises:
        UserError: no token of text is scored.
    """
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.RULES["batch"]))
    rows = processes.rows(where, batches.batch_size)
    nats, scored, num_bytes, routers = 0.0, 0, 0, None
    for i in range(len(batches)):
        batch = to_devices(batches.batch(i, rows), where, batches.batch_size)
        sums, routers_i = jax.device_get(score_batch(state.params, state.router_state, batch))
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
    """a with the statistics of both summed; its losses stay those of the first batch."""
    return dataclasses.replace(a, stats=jax.tree.map(jnp.add, a.stats, b.stats))
