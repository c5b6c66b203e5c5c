"""What guesses the next tokens of texts, for a larger model to verify in one step.

B texts, A tokens ahead, V vocabulary.
"""

from collections.abc import Sequence
import functools
import itertools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from moe.errors import UserError
from moe.inference.decoder import Decoder, reason_to_go_one_by_one
from moe.inference.sampling import Sampling

Texts = Sequence[Sequence[int]]
NO_TOKEN = -1  # before a text's first one


@runtime_checkable
class Draft(Protocol):
    """Guesses tokens."""

    def start(self, prompt_BT: np.ndarray, length_B: np.ndarray, slots: int, ahead: int) -> None:
        """New texts begin with the first length_B tokens of each row, and have room for `slots`.

        ahead: the most tokens that will be guessed at once.
        """
        ...

    def guess(
        self, texts: Texts, ahead: int, key: jax.Array
    ) -> tuple[np.ndarray, jax.Array | None]:
        """The next tokens (B, A) of texts, and the probabilities (B, A, V) they were drawn by.

        None in their place where each token is this draft's only choice.
        """
        ...

    def verified(self, best_BT: np.ndarray, count_B: np.ndarray) -> None:
        """The model's likeliest tokens (B, A + 1) after each guess, and how many guesses held."""
        ...


class ModelDraft:
    """A smaller model with the same tokenizer.

    Args:
        decoder: of the model.
        sampling: as the larger model's: the nearer both distributions, the more guesses hold.

    Raises:
        UserError: its routers carry state from token to token, which could not be taken back.
    """

    def __init__(self, decoder: Decoder, sampling: Sampling):
        if why := reason_to_go_one_by_one(decoder.module):
            raise UserError(f"the draft's tokens could not be taken back: {why}")
        self._decoder, self._caches = decoder, None
        self._draw = jax.jit(functools.partial(_drawn, sampling))

    def start(self, prompt_BT: np.ndarray, length_B: np.ndarray, slots: int, ahead: int) -> None:
        _, self._caches = self._decoder.prefill(prompt_BT, length_B, slots, ahead)

    def guess(
        self, texts: Texts, ahead: int, key: jax.Array
    ) -> tuple[np.ndarray, jax.Array | None]:
        assert self._caches is not None
        token_B = np.asarray([text[-1] for text in texts], np.int32)
        position_B = np.asarray([len(text) - 1 for text in texts], np.int32)
        found, probs = [], []
        # One more than is asked for, so that the cache holds the last guess, too.
        for i in range(ahead + 1):
            logits_BV, self._caches, _ = self._decoder.step(
                self._caches, token_B, position_B + np.int32(i)
            )
            token_B, prob_BV = self._draw(logits_BV, jax.random.fold_in(key, i))
            found.append(token_B)
            probs.append(prob_BV)
        return np.stack(found[:ahead], axis=1), jnp.stack(probs[:ahead], axis=1)

    def verified(self, best_BT: np.ndarray, count_B: np.ndarray) -> None:
        """Its cache holds what is taken back where it will be written again."""


class Lookup:
    """What followed the last tokens where they stood before in the same text (n-grams).

    longest: tokens of the longest run that is looked for; then shorter ones.
    """

    def __init__(self, longest: int = 3):
        self._longest = longest

    def start(self, prompt_BT: np.ndarray, length_B: np.ndarray, slots: int, ahead: int) -> None:
        """Everything is in the texts."""

    def guess(
        self, texts: Texts, ahead: int, key: jax.Array
    ) -> tuple[np.ndarray, jax.Array | None]:
        return np.asarray([self._after(text, ahead) for text in texts], np.int32), None

    def verified(self, best_BT: np.ndarray, count_B: np.ndarray) -> None:
        """Nothing is learned."""

    def _after(self, text: Sequence[int], ahead: int) -> list[int]:
        for n in range(min(self._longest, len(text) - 1), 0, -1):
            end = list(text[-n:])
            for at in range(len(text) - n - 1, -1, -1):
                if list(text[at : at + n]) == end:
                    found = list(text[at + n : at + n + ahead])
                    return found + [text[-1]] * (ahead - len(found))
        return [text[-1]] * ahead


class Jacobi:
    """All next tokens at once: the model's own likeliest ones after the guesses of the last step.

    With greedy draws this is Jacobi's iteration on the equations x_i = argmax p(. | x_<i), whose
    only fixed point is the greedy text (Santilli et al. 2023); each step settles one more of them
    at least.
    """

    def __init__(self):
        self._left: list[list[int]] = []

    def start(self, prompt_BT: np.ndarray, length_B: np.ndarray, slots: int, ahead: int) -> None:
        self._left = [[] for _ in prompt_BT]

    def guess(
        self, texts: Texts, ahead: int, key: jax.Array
    ) -> tuple[np.ndarray, jax.Array | None]:
        rows = [
            (left + [text[-1]] * ahead)[:ahead]
            for left, text in zip(self._left, texts, strict=True)
        ]
        return np.asarray(rows, np.int32), None

    def verified(self, best_BT: np.ndarray, count_B: np.ndarray) -> None:
        # The token after the guesses that held is drawn; what follows it is guessed.
        both = zip(best_BT.tolist(), count_B.tolist(), strict=True)
        self._left = [best[count + 1 :] for best, count in both]


class Lookahead:
    """What the model itself held likeliest after the same two tokens before, in guesses too.

    A step tells the likeliest token after every guess, also after those that don't hold. As in
    lookahead decoding (Fu et al. 2024, arXiv 2402.02057) these runs of tokens are kept for the rest
    of the text; but they are chained to one guess of A tokens, instead of several that a step of
    its own mask verifies beside a window of further ones. What follows tokens that were never met
    is guessed as `Jacobi` does.
    """

    def __init__(self):
        self._jacobi = Jacobi()
        self._next: list[dict[tuple[int, int], int]] = []  # what follows two tokens, of each text
        self._asked: list[list[int]] = []

    def start(self, prompt_BT: np.ndarray, length_B: np.ndarray, slots: int, ahead: int) -> None:
        self._jacobi.start(prompt_BT, length_B, slots, ahead)
        texts = [row[:n] for row, n in zip(prompt_BT.tolist(), length_B, strict=True)]
        self._next = [
            dict(zip(itertools.pairwise(text[:-1]), text[2:], strict=True)) for text in texts
        ]

    def guess(
        self, texts: Texts, ahead: int, key: jax.Array
    ) -> tuple[np.ndarray, jax.Array | None]:
        jacobi_BA, _ = self._jacobi.guess(texts, ahead, key)
        self._asked = []
        for known, text, others in zip(self._next, texts, jacobi_BA.tolist(), strict=True):
            run = [text[-2] if len(text) > 1 else NO_TOKEN, text[-1]]
            for other in others:
                run.append(known.get((run[-2], run[-1]), int(other)))
            self._asked.append(run)
        return np.asarray([run[2:] for run in self._asked], np.int32), None

    def verified(self, best_BT: np.ndarray, count_B: np.ndarray) -> None:
        self._jacobi.verified(best_BT, count_B)
        for known, run, best in zip(self._next, self._asked, best_BT.tolist(), strict=True):
            known.update(zip(itertools.pairwise(run), best, strict=True))


def _drawn(sampling: Sampling, logits_BV, key):
    prob_BV = sampling.probabilities(logits_BV)
    return jax.random.categorical(key, jnp.log(prob_BV)).astype(jnp.int32), prob_BV
