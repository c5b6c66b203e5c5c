"""Objectives: the next token, or masked tokens. B batch, T tokens, V vocabulary."""

import dataclasses

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe.data.batch import Batch
from routing.inputs import Tokens, named_key
from routing.ranges import OpenShare

EVALUATION = 2**32 - 1  # in place of a step, in the key of evaluation


@gin.configurable
@dataclasses.dataclass(frozen=True)
class NextToken:
    """Predict every next token; the model is causal."""

    causal = True
    extra_tokens = 0

    def prepare(self, batch: Batch, key: jax.Array, num_bytes_2V: Int[Array, "2 V"]) -> Batch:
        """The batch unchanged."""
        return batch

    def before_BT(self, batch: Batch) -> jax.Array:
        """The token before each target, which is the input token."""
        return jnp.asarray(batch.token_BT)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class MaskedToken:
    """Predict masked tokens from both sides (Devlin et al. 2019).

    Only masked tokens are scored, each replaced by one extra token of the vocabulary. Tokens that
    begin or end documents are never masked. Where the draw masks none of a sequence's tokens, the
    one with the smallest draw is masked.

    Attributes:
        rate: share of the tokens that is masked.
    """

    rate: OpenShare = 0.15
    causal = False
    extra_tokens = 1

    def __post_init__(self):
        if not 0 < self.rate < 1:
            raise ValueError(f"MaskedToken.rate={self.rate} must lie between 0 and 1")

    def prepare(self, batch: Batch, key: jax.Array, num_bytes_2V: Int[Array, "2 V"]) -> Batch:
        """The batch with tokens masked; the draw depends on key and sequence number alone.

        Only scored tokens are masked: those of a window's context are masked in another window,
        which scores them.
        """
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(batch.index_B))
        tokens = batch.token_BT.shape[1]
        draw_BT = jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys_B)
        maskable_BT = (
            (batch.segment_BT > 0) & batch.scored_BT & (num_bytes_2V[1, batch.token_BT] > 0)
        )
        draw_BT = jnp.where(maskable_BT, draw_BT, 2.0)
        least_B1 = jnp.maximum(draw_BT.min(axis=1, keepdims=True), self.rate)
        masked_BT = maskable_BT & (draw_BT <= least_B1)
        return dataclasses.replace(
            batch,
            token_BT=jnp.where(masked_BT, num_bytes_2V.shape[1] - 1, batch.token_BT),
            target_BT=batch.token_BT,
            scored_BT=masked_BT,
        )

    def before_BT(self, batch: Batch) -> jax.Array:
        """The token before each target of a prepared batch; -1, the mask, before the first one."""
        return jnp.pad(batch.target_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


Objective = NextToken | MaskedToken


def step_key(seed, step) -> jax.Array:
    """The random key of an optimizer step; step is uint32."""
    return jax.random.fold_in(jax.random.key(seed), step)


def prepared(
    objective: Objective, batch: Batch, key: jax.Array, num_bytes_2V: Int[Array, "2 V"]
) -> Batch:
    """The batch with the objective's inputs and targets.

    num_bytes_2V: bytes of text that each token of the model's vocabulary decodes to, as a
        document's first token and elsewhere; 0 in both for tokens that are not of text.
    """
    return objective.prepare(batch, named_key(key, "masking"), num_bytes_2V)


def text_of(
    objective: Objective, batch: Batch, num_bytes_2V: Int[Array, "2 V"]
) -> tuple[jax.Array, jax.Array]:
    """Which targets of a prepared batch are scored text, bool (B, T), and their bytes, int32.

    Bits per byte sums nats and bytes over this one mask. Tokens that begin or end documents are
    learned, but not in it.
    """
    first_V, later_V = num_bytes_2V
    text_BT = batch.scored_BT & (later_V[batch.target_BT] > 0)
    starts_BT = later_V[objective.before_BT(batch)] == 0
    bytes_BT = jnp.where(starts_BT, first_V[batch.target_BT], later_V[batch.target_BT])
    return text_BT, jnp.where(text_BT, bytes_BT, 0).astype(jnp.int32)


def tokens_of(batch: Batch, key: jax.Array, *, train: bool) -> Tokens:
    """The tokens that the model reads, from a batch."""
    return Tokens(
        token_BT=jnp.asarray(batch.token_BT),
        segment_BT=jnp.asarray(batch.segment_BT),
        position_BT=jnp.asarray(batch.position_BT),
        index_B=jnp.asarray(batch.index_B),
        key=named_key(key, "routing"),
        train=train,
    )
