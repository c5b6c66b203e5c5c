"""Beam search: a likely continuation as a whole, in place of likely tokens one by one.

W beams, N tokens of a continuation, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
import heapq
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from moe.inference.decoder import Decoder
from moe.inference.generate import bucket, check_room, padded


@dataclasses.dataclass(frozen=True, order=True)
class Hypothesis:
    """A continuation. score: log-probability over `length_penalty`; it includes the end, if any."""

    score: float
    tokens: tuple[int, ...]
    log_prob: float


class Beam(NamedTuple):
    """A text on its way: its log-probability, tokens, and the row that it goes on from."""

    total: float
    text: tuple[int, ...]
    parent: int


NO_BEAM = Beam(-np.inf, (0,), 0)  # in a row without a text


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Keeps the W likeliest continuations at each length.

    Attributes:
        beams: W.
        alpha: the score of N tokens is their log-probability divided by ((5 + N) / 6)^alpha
            (Wu et al. 2016, arXiv 1609.08144, eq. 14, without coverage); 0 prefers short texts.
    """

    beams: int = 4
    alpha: float = 0.6

    def __call__(
        self,
        decoder: Decoder,
        prompt: list[int],
        end: int,
        *,
        tokens: int,
        context: int,
        say: Callable[[int], None] = lambda length: None,
    ) -> list[Hypothesis]:
        """The best continuations of a prompt, best first; at most W, each of at most N tokens.

        Args:
            decoder: of the model.
            prompt: token ids.
            end: the token that ends a text; a hypothesis doesn't list it.
            tokens: N.
            context: the most tokens of a text.
            say: is told of each length.

        Raises:
            UserError: the text would be longer than the context.
        """
        check_room(len(prompt), tokens, context)
        logits_WV, caches = self._started(decoder, prompt, len(prompt) + tokens, context)
        # All beams are the same text as yet: the first alone has candidates.
        beams, done = [Beam(0.0, (), 0)], []
        for length in range(1, tokens + 1):
            say(length)
            ended, beams = self._grown(logits_WV, beams, end)
            done = heapq.nlargest(self.beams, [*done, *(self._scored(b, length) for b in ended)])
            if not beams or self._settled(done, beams[0].total, tokens):
                return done
            if length < tokens:
                rows = [*beams, *[NO_BEAM] * (self.beams - len(beams))]
                parent_W = np.asarray([beam.parent for beam in rows])
                caches = jax.tree.map(lambda a, parents=parent_W: a[parents], caches)
                token_W = np.asarray([beam.text[-1] for beam in rows], np.int32)
                at_W = np.full(self.beams, len(prompt) + length - 1, np.int32)
                logits_WV, caches, _ = decoder.step(caches, token_W, at_W)
        return heapq.nlargest(self.beams, [*done, *(self._scored(b, tokens) for b in beams)])

    def _started(self, decoder: Decoder, prompt: list[int], slots: int, context: int):
        """The logits (W, V) that follow the prompt, W times the same, and the cache."""
        logits_1V, caches = decoder.prefill(*padded([prompt], context), bucket(slots))
        return jax.tree.map(lambda a: jnp.repeat(a, self.beams, 0), (logits_1V, caches))

    def _grown(
        self, logits_WV: Float[Array, "W V"], beams: list[Beam], end: int
    ) -> tuple[list[Beam], list[Beam]]:
        """The texts that end with the next token, and the W likeliest that don't, best first."""
        total_W = np.full(self.beams, -np.inf)
        total_W[: len(beams)] = [beam.total for beam in beams]
        found = [a.tolist() for a in map(np.asarray, _candidates(logits_WV, total_W))]
        ended, grown = [], []
        for total, parent, token in zip(*found, strict=True):
            if not np.isfinite(total):
                continue
            text = beams[parent].text
            if token == end:
                ended.append(Beam(total, text, parent))
            elif len(grown) < self.beams:
                grown.append(Beam(total, (*text, token), parent))
        return ended, grown

    def _scored(self, beam: Beam, length: int) -> Hypothesis:
        return Hypothesis(beam.total / self.length_penalty(length), beam.text, beam.total)

    def length_penalty(self, length: int) -> float:
        """What the log-probability of so many tokens is divided by."""
        return ((5 + length) / 6) ** self.alpha

    def _settled(self, done: list[Hypothesis], best: float, tokens: int) -> bool:
        """Whether no text that goes on can come before those that have ended.

        No probability is above 1, so that a text's total, of which `best` is the largest, never
        rises.
        """
        return len(done) == self.beams and done[-1].score >= best / self.length_penalty(tokens)


@jax.jit
def _candidates(
    logits_WV: Float[Array, "W V"], total_W: Float[Array, " W"]
) -> tuple[Float[Array, " C"], Int[Array, " C"], Int[Array, " C"]]:
    """The C = 2 W likeliest continuations by one token: log-probability, beam and token.

    Twice as many as there are beams, so that W are left where W of them end.
    """
    beams, vocabulary = logits_WV.shape
    total_WV = jax.nn.log_softmax(logits_WV) + total_W[:, None]
    total_C, index_C = jax.lax.top_k(total_WV.reshape(-1), min(2 * beams, beams * vocabulary))
    return total_C, index_C // vocabulary, index_C % vocabulary
