"""A model one token at a time: `prefill` reads prompts into a cache, `step` adds a token to each.

B sequences, T tokens of a prompt, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
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
CHUNK = 1024  # tokens of a prompt that are read at once


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
        chunk: a longer prompt is read in pieces of so many tokens, each beside the cache of those
            before, wherever `reason_to_go_one_by_one` is None.
    """

    def __init__(self, graph: Graph, params: Arrays, router_state: Arrays, chunk: int = CHUNK):
        graph, params = graph.rounded_once(params)
        self._graph, everything = graph, params | router_state
        self._abstract = {name: v.get_value() for name, v in graph.variables.items()}
        self.module: Transformer = graph.merge(self._abstract, {})
        self._chunk = chunk if reason_to_go_one_by_one(self.module) is None else None
        self._layers, self._sparse, layer_values, taken = [], [], [], set()
        for s, stack in enumerate(self.module.stacks):
            blocks = [functional.split(block)[0] for block in stack.unit.blocks]
            programs = [
                (
                    jax.jit(functools.partial(_prefilled, b), static_argnums=4),
                    jax.jit(functools.partial(_read_on, b), static_argnums=5, donate_argnums=3),
                )
                for b in blocks
            ]
            for i in range(stack.repeats):
                for j, block in enumerate(blocks):
                    prefix = f"stacks.{s}.unit.blocks.{j}."
                    names = {name: prefix + name for name in block.paths}
                    layer_values.append({n: everything[whole][i] for n, whole in names.items()})
                    self._layers.append((block, *programs[j]))
                    self._sparse.append(stack.unit.blocks[j].is_moe)
                    taken |= set(names.values())
        rest = {name: a for name, a in everything.items() if name not in taken}
        self.values = Values(layer_values, rest)
        self._embed: Callable = jax.jit(self._embedded, static_argnums=4)
        self._head, self._last = jax.jit(self._last_logits), jax.jit(_last_of)
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

        slots: the most tokens that a sequence will have, T at least.
        spare: one less than the most tokens that `extend` will be given at once.
        """
        begins = self.pieces(token_BT.shape[1])
        size = begins[1] if len(begins) > 1 else token_BT.shape[1]
        if len(begins) > 1:  # a window's ring keeps what it sees beside a piece's padding
            spare = max(spare, size - 1)
        last_BD, caches, first_B = None, [], jnp.minimum(length_B, size)
        for begin in begins:
            piece_BT, left_B = token_BT[:, begin : begin + size], length_B - begin
            x, tokens = self._embed(self.values.rest, piece_BT, left_B, begin, begin > 0)
            for number, (_, prefill, read_on) in enumerate(self._layers):
                given = self.values.layers[number], x, tokens
                if begin == 0:
                    x, tokens, cache = prefill(*given, first_B, (slots, spare), number)
                    caches.append(cache)
                else:
                    here = caches[number], number, next_power_of_two(begin + size)
                    x, tokens, caches[number] = read_on(*given, *here)
            last_BD = self._last(x.reshape(*piece_BT.shape, -1), left_B, last_BD)
        return self._head(self.values.rest, last_BD), caches

    def pieces(self, length: int) -> list[int]:
        """The positions at which the pieces of a prompt of T = length tokens begin."""
        return list(range(0, length, self._chunk or max(1, length)))

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
        for number, (block, *_) in enumerate(self._layers):
            given = values.layers[number], x_B1D, tokens, caches[number], number
            x_B1D, tokens, cache, output = _stepped(block, *given)
            following.append(cache)
            if output is not None:
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

    def _embedded(self, rest: Arrays, token_BT, length_B, begin, in_rows: bool):
        """x (B, T, D) and tokens; in_rows: (B T, 1, D), each token a row of its own."""
        tokens = texts_of(token_BT, length_B, begin)
        if in_rows:
            given = tokens.token_BT, tokens.position_BT, tokens.segment_BT
            tokens = tokens_of(*(a.reshape(-1, 1) for a in given))
        return self._merged(rest).embedded(tokens)

    def _last_logits(self, rest: Arrays, last_BD):
        module = self._merged(rest)
        return module.logits(module.final_norm(last_BD[:, None]))[:, 0]


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


def texts_of(token_BT, length_B, begin=0) -> Tokens:
    """T tokens of each text from position `begin` on; behind the first length_B is padding."""
    place_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1])[None], token_BT.shape)
    segment_BT = (place_BT < length_B[:, None]).astype(jnp.int32)
    return tokens_of(token_BT, begin + place_BT, segment_BT)


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


def _stepped(block: Graph, values: Arrays, x_R1D, tokens: Tokens, cache: LayerCache, number):
    """The same for further tokens, each a row of its own, and the router's output."""
    layer, here = block.merge(values, {}), tokens.for_layer(number, None)
    x_R1D, output, cache = layer.step(x_R1D, here, cache)
    return x_R1D, tokens if output is None else after(tokens, output), cache, output


def _read_on(
    block: Graph, values: Arrays, x_R1D, tokens: Tokens, cache: LayerCache, number, slots: int
):
    """The same for the next tokens of prompts; the cache of one that has ended stays as it is.

    slots: the first of the cache's, beyond which there is no token yet.
    """
    everywhere = cache.attention
    filled = jax.tree.map(lambda a: a[:, :slots], everywhere)
    cache = dataclasses.replace(cache, attention=filled)
    x_R1D, tokens, longer, _ = _stepped(block, values, x_R1D, tokens, cache, number)
    goes_on_B = tokens.segment_BT.reshape(len(filled.filled_BS), -1).any(1)

    def written(whole, new, old):
        new = jnp.where(goes_on_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        return jax.lax.dynamic_update_slice_in_dim(whole, new, 0, axis=1)

    attention = jax.tree.map(written, everywhere, longer.attention, filled)
    return x_R1D, tokens, dataclasses.replace(longer, attention=attention)


def next_power_of_two(number: int) -> int:
    """The smallest one that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _last_of(x_BTD, length_B, before_BD):
    """x of each text's last token, where it is among these T: the length_B-th of them."""
    at_B11 = jnp.clip(length_B - 1, 0, x_BTD.shape[1] - 1)[:, None, None]
    last_BD = jnp.take_along_axis(x_BTD, at_B11, axis=1)[:, 0]
    if before_BD is None:
        return last_BD
    return jnp.where((length_B > 0)[:, None], last_BD, before_BD)
