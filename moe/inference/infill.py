"""Fills in the masked tokens of a text, one after the other: a pass of the model for each.

T tokens, V vocabulary.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from moe.data.tokens.tokenizer import Tokenizer
from moe.errors import UserError
from moe.inference.decoder import texts_of
from moe.inference.generate import padded
from moe.inference.sampling import Sampling
from moe.model.functional import Arrays, Graph
from moe.training.abstract_model import AbstractModel

MASK = "<mask>"
Order = Literal["surest", "left"]
ORDERS = ("surest", "left")


@dataclasses.dataclass(frozen=True)
class Filled:
    """A text without masks.

    Attributes:
        text: the whole of it.
        tokens: those that were filled in, from left to right.
        log_probs: of these in the model's distribution when they were filled in, in nats.
        order: the masks' numbers from the left, in the order in which they were filled.
    """

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    order: tuple[int, ...]


class Infiller:
    """Fills in texts with a model of masked tokens.

    Every pass sees the tokens that the passes before have filled in; the masks that are left stay
    masks.

    Args:
        model, params, router_state, tokenizer: of a restored run with `MaskedToken`.
        order: "surest" fills the mask whose likeliest token has the largest probability (Mask-
            Predict, arXiv 1904.09324, fills several at a time by it); "left" the leftmost.
        sampling: how a token is drawn.

    Raises:
        UserError: the model doesn't fill in masks.
    """

    def __init__(
        self,
        model: AbstractModel,
        params: Arrays,
        router_state: Arrays,
        tokenizer: Tokenizer,
        order: Order = "surest",
        sampling: Sampling = Sampling(temperature=0),
    ):
        if model.objective.causal:
            raise UserError(
                f"this model continues texts and doesn't fill in {MASK}; that needs a run with "
                "train.objective = @MaskedToken()"
            )
        self.tokenizer, self.order, self.sampling = tokenizer, order, sampling
        graph, params = model.graph.rounded_once(params)
        self._values, self._context = (params, router_state), model.sequence_length
        self._mask = model.module.vocab_size - 1
        # Neither is ever the answer: no mask is one, and documents' ends are never masked.
        never = np.asarray([self._mask, tokenizer.document_id])
        self._logits = jax.jit(functools.partial(_logits, graph, never))

    def fill(self, text: str, *, seed: int = 0) -> Filled:
        """The text with a token for each `MASK` in it; the parts between are encoded by themselves.

        Raises:
            UserError: there is no mask, or more tokens than the model was trained with.
        """
        ids = [self.tokenizer.document_id, *self._encoded(text)]
        places = [i for i, token in enumerate(ids) if token == self._mask]
        if not places:
            raise UserError(f"there is no {MASK} in the text, which stands for a token to fill in")
        if len(ids) > self._context:
            raise UserError(
                f"a text of {len(ids)} tokens, but this model was trained with {self._context}"
            )
        left, log_probs, key = list(places), {}, jax.random.key(seed)
        while left:
            logits_TV = self._logits(*self._values, *padded([ids], self._context))
            place = self._next(logits_TV, left)
            held_1V = None
            if self.sampling.counts_tokens:
                held_1V = jnp.zeros((1, self._mask + 1), bool).at[0, np.asarray(ids)].set(True)
            own = jax.random.fold_in(key, len(left))[None]
            token_1, log_prob_1 = self.sampling.draw_each(logits_TV[place][None], own, held_1V)
            ids[place], log_probs[place] = int(token_1[0]), float(log_prob_1[0])
            left.remove(place)
        return Filled(
            text=self.tokenizer.decode(ids[1:]),
            tokens=tuple(ids[place] for place in places),
            log_probs=tuple(log_probs[place] for place in places),
            order=tuple(places.index(place) for place in log_probs),
        )

    def _encoded(self, text: str) -> list[int]:
        """The tokens of a text, with masks."""
        first, *others = self.tokenizer.encode_batch(text.split(MASK))
        return [*first, *(token for part in others for token in (self._mask, *part))]

    def _next(self, logits_TV: Float[Array, "T V"], left: Sequence[int]) -> int:
        """The place that is filled now."""
        if self.order == "left":
            return left[0]
        best_M = jax.nn.log_softmax(logits_TV[np.asarray(left)]).max(-1)
        return left[int(best_M.argmax())]


def _logits(graph: Graph, never: np.ndarray, params, router_state, token_BT, length_B):
    """The logits (T, V) of the first text, -inf for tokens that are never filled in."""
    module = graph.merge(params, router_state)
    hidden_BTD = module(texts_of(token_BT, length_B)).hidden_BTD
    return module.logits(hidden_BTD)[0].at[:, never].set(-jnp.inf)
