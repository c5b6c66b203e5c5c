"""Bits per byte of whole held-out documents, each router by its evaluation rule."""

from collections.abc import Callable
import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from layers.kernels.cross_entropy import cross_entropy_of_each
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
        nats_M, bytes_M: of each document, float64 and int64.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    routing: Routing | None
    nats_M: np.ndarray
    bytes_M: np.ndarray


@runtime_checkable
class Values(Protocol):
    """Parameters and router state, as a TrainState or a restored run has them."""

    @property
    def params(self) -> Arrays: ...

    @property
    def router_state(self) -> Arrays: ...


def batch_scorer(model: AbstractModel, mesh: Mesh, *, training_rule: bool = False) -> Callable:
    """A jitted function score_batch(params, router_state, batch).

    It returns nats and bytes of each scored token of text, (B, T) and 0 elsewhere, the number of
    these tokens, and the routers' output.

    training_rule: routers decide as in training, with noise and capacity, but nothing is learned.
    """
    graph, objective = model.graph, model.objective

    def score_batch(params, router_state, batch):
        key = objectives.step_key(0, objectives.EVALUATION)
        module = graph.merge(params, router_state)
        num_bytes_2V = jnp.asarray(model.num_bytes_2V)
        batch = objectives.prepared(objective, batch, key, num_bytes_2V)
        text_BT, bytes_BT = objectives.text_of(objective, batch, num_bytes_2V)
        with sharding_rules(sharding.rule(mesh), mesh.devices.flat[0]):
            out = module(objectives.tokens_of(batch, key, train=training_rule))
            nats_BT = cross_entropy_of_each(module.head(), out.hidden_BTD, batch.target_BT)
        routers = out.routers and dataclasses.replace(out.routers, decision=None, policy=None)
        return (jnp.where(text_BT, nats_BT, 0), bytes_BT, text_BT.sum()), routers

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
    where = sharding.by_batch(mesh)
    rows = processes.rows(where, batches.batch_size)
    nats_M, bytes_M = np.zeros(batches.num_documents), np.zeros(batches.num_documents, np.int64)
    scored, routers = 0, None
    for i in range(len(batches)):
        batch = to_devices(batches.batch(i, rows), where, batches.batch_size)
        found, routers_i = jax.device_get(score_batch(state.params, state.router_state, batch))
        nats_BT, bytes_BT, tokens = found
        for b, first, end, document in batches.places(i):
            nats_M[document] += nats_BT[b, first:end].sum(dtype=np.float64)
            bytes_M[document] += bytes_BT[b, first:end].sum()
        scored += int(tokens)
        routers = routers_i if routers is None else _add(routers, routers_i)
        say(i + 1, len(batches))
    nats, num_bytes = float(nats_M.sum()), int(bytes_M.sum())
    if not num_bytes:
        raise UserError(
            f"nothing was scored in {batches.num_documents} documents: give more text, or allow "
            "more of it (eval.max_bytes, train.eval_bytes)"
        )
    return Evaluation(
        loss=nats / scored,
        bits_per_byte=bits_per_byte(nats, num_bytes),
        tokens=scored,
        bytes=num_bytes,
        documents=batches.num_documents,
        routing=Routing.of(routers) if routers is not None else None,
        nats_M=nats_M,
        bytes_M=bytes_M,
    )


def _add(a, b):
    """a with the statistics of both summed; its losses stay those of the first batch."""
    return dataclasses.replace(a, stats=jax.tree.map(jnp.add, a.stats, b.stats))
