"""Generates text: with a cache where the model allows it, else by passes over the last T tokens.

B texts, T tokens of context, N tokens of a text, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.data.tokens.tokenizer import Tokenizer
from moe.errors import UserError
from moe.inference.decoder import Decoder, next_power_of_two, reason_to_recompute, texts_of
from moe.inference.sampling import Sampling
from moe.model.functional import Arrays
from moe.training.abstract_model import AbstractModel

SHORTEST = 16  # tokens of the smallest bucket of lengths


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A text that goes on from a prompt.

    Attributes:
        text: the prompt and what follows it.
        tokens: those that were generated, without the end of the document.
        log_probs: of these tokens in the model's own distribution, in nats.
    """

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]

    @property
    def mean_log_prob(self) -> float:
        """Of its tokens, in nats: of several texts, the largest is that of the likeliest one."""
        return sum(self.log_probs) / len(self.log_probs) if self.log_probs else -math.inf


class Drawn(NamedTuple):
    """A token for each text, int32 (B,), and its log-probability."""

    token_B: np.ndarray
    log_prob_B: np.ndarray


class Generator:
    """Continues texts with a model.

    Its text ends where the model ends the document, or after so many tokens. A text doesn't depend
    on the others beside it: its draws are those of the seed and of its place among the prompts.

    Args:
        model, params, router_state, tokenizer: of a restored or trained run.
        context: T, the most tokens that the model sees; those of the run where None. Of a longer
            text it sees the last T, as at positions 0 to T - 1, by a pass over all of them.

    Attributes:
        recomputes: why every token takes a pass over the whole text; None where a cache serves.

    Raises:
        UserError: the model doesn't predict the next token, its router sees it, or it has fewer
            positions than the context.
    """

    def __init__(
        self,
        model: AbstractModel,
        params: Arrays,
        router_state: Arrays,
        tokenizer: Tokenizer,
        context: int | None = None,
    ):
        self.context = model.sequence_length if context is None else context
        check(model, self.context)
        graph, params = model.graph.rounded_once(params)
        self.tokenizer, self._values = tokenizer, (params, router_state)
        self._vocab_size = model.module.vocab_size
        self.recomputes = reason_to_recompute(model.module)
        cached = self.recomputes is None
        self._decoder = Decoder(graph, params, router_state) if cached else None
        self._draw = jax.jit(_draw, static_argnums=0)
        self._pass_and_draw = jax.jit(functools.partial(_pass_and_draw, graph), static_argnums=0)
        if self._decoder is not None:
            self._step_and_draw = jax.jit(
                functools.partial(_step_and_draw, self._decoder), static_argnums=0, donate_argnums=2
            )

    def continuations(
        self,
        prompts: Sequence[str],
        *,
        tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        say: Callable[[str], None] = lambda piece: None,
    ) -> list[Continuation]:
        """Each prompt with at most so many tokens more, all of them at once.

        say: is given the first text, in pieces of whole characters, as they are found.
        """
        ids = self.tokenizer.encode_batch(list(prompts))
        pieces, drawn = Pieces(self.tokenizer, ids[0], say), []
        for step in self.draws(prompts, tokens=tokens, sampling=sampling, seed=seed):
            drawn.append(step)
            pieces.add(int(step.token_B[0]))
        pieces.finish()
        token_BN = np.stack([step.token_B for step in drawn], axis=1)
        log_prob_BN = np.stack([step.log_prob_B for step in drawn], axis=1)
        found = []
        for prompt, token_N, log_prob_N in zip(ids, token_BN, log_prob_BN, strict=True):
            new = until(token_N.tolist(), self.tokenizer.document_id)
            text = self.tokenizer.decode([*prompt, *new])
            found.append(Continuation(text, tuple(new), tuple(log_prob_N[: len(new)].tolist())))
        return found

    def draws(
        self, prompts: Sequence[str], *, tokens: int, sampling: Sampling = Sampling(), seed: int = 0
    ) -> Iterator[Drawn]:
        """A token for each prompt, then the next ones, until all documents have ended."""
        document = self.tokenizer.document_id
        texts = [[document, *ids] for ids in self.tokenizer.encode_batch(list(prompts))]
        start_B = np.asarray([len(text) for text in texts], np.int32)
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(len(texts)))
        held_BV = self._held(texts) if sampling.counts_tokens else None
        caches, ended_B = None, np.zeros(len(texts), bool)
        for i in range(tokens):
            longest = int(start_B.max()) + i
            chosen = sampling, key_B, np.int32(i), held_BV
            if self._decoder is None or longest > self.context:
                window_BT, length_B = self._windows(texts)
                found = self._pass_and_draw(*chosen, *self._values, window_BT, length_B)
                token_B, log_prob_B, held_BV = found
            elif caches is None:
                slots = min(bucket(longest + tokens), self.context)
                window_BT, length_B = self._windows(texts)
                logits_BV, caches = self._decoder.prefill(window_BT, length_B, slots)
                token_B, log_prob_B, held_BV = self._draw(*chosen, logits_BV)
            else:
                last_B = np.asarray([text[-1] for text in texts], np.int32)
                given = self._decoder.values, last_B, start_B + np.int32(i - 1)
                token_B, log_prob_B, held_BV, caches = self._step_and_draw(
                    sampling, given, caches, *chosen[1:]
                )
            drawn = Drawn(np.asarray(token_B), np.asarray(log_prob_B))
            for text, token in zip(texts, drawn.token_B.tolist(), strict=True):
                text.append(token)
            yield drawn
            ended_B |= drawn.token_B == document
            if ended_B.all():
                return

    def _windows(self, texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The last T tokens (B, T) of each text, filled up with zeros, and their number (B,)."""
        return padded([text[-self.context :] for text in texts], self.context)

    def _held(self, texts: list[list[int]]) -> np.ndarray:
        """The tokens that each text holds, but for the one that begins and ends it: bool (B, V)."""
        held_BV = np.zeros((len(texts), self._vocab_size), bool)
        for row_V, text in zip(held_BV, texts, strict=True):
            row_V[text[1:]] = True
        return held_BV


class Pieces:
    """A text on its way out: each token adds the whole characters that it completes.

    Args:
        tokenizer: of the text.
        ids: the tokens that it begins with.
        say: is given one piece after the other.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], say: Callable[[str], None]):
        self._tokenizer, self._ids, self._say = tokenizer, list(ids), say
        self._shown, self._ended = "", False
        self._show(whole=True)

    def add(self, token: int) -> None:
        """One more token; those behind the end of the document are left out."""
        self._ended = self._ended or token == self._tokenizer.document_id
        if not self._ended:
            self._ids.append(token)
            self._show(whole=True)

    def finish(self) -> None:
        """Say what is left: a character that was never completed."""
        self._show(whole=False)

    def _show(self, whole: bool) -> None:
        text = self._tokenizer.decode(self._ids)
        text = text.rstrip("\ufffd") if whole else text
        if len(text) > len(self._shown):
            self._say(text[len(self._shown) :])
            self._shown = text


def check(model: AbstractModel, context: int) -> None:
    """Raise UserError where a model can't continue a text, or not with so many positions."""
    if not model.objective.causal:
        raise UserError(
            "this model fills in masked tokens and can't continue a text: put <mask> into the "
            "prompt for each of them, or train with train.objective = @NextToken()"
        )
    if model.module.leak:
        raise UserError(f"this model can't continue a text: {model.module.leak}")
    learned = model.module.learned
    if learned is not None and context > learned.length:
        raise UserError(
            f"a context of {context} tokens, but this model learned {learned.length} positions "
            f"(Transformer.max_length); {learned.length} is the most"
        )


def padded(texts: Sequence[Sequence[int]], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts (B, T), filled up with zeros, and their numbers of tokens (B,).

    T has few values, for each of which programs are compiled. most: the largest.
    """
    length = min(bucket(max(map(len, texts))), most)
    token_BT = np.zeros((len(texts), length), np.int32)
    for row_T, text in zip(token_BT, texts, strict=True):
        row_T[: len(text)] = text
    return token_BT, np.asarray([len(text) for text in texts], np.int32)


def check_room(prompt: int, tokens: int, context: int) -> None:
    """Raise UserError where a prompt and so many tokens more are beyond the context."""
    if prompt + tokens > context:
        raise UserError(
            f"a prompt of {prompt} tokens and {tokens} more are beyond the context of {context}, "
            f"where drafts and beams do not go; at most {max(0, context - prompt)} more are within "
            "it"
        )


def until(tokens: Sequence[int], end: int) -> list[int]:
    """The tokens before the first `end`."""
    tokens = list(tokens)
    return tokens[: tokens.index(end)] if end in tokens else tokens


def bucket(length: int) -> int:
    """The smallest power of two that is at least `length`, from `SHORTEST`."""
    return max(SHORTEST, next_power_of_two(length))


def _draw(sampling: Sampling, key_B, number, held_BV, logits_BV):
    """A token for each text, its log-probability, and the tokens that texts hold then."""
    key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, number)
    token_B, log_prob_B = sampling.draw_each(logits_BV, key_B, held_BV)
    if held_BV is not None:
        held_BV = jnp.asarray(held_BV).at[jnp.arange(len(token_B)), token_B].set(True)
    return token_B, log_prob_B, held_BV


def _step_and_draw(decoder: Decoder, sampling: Sampling, given, caches, key_B, number, held_BV):
    """The same after one more token of each text, and the cache with it."""
    values, token_B, position_B = given
    logits_BV, caches, _ = decoder.next_logits(values, caches, token_B, position_B)
    return *_draw(sampling, key_B, number, held_BV, logits_BV), caches


def _pass_and_draw(
    graph, sampling: Sampling, key_B, number, held_BV, params, state, window_BT, length_B
):
    """The same by a pass over the first length_B tokens of each window (B, T)."""
    module = graph.merge(params, state)
    hidden_BTD = module(texts_of(window_BT, length_B)).hidden_BTD
    last_B1D = jnp.take_along_axis(hidden_BTD, (length_B - 1)[:, None, None], axis=1)
    return _draw(sampling, key_B, number, held_BV, module.logits(last_B1D)[:, 0])
