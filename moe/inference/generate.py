"""Generates text: each token by a forward pass over the last T tokens, without a cache.

B samples, T tokens of context, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe.data.tokens.tokenizer import Tokenizer
from moe.errors import UserError
from moe.model.functional import Arrays
from moe.training.abstract_model import AbstractModel
from routing.inputs import Tokens


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from this many likeliest tokens; from all where None.
        top_p: draw from the fewest likeliest tokens with this much probability; all where None.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def draw(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        """A token for each row, int32 (B,)."""
        if self.temperature == 0:
            return jnp.argmax(logits_BV, axis=-1)
        logits_BV = logits_BV / self.temperature
        if self.top_k is not None:
            kth_B1 = jax.lax.top_k(logits_BV, min(self.top_k, logits_BV.shape[-1]))[0][:, -1:]
            logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
        if self.top_p is not None:
            logits_BV = nucleus(logits_BV, self.top_p)
        return jax.random.categorical(key, logits_BV)


def nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """The logits (B, V), with -inf for all but the fewest likeliest tokens that reach top_p.

    Nucleus sampling (Holtzman et al. 2020).
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    prob_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, -1))
    # A token is kept while those before it don't reach top_p; so the first is always kept.
    keep_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV < max(top_p, 1e-9)
    keep_BV = jnp.take_along_axis(keep_BV, jnp.argsort(order_BV, axis=-1), -1)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def generate(
    model: AbstractModel,
    params: Arrays,
    router_state: Arrays,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    tokens: int,
    count: int = 1,
    context: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> list[str]:
    """Texts of the prompt and its continuation, which ends early where the model ends the document.

    Args:
        model, params, router_state, tokenizer: of a restored or trained run.
        prompt: the text to continue; empty for the start of a document.
        tokens: how many tokens are generated at most.
        count: number of texts.
        context: T, the tokens that the model sees.
        sampling: how tokens are drawn.
        seed: of the draws.

    Raises:
        UserError: the model doesn't predict the next token, or its router sees it.
    """
    if not model.objective.causal:
        raise UserError(
            "this model fills in masked tokens and can't continue a text; "
            "generate needs a run with train.objective = @NextToken()"
        )
    if model.module.leak:
        raise UserError(f"this model can't continue a text: {model.module.leak}")
    start = [tokenizer.document_id, *tokenizer.encode_batch([prompt])[0]]
    text_BN = np.tile(np.asarray(start, np.int32), (count, 1))
    prompt_length = len(start)
    next_token = jax.jit(functools.partial(_next_token, model, sampling))
    key = jax.random.key(seed)
    for i in range(tokens):
        window_BN = text_BN[:, -context:]
        length = window_BN.shape[1]
        window_BT = np.zeros((count, context), np.int32)
        window_BT[:, :length] = window_BN
        args = (window_BT, jnp.int32(length), jax.random.fold_in(key, i))
        chosen_B = np.asarray(next_token(params, router_state, *args))
        text_BN = np.concatenate([text_BN, chosen_B[:, None].astype(np.int32)], axis=1)
        ended_B = (text_BN[:, prompt_length:] == tokenizer.document_id).any(1)
        if ended_B.all():
            break
    return [tokenizer.decode(_until_end(row_N[1:], tokenizer.document_id)) for row_N in text_BN]


def _next_token(
    model: AbstractModel, sampling: Sampling, params, router_state, window_BT, length, key
):
    """A token, int32 (B,), to follow the first `length` tokens of each window (B, T)."""
    module = model.graph.merge(params, router_state)
    count, context = window_BT.shape
    place_BT = jnp.broadcast_to(jnp.arange(context, dtype=jnp.int32)[None], window_BT.shape)
    out = module(
        Tokens(
            token_BT=window_BT,
            segment_BT=(place_BT < length).astype(jnp.int32),
            position_BT=place_BT,
            index_B=jnp.arange(count, dtype=jnp.int32),
            key=jax.random.key(0),
            train=False,
        )
    )
    last_B1D = jax.lax.dynamic_slice_in_dim(out.hidden_BTD, length - 1, 1, axis=1)
    return sampling.draw(module.logits(last_B1D)[:, 0], key)


def _until_end(row_N: np.ndarray, document_id: int) -> list[int]:
    ends = np.flatnonzero(row_N == document_id)
    return row_N[: ends[0]].tolist() if len(ends) else row_N.tolist()
