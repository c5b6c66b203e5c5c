"""A step's micro-batches: cut out of the batch, and their results summed."""

from collections.abc import Callable

from einops import rearrange
import jax
import jax.numpy as jnp

from moe.data.batch import Batch
from routing import GlobalBatch


def micro_batches(batch: Batch, accumulate: int, sequences_per_group: int) -> Batch:
    """The batch as `accumulate` micro-batches, on a new leading axis of every array.

    Groups are dealt in turn, so that every device has sequences of every micro-batch.
    """

    def deal(a):
        sizes = {"a": accumulate, "s": sequences_per_group}
        return rearrange(a, "(g a s) ... -> a (g s) ...", **sizes)

    return jax.tree.map(deal, batch)


def global_batch_of(statistics, micro: Batch, valid) -> GlobalBatch | None:
    """The global batch's statistics, and this micro-batch's share of its tokens, by layer."""
    if statistics is None:
        return None
    share = (micro.segment_BT > 0).sum() / valid
    layers = statistics.token_count.shape[0]
    return GlobalBatch(statistics, jnp.full(layers, jnp.maximum(share, 1e-9)))


def summed(one: Callable, micros: Batch):
    """The sum of one(micro-batch) over all micro-batches, computed one at a time.

    Of bfloat16 arrays the sum is float32.
    """
    first = jax.tree.map(lambda a: a[0], micros)

    def zeros(a):
        is_low = a.dtype == jnp.bfloat16
        return jnp.zeros(a.shape, jnp.float32 if is_low else a.dtype)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, one(micro)), None

    return jax.lax.scan(add, jax.tree.map(zeros, jax.eval_shape(one, first)), micros)[0]
