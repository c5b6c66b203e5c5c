"""Beam search: a likely continuation as a whole, in place of likely tokens one by one.

W beams, N tokens of a continuation, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
import heapq

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from moe.errors import UserError
from moe.inference.decoder import Decoder


@dataclasses.dataclass(frozen=True, order=True)
class Hypothesis:
    """A continuation. score: log-probability over `length_penalty`; it includes the end, if any."""

    score: float
    tokens: tuple[int, ...]
    log_prob: float


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
        say: Callable[[int], None] = lambda step: None,
    ) -> list[Hypothesis]:
        """The best continuations of a prompt, best first; at most W, each of at most N tokens.

        Args:
            decoder: of the model.
            prompt: token ids.
            end: the token that ends a text; a hypothesis doesn't list it.
            tokens: N.
            context: the most tokens of a text.
            say: is told of each step.

        Raises:
            UserError: the text would be longer than the context.
        """
        length = len(prompt)
        if length + tokens > context:
            raise UserError(
                f"a prompt of {length} tokens and {tokens} more are beyond the context of "
                f"{context}, where beams do not go; at most {max(0, context - length)} are within"
            )
        logits_1V, caches = decoder.prefill(
            np.asarray([prompt]), np.asarray([length], np.int32), length + tokens
        )
        caches = jax.tree.map(lambda a: jnp.repeat(a, self.beams, 0), caches)
        logits_WV = jnp.repeat(logits_1V, self.beams, 0)
        # All beams are the same text as yet: the first alone has candidates.
        total_W = np.where(np.arange(self.beams) == 0, 0.0, -np.inf)
        texts: list[tuple[int, ...]] = [()] * self.beams
        done: list[Hypothesis] = []
        for step in range(tokens):
            say(step)
            total_C, parent_C, token_C = map(np.asarray, _candidates(logits_WV, total_W))
            kept: list[tuple[float, int, int]] = []
            for total, parent, token in zip(
                total_C.tolist(), parent_C.tolist(), token_C.tolist(), strict=True
            ):
                if not np.isfinite(total):
                    continue
                if token == end:
                    score = total / self.length_penalty(step + 1)
                    done.append(Hypothesis(score, texts[parent], total))
                elif len(kept) < self.beams:
                    kept.append((total, parent, token))
            done = heapq.nlargest(self.beams, done)
            # No probability is above 1, so that a text's total never rises.
            best = max((total for total, _, _ in kept), default=-np.inf)
            if not kept or self._settled(done, best, tokens):
                texts = []
                break
            kept += [(-np.inf, 0, 0)] * (self.beams - len(kept))  # rows without a text
            texts = [(*texts[parent], token) for _, parent, token in kept]
            total_W = np.asarray([total for total, _, _ in kept])
            if step + 1 == tokens:
                break
            parent_W = np.asarray([parent for _, parent, _ in kept])
            caches = jax.tree.map(lambda a, rows=parent_W: a[rows], caches)
            token_W = np.asarray([token for *_, token in kept], np.int32)
            at_W = np.full(self.beams, length + step, np.int32)
            logits_WV, caches, _ = decoder.step(caches, token_W, at_W)
        unended = {
            Hypothesis(total / self.length_penalty(tokens), text, total)
            for text, total in zip(texts, total_W.tolist(), strict=False)
            if np.isfinite(total)
        }
        return heapq.nlargest(self.beams, [*done, *unended])

    def length_penalty(self, length: int) -> float:
        """What the log-probability of so many tokens is divided by."""
        return ((5 + length) / 6) ** self.alpha

    def _settled(self, done: list[Hypothesis], best: float, tokens: int) -> bool:
        """Whether no text that goes on can come before those that have ended."""
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
