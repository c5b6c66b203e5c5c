"""Speculative decoding: several guessed tokens are verified in one step of the model.

The texts are those that the model itself would draw: greedy ones token for token, others by the
same distribution (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1).

B texts, A tokens ahead, V vocabulary, E experts.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from moe.data.tokens.tokenizer import Tokenizer
from moe.errors import UserError
from moe.inference.decoder import Caches, Decoder, reason_to_go_one_by_one
from moe.inference.drafts import Draft
from moe.inference.generate import Pieces, bucket, check_room, padded, until
from moe.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Speculated:
    """Texts, and what it took.

    Attributes:
        texts: each prompt with what follows it.
        tokens: those that were generated, of each text.
        steps: of the model, prefill aside.
        held: the mean number of guesses that held, of a text and step.
        experts: distinct experts that a step read in each sparse layer, on average.
    """

    texts: list[str]
    tokens: list[list[int]]
    steps: int
    held: float
    experts: list[float]


class Speculator:
    """Continues texts with a model and a draft that guesses ahead.

    Args:
        decoder: of the model.
        tokenizer: of both.
        context: the most tokens of a text.
        draft: guesses.
        ahead: A, how many tokens it guesses each time.
        sampling: how the model's tokens are drawn.

    Raises:
        UserError: the model's routers carry state from token to token, or the penalty on repeated
            tokens is set, which would differ between a guess and the next.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        context: int,
        draft: Draft,
        *,
        ahead: int = 4,
        sampling: Sampling = Sampling(),
    ):
        if why := reason_to_go_one_by_one(decoder.module):
            raise UserError(f"this model can't verify several tokens at once: {why}")
        if sampling.counts_tokens:
            raise UserError("a repetition penalty and a draft don't go together; leave one out")
        self._decoder, self._tokenizer, self._context = decoder, tokenizer, context
        self._draft, self._ahead = draft, ahead
        self._first = jax.jit(sampling.draw)
        self._accept = jax.jit(functools.partial(_accepted, sampling))

    def continuations(
        self,
        prompts: Sequence[str],
        *,
        tokens: int,
        seed: int = 0,
        say: Callable[[str], None] = lambda piece: None,
    ) -> Speculated:
        """Each prompt with at most so many tokens more, all of them at once.

        say: is given the first text, in pieces of whole characters, as they are found.

        Raises:
            UserError: a text would be longer than the context.
        """
        end, key = self._tokenizer.document_id, jax.random.key(seed)
        ids = self._tokenizer.encode_batch(list(prompts))
        texts = [[end, *prompt] for prompt in ids]
        starts = [len(text) for text in texts]
        check_room(max(starts), tokens, self._context)
        pieces = Pieces(self._tokenizer, ids[0], say)
        logits_BV, caches = self._started(texts, bucket(max(starts) + tokens + self._ahead + 1))
        self._add(texts, [[t] for t in np.asarray(self._first(logits_BV, key)).tolist()], pieces)
        steps, held, experts = 0, [], []
        while any(live := self._live(texts, starts, tokens)):
            steps += 1
            found, count_B, caches, read = self._step(texts, caches, jax.random.fold_in(key, steps))
            experts.append(read)
            new = []
            for i, goes_on in enumerate(live):
                left = tokens - (len(texts[i]) - starts[i])
                new.append(found[i][:left] if goes_on else [])
                held += [int(count_B[i])] if goes_on else []
            self._add(texts, new, pieces)
        pieces.finish()
        new = [until(text[start:], end) for text, start in zip(texts, starts, strict=True)]
        return Speculated(
            [self._tokenizer.decode([*p, *n]) for p, n in zip(ids, new, strict=True)],
            new,
            steps,
            float(np.mean(held)) if held else 0.0,
            np.mean(experts, axis=0).tolist() if experts else [],
        )

    def _started(self, texts: list[list[int]], slots: int):
        """The logits (B, V) that follow the prompts, and the cache; the draft begins, too."""
        prompt_BT, length_B = padded(texts, self._context)
        self._draft.start(prompt_BT, length_B, slots, self._ahead)
        return self._decoder.prefill(prompt_BT, length_B, slots, self._ahead)

    def _step(self, texts: list[list[int]], caches: Caches, key: jax.Array):
        """The guesses that hold and the token after them, of each text; how many held (B,).

        Then the cache with them, and how many experts were read in each sparse layer.
        """
        guess_key, accept_key = jax.random.split(key)
        token_BA, prob_BAV = self._draft.guess(texts, self._ahead, guess_key)
        last_B1 = np.asarray([[text[-1]] for text in texts], np.int32)
        at_B = np.asarray([len(text) - 1 for text in texts], np.int32)
        token_BT = np.concatenate([last_B1, token_BA], axis=1)
        logits_BTV, caches, used = self._decoder.extend(caches, token_BT, at_B)
        decided = self._accept(logits_BTV, prob_BAV, token_BA, accept_key)
        count_B, next_B, best_BT = map(np.asarray, decided)
        self._draft.verified(best_BT, count_B)
        read = [int(np.asarray(used_BTE).any((0, 1)).sum()) for used_BTE in used]
        both = zip(token_BA.tolist(), count_B, next_B.tolist(), strict=True)
        return [[*guesses[:n], last] for guesses, n, last in both], count_B, caches, read

    def _live(self, texts: list[list[int]], starts: list[int], tokens: int) -> list[bool]:
        """Which texts go on: neither long enough nor ended."""
        new = [text[start:] for text, start in zip(texts, starts, strict=True)]
        return [len(n) < tokens and self._tokenizer.document_id not in n for n in new]

    def _add(self, texts: list[list[int]], new: list[list[int]], pieces: Pieces) -> None:
        for text, found in zip(texts, new, strict=True):
            text.extend(found)
        for token in new[0]:
            pieces.add(token)


def accepted(
    p_BTV: Float[Array, "B T V"],
    q_BAV: Float[Array, "B A V"],
    token_BA: Int[Array, "B A"],
    key: jax.Array,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many of the guesses hold, and the token after them: together drawn by p.

    A guess x that was drawn by q holds with probability min(1, p(x) / q(x)). After the first that
    doesn't, a token is drawn by max(p - q, 0), normalised; after the last, by p.

    Args:
        p_BTV: the model's probabilities, T = A + 1: after each guess, and before the first.
        q_BAV: those by which the guesses were drawn.
        token_BA: the guesses.
        key: of the draws.
    """
    hold_key, next_key = jax.random.split(key)
    ahead = token_BA.shape[1]

    def at_tokens(prob_BAV):
        return jnp.take_along_axis(prob_BAV, token_BA[..., None], -1)[..., 0]

    uniform_BA = jax.random.uniform(hold_key, token_BA.shape)
    hold_BA = uniform_BA * at_tokens(q_BAV) < at_tokens(p_BTV[:, :ahead])
    count_B = jnp.cumprod(hold_BA, axis=1).sum(1)

    def at_count(prob_BTV):
        return jnp.take_along_axis(prob_BTV, count_B[:, None, None], 1)[:, 0]

    p_BV = at_count(p_BTV)
    left_BV = jnp.maximum(p_BV - at_count(jnp.pad(q_BAV, ((0, 0), (0, 1), (0, 0)))), 0)
    # Where rounding alone has refused a guess, nothing is left.
    left_BV = jnp.where(left_BV.sum(-1, keepdims=True) > 0, left_BV, p_BV)
    return count_B, jax.random.categorical(next_key, jnp.log(left_BV)).astype(jnp.int32)


def _accepted(sampling: Sampling, logits_BTV, prob_BAV, token_BA, key):
    """`accepted` for logits, and the tokens (B, T) that would be drawn likeliest."""
    vocabulary = logits_BTV.shape[-1]
    p_BTV = sampling.probabilities(logits_BTV.reshape(-1, vocabulary)).reshape(logits_BTV.shape)
    q_BAV = jax.nn.one_hot(token_BA, vocabulary) if prob_BAV is None else prob_BAV
    count_B, next_B = accepted(p_BTV, q_BAV, jnp.asarray(token_BA), key)
    return count_B, next_B, p_BTV.argmax(-1)
