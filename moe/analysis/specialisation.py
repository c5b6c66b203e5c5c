"""Specialisation of experts: the gates that tokens give to them.

L sparse layers, B batch, T tokens, E experts, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from moe.data.batch import Batch
from moe.data.tokens.tokenizer import Tokenizer
from moe.model.functional import Arrays
from moe.training import objective as objectives
from moe.training.abstract_model import AbstractModel
from routing import gates_GTE


def gates_function(model: AbstractModel) -> Callable[[Arrays, Arrays, Batch], np.ndarray]:
    """A function of (parameters, router state, batch) that returns gates (L, B, T, E).

    Routers decide by their evaluation rule.
    """

    @jax.jit
    def run(params, router_state, batch):
        key = objectives.step_key(0, objectives.EVALUATION)
        module = model.graph.merge(params, router_state)
        out = module(objectives.tokens_of(batch, key, train=False))
        return jax.vmap(gates_GTE)(out.routers.decision)

    def gates_of(params: Arrays, router_state: Arrays, batch: Batch) -> np.ndarray:
        gates_LGTE = np.asarray(run(params, router_state, batch))
        layers, *_, experts = gates_LGTE.shape
        return gates_LGTE.reshape(layers, *np.shape(batch.token_BT), experts)

    return gates_of


def gates_of_text(run, text: str) -> tuple[list[str], np.ndarray]:
    """The tokens of a text and their gates (L, T, E), by a restored run.

    What exceeds the run's sequence length is cut off.
    """
    length = run.spec.sequence_length
    ids = [run.tokenizer.document_id, *run.tokenizer.encode_batch([text])[0]][:length]
    batch = batch_of(ids, length)
    gates_LBTE = gates_function(run.model)(run.params, run.router_state, batch)
    return [run.tokenizer.decode([i]) for i in ids[1:]], gates_LBTE[:, 0, 1 : len(ids)]


def batch_of(ids: list[int], length: int) -> Batch:
    """A batch of one sequence of these tokens, padded to `length`."""
    token_BT = np.zeros((1, length), np.int32)
    token_BT[0, : len(ids)] = ids
    place_BT = np.arange(length, dtype=np.int32)[None]
    segment_BT = (place_BT < len(ids)).astype(np.int32)
    return Batch(token_BT, token_BT, segment_BT, place_BT, segment_BT > 0, np.zeros(1, np.int32))


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """load_LVE: the gates that each token of the vocabulary gave each expert, summed."""

    load_LVE: np.ndarray
    tokenizer: Tokenizer

    def top(self, layer: int, expert: int, most: int = 6, least: int = 20) -> list[str]:
        """The `most` tokens that give the largest share of their gates to an expert, best first.

        Tokens whose gates sum to less than `least` in the layer are left out: chance rules them.
        """
        load_VE = self.load_LVE[layer]
        total_V = load_VE.sum(1)
        share_V = np.where(total_V >= least, load_VE[:, expert] / np.maximum(total_V, 1e-9), -1)
        best = np.argsort(-share_V, kind="stable")[:most]
        return [self.tokenizer.decode([int(v)]) for v in best if share_V[v] > 0]


def token_table(
    model: AbstractModel, params, router_state, tokenizer: Tokenizer, batches
) -> TokenTable:
    """The summed gates of each token of the vocabulary at each expert, over some batches."""
    gates_of, load_LVE = gates_function(model), None
    for batch in batches:
        gates_LBTE = gates_of(params, router_state, batch)
        layers, _, _, experts = gates_LBTE.shape
        if load_LVE is None:
            load_LVE = np.zeros((layers, model.module.vocab_size, experts))
        real_BT = np.asarray(batch.segment_BT) > 0
        ids = np.asarray(batch.token_BT)[real_BT]
        for layer in range(layers):
            np.add.at(load_LVE[layer], ids, gates_LBTE[layer][real_BT])
    assert load_LVE is not None
    return TokenTable(load_LVE, tokenizer)


def read_metrics(workdir: str | Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a run's metrics.jsonl (numbers) or routing.jsonl (layer-by-expert arrays)."""
    text = (Path(workdir) / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
