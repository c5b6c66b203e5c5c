"""A model one token at a time: `prefill` reads prompts into a cache, `step` adds a token to each.

B sequences, T tokens of a prompt, V vocabulary.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.decoding import LayerCache, Prompt
from layers.mixture_of_depths import DepthBlock
from layers.stack import after
from moe.model import functional
from moe.model.functional import Arrays, Graph
from moe.model.transformer import Transformer
from routing.inputs import Tokens
from routing.records import AnyArray, Decision, ExpertMerge, choices_GE

Caches = list[LayerCache]


class Values(NamedTuple):
    """A model's arrays: those of each layer by themselves, and those outside of layers."""

    layers: list[Arrays]
    rest: Arrays


class Decoder:
    """Logits for one more token of each sequence, without the tokens before it.

    Its layers' arrays are taken out of their stacks once, since a step would otherwise copy every
    layer's experts to read a few of them. Programs are compiled once for each shape.

    Args:
        graph, params, router_state: a model and its values.
    """

    def __init__(self, graph: Graph, params: Arrays, router_state: Arrays):
        self._graph, everything = graph, params | router_state
        self._abstract = {name: v.get_value() for name, v in graph.variables.items()}
        self.module: Transformer = graph.merge(self._abstract, {})
        self._layers, self._sparse, layer_values, taken = [], [], [], set()
        for s, stack in enumerate(self.module.stacks):
            blocks = [functional.split(block)[0] for block in stack.unit.blocks]
            programs = [jax.jit(functools.partial(_prefilled, b), static_argnums=4) for b in blocks]
            for i in range(stack.repeats):
                for j, block in enumerate(blocks):
                    prefix = f"stacks.{s}.unit.blocks.{j}."
                    names = {name: prefix + name for name in block.paths}
                    layer_values.append({n: everything[whole][i] for n, whole in names.items()})
                    self._layers.append((block, programs[j]))
                    self._sparse.append(stack.unit.blocks[j].is_moe)
                    taken |= set(names.values())
        rest = {name: a for name, a in everything.items() if name not in taken}
        self.values = Values(layer_values, rest)
        self._embed, self._head = jax.jit(self._embedded), jax.jit(self._last_logits)
        self._step: Callable = jax.jit(self.next_logits, donate_argnums=1)
        self._extend: Callable = jax.jit(self._logits_of_each, donate_argnums=1)

    def prefill(
        self,
        token_BT: Int[AnyArray, "B T"],
        length_B: Int[AnyArray, " B"],
        slots: int,
        spare: int = 0,
    ) -> tuple[Float[Array, "B V"], Caches]:
        """The logits that follow the first length_B tokens of each sequence, and the cache.

        slots: the most tokens that a sequence will have.
        spare: one less than the most tokens that `extend` will be given at once.
        """
        x_BTD, tokens = self._embed(self.values.rest, token_BT, length_B)
        caches = []
        for number, (_, program) in enumerate(self._layers):
            given = self.values.layers[number], x_BTD, tokens, length_B
            x_BTD, tokens, cache = program(*given, (slots, spare), number)
            caches.append(cache)
        return self._head(self.values.rest, x_BTD, length_B), caches

    def step(
        self, caches: Caches, token_B: Int[AnyArray, " B"], position_B: Int[AnyArray, " B"]
    ) -> tuple[Float[Array, "B V"], Caches, list[Bool[Array, "B E"]]]:
        """The logits that follow these tokens at these positions, the cache with them, and which
        experts each of them used in each sparse layer.

        The given cache is used up.
        """
        return self._step(self.values, caches, token_B, position_B)

    def extend(
        self, caches: Caches, token_BT: Int[AnyArray, "B T"], position_B: Int[AnyArray, " B"]
    ) -> tuple[Float[Array, "B T V"], Caches, list[Bool[Array, "B T E"]]]:
        """As `step`, for T tokens in turn of each sequence, the first one at position_B.

        Tokens are taken back by going on from an earlier position. `reason_to_go_one_by_one` says
        for which models T has to be 1. The given cache is used up.
        """
        return self._extend(self.values, caches, token_BT, position_B)

    def _logits_of_each(self, values: Values, caches: Caches, token_BT, position_B):
        position_BT = position_B[:, None] + jnp.arange(token_BT.shape[1])[None]
        logits_RV, caches, used = self.next_logits(
            values, caches, token_BT.reshape(-1), position_BT.reshape(-1)
        )
        by_text = [used_RE.reshape(*token_BT.shape, -1) for used_RE in used]
        return logits_RV.reshape(*token_BT.shape, -1), caches, by_text

    def next_logits(self, values: Values, caches: Caches, token_B, position_B):
        """What `step` returns, to be traced."""
        tokens = tokens_of(token_B[:, None], position_B[:, None], jnp.ones_like(token_B[:, None]))
        module = self._merged(values.rest)
        x_B1D, tokens = module.embedded(tokens)
        following, used = [], []
        for number, (block, _) in enumerate(self._layers):
            layer = block.merge(values.layers[number], {})
            here = tokens.for_layer(number, None)
            x_B1D, output, cache = layer.step(x_B1D, here, caches[number])
            following.append(cache)
            if output is not None:
                tokens = after(tokens, output)
                used.append(experts_used(output.decision))
        return module.logits(module.final_norm(x_B1D))[:, 0], following, used

    def is_moe(self, number: int) -> bool:
        """Whether a layer has experts."""
        return self._sparse[number]

    def expert_arrays(self, number: int) -> list[str]:
        """The names of a layer's arrays whose leading axis is that of the experts."""
        return [name for name, role in self._layers[number][0].roles.items() if role == "expert"]

    def looked_up(self, name: str) -> bool:
        """Whether an array outside of layers is only read by rows, not multiplied."""
        tied = self.module.head_DV is None
        role = self._graph.roles.get(name)
        return role == "position" or (role == "embedding" and not tied)

    def _merged(self, rest: Arrays) -> Any:
        return self._graph.merge(self._abstract | rest, {})

    def _embedded(self, rest: Arrays, token_BT, length_B):
        place_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1])[None], token_BT.shape)
        segment_BT = (place_BT < length_B[:, None]).astype(jnp.int32)
        return self._merged(rest).embedded(tokens_of(token_BT, place_BT, segment_BT))

    def _last_logits(self, rest: Arrays, x_BTD, length_B):
        module, last_B11 = self._merged(rest), (length_B - 1)[:, None, None]
        x_B1D = jnp.take_along_axis(x_BTD, last_B11, axis=1)
        return module.logits(module.final_norm(x_B1D))[:, 0]


def reason_to_recompute(module: Transformer) -> str | None:
    """Why every token takes a pass over the whole text, which no cache can replace; or None."""
    blocks = [block for stack in module.stacks for block in stack.unit.blocks]
    return next((why for block in blocks if (why := block.recomputes) is not None), None)


def reason_to_go_one_by_one(module: Transformer) -> str | None:
    """Why `Decoder.extend` can't take several tokens of a text at once; None where it can."""
    blocks = [block for stack in module.stacks for block in stack.unit.blocks]
    depths = [block.depth_router for block in blocks if isinstance(block, DepthBlock)]
    for router in [*depths, *(block.router for block in blocks)]:
        if router is not None and (router.order_matters or router.whole_sequences):
            return f"{type(router).__name__} carries what it needs from one token to the next"
    return reason_to_recompute(module)


def experts_used(decision: Decision | None) -> Bool[Array, "G E"]:
    """Whose weights each group reads; those of all experts where they are merged."""
    assert decision is not None
    if isinstance(decision, ExpertMerge):
        return decision.weight_GSE.any(1)
    return choices_GE(decision) > 0


def tokens_of(token_BT, position_BT, segment_BT) -> Tokens:
    """The tokens as at evaluation."""
    return Tokens(
        token_BT=token_BT.astype(jnp.int32),
        segment_BT=segment_BT,
        position_BT=position_BT.astype(jnp.int32),
        index_B=jnp.arange(len(token_BT), dtype=jnp.int32),
        key=jax.random.key(0),
        train=False,
    )


def _prefilled(block: Graph, values: Arrays, x_BTD, tokens: Tokens, length_B, room, number):
    """x after a layer, the tokens with what the next layer reads of them, and the layer's cache."""
    layer, here = block.merge(values, {}), tokens.for_layer(number, None)
    x_BTD, output, cache = layer.prefill(x_BTD, here, Prompt(length_B, *room))
    return x_BTD, tokens if output is None else after(tokens, output), cache
