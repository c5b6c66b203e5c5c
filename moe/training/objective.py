"""What the model learns: the next token, or masked tokens. B batch, T tokens, V vocabulary."""

import dataclasses

import gin
import jax
import jax.numpy as jnp

from moe.data.batch import Batch
from routing.inputs import Tokens, named_key
from routing.ranges import OpenShare

EVALUATION = 2**32 - 1  # the step whose key evaluation uses


@gin.configurable
@dataclasses.dataclass(frozen=True)
class NextToken:
    """Predict every next token; the model is causal."""

    causal = True
    extra_tokens = 0

    def prepare(self, batch: Batch, key: jax.Array, num_bytes_2V: jax.Array) -> Batch:
        """The batch as it is."""
        return batch

    def before_BT(self, batch: Batch) -> jax.Array:
        """The token before each target: the input."""
        return jnp.asarray(batch.token_BT)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class MaskedToken:
    """Predict a share of the tokens that are hidden (Devlin et al. 2019); sees both sides.

    Only hidden tokens are scored, each replaced by one extra token of the vocabulary. Hidden are
    tokens of text, never those that mark documents; in a sequence where the draw hides none, the
    one with the smallest draw.

    Attributes:
        rate: share of the tokens that is hidden.
    """

    rate: OpenShare = 0.15
    causal = False
    extra_tokens = 1

    def __post_init__(self):
        if not 0 < self.rate < 1:
            raise ValueError(f"MaskedToken.rate={self.rate} must lie between 0 and 1")

    def prepare(self, batch: Batch, key: jax.Array, num_bytes_2V: jax.Array) -> Batch:
        """The batch with tokens hidden; the draw depends on key and sequence number alone.

        Only where the batch scores: a window's context is hidden in the window that scores it.
        """
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(batch.index_B))
        tokens = batch.token_BT.shape[1]
        draw_BT = jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys_B)
        may_BT = (batch.segment_BT > 0) & batch.scored_BT & (num_bytes_2V[1, batch.token_BT] > 0)
        draw_BT = jnp.where(may_BT, draw_BT, 2.0)
        least_B1 = jnp.maximum(draw_BT.min(axis=1, keepdims=True), self.rate)
        hidden_BT = may_BT & (draw_BT <= least_B1)
        return dataclasses.replace(
            batch,
            token_BT=jnp.where(hidden_BT, num_bytes_2V.shape[1] - 1, batch.token_BT),
            target_BT=batch.token_BT,
            scored_BT=hidden_BT,
        )

    def before_BT(self, batch: Batch) -> jax.Array:
        """The token before each target of a prepared batch; the mask, -1, where it isn't known."""
        return jnp.pad(batch.target_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


Objective = NextToken | MaskedToken


def step_key(seed, step) -> jax.Array:
    """The key of an optimizer step (uint32)."""
    return jax.random.fold_in(jax.random.key(seed), step)


def prepared(objective: Objective, batch: Batch, key: jax.Array, num_bytes_2V: jax.Array) -> Batch:
    """The batch as the objective wants it.

    num_bytes_2V: bytes of text that each token of the model's vocabulary gives back, as a
        document's first and anywhere else; 0 in both for tokens that are not of text.
    """
    return objective.prepare(batch, named_key(key, "masking"), num_bytes_2V)


def text_of(
    objective: Objective, batch: Batch, num_bytes_2V: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Where a prepared batch scores text (B, T), and how many bytes of it: int32.

    One mask for what bits per byte divides: tokens that mark documents are learned, and neither
    their nats nor any bytes count.
    """
    first_V, later_V = num_bytes_2V
    text_BT = batch.scored_BT & (later_V[batch.target_BT] > 0)
    starts_BT = later_V[objective.before_BT(batch)] == 0
    bytes_BT = jnp.where(starts_BT, first_V[batch.target_BT], later_V[batch.target_BT])
    return text_BT, jnp.where(text_BT, bytes_BT, 0).sum(dtype=jnp.int32)


def tokens_of(batch: Batch, key: jax.Array, *, train: bool) -> Tokens:
    """What the blocks need of a batch."""
    return Tokens(
        token_BT=jnp.asarray(batch.token_BT),
        segment_BT=jnp.asarray(batch.segment_BT),
        position_BT=jnp.asarray(batch.position_BT),
        index_B=jnp.asarray(batch.index_B),
        key=named_key(key, "routing"),
        train=train,
    )
