"""Softmax cross-entropy over the vocabulary, block by block: all logits at once are never stored.

B batch, T tokens, D model width, V vocabulary, N tokens of a block. A block keeps the two axes B
and T in place of N where a mesh shards T; names without a suffix stand for both.
"""

from collections.abc import Callable
import functools
from typing import Any

from einops import rearrange
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.logical_axes import is_cut, per_shard, platform
from routing.records import AnyArray

# The most logits of a block: as many as fit a CPU's cache; elsewhere, enough for large matmuls.
BLOCK_LOGITS = 2**21
ACCELERATOR_BLOCK_LOGITS = 2**27


def cross_entropy_sums(
    weight_DV: Float[Array, "D V"],
    hidden_BTD: Float[Array, "B T D"],
    target_BT: Int[AnyArray, "B T"],
    scored_BT: Bool[AnyArray, "B T"],
    counted_BT: Bool[AnyArray, "B T"],
) -> jax.Array:
    """The loss in nats, summed over scored tokens and over those also counted: float32 (2,).

    Equivalent to: -log_softmax(hidden @ weight)[target], summed where scored, and where scored and
    counted. Only the first sum has a gradient; the second is for metrics. Gradients are computed
    with the loss, block by block along T, while the block's logits are in cache. On a mesh every
    device computes its own sequences, and the weight's gradients are summed at the end; where the
    vocabulary or T is sharded, there is a single block.

    Args:
        weight_DV: the output weights.
        hidden_BTD: representations after the last norm.
        target_BT: the token to predict.
        scored_BT: which tokens the loss is summed over.
        counted_BT: which of them the second sum is over.
    """
    weight_DV = weight_DV.astype(hidden_BTD.dtype)
    arrays = (hidden_BTD, *map(jnp.asarray, (target_BT, scored_BT, counted_BT)))
    if is_cut("vocab") or is_cut("length"):
        return _blockwise(weight_DV, *arrays, 1)

    def one_shard(hidden_BTD, target_BT, scored_BT, counted_BT, weight_DV):
        blocks = num_blocks(target_BT.shape, weight_DV.shape[1])
        nats_2: Any = _blockwise(weight_DV, hidden_BTD, target_BT, scored_BT, counted_BT, blocks)
        return nats_2[None]

    return per_shard(one_shard, arrays, (weight_DV,), (("embed", "vocab"),)).sum(0)


def cross_entropy_of_each(
    weight_DV: Float[Array, "D V"],
    hidden_BTD: Float[Array, "B T D"],
    target_BT: Int[AnyArray, "B T"],
) -> jax.Array:
    """The loss of every token in nats, float32 (B, T), without a gradient.

    Block by block, and on a mesh by each device for its own sequences, as `cross_entropy_sums`.
    """
    weight_DV, hidden_BTD = jax.lax.stop_gradient((weight_DV, hidden_BTD))
    weight_DV = weight_DV.astype(hidden_BTD.dtype)
    arrays = hidden_BTD, jnp.asarray(target_BT)
    if is_cut("vocab") or is_cut("length"):
        everything = jnp.ones(target_BT.shape, bool)
        return _block(weight_DV, *arrays, everything)[1]

    def one_shard(hidden_BTD, target_BT, weight_DV):
        blocks, batch = num_blocks(target_BT.shape, weight_DV.shape[1]), len(target_BT)

        def one(block):
            return _block(weight_DV, *block)[1]

        everything = jnp.ones_like(target_BT, bool)
        nats = jax.lax.map(one, split_tokens((hidden_BTD, target_BT, everything), blocks))
        return rearrange(nats.reshape(blocks, batch, -1), "s b t -> b (s t)")

    return per_shard(one_shard, arrays, (weight_DV,), (("embed", "vocab"),))


def num_blocks(shape: tuple[int, int], vocabulary: int) -> int:
    """Into how many equal blocks to cut T, so that a block's logits stay in cache."""
    batch, tokens = shape
    limit = BLOCK_LOGITS if platform() == "cpu" else ACCELERATOR_BLOCK_LOGITS
    wanted = max(1, batch * tokens * vocabulary // limit)
    return next(n for n in range(min(wanted, tokens), 0, -1) if tokens % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(weight_DV, hidden_BTD, target_BT, scored_BT, counted_BT, blocks: int):
    def add(total_2, block):
        *block, counted = block
        return total_2 + _sums(_block(weight_DV, *block)[1], counted), None

    split = split_tokens((hidden_BTD, target_BT, scored_BT, counted_BT), blocks)
    return jax.lax.scan(add, zeros_along((2,), hidden_BTD), split)[0]


def _sums(loss, counted):
    """(2,): the sum of all losses, and of those that are counted."""
    return jnp.stack([loss.sum(), jnp.where(counted, loss, 0).sum()])


def _block(weight_DV, hidden, target, scored):
    """The gradient of a block's loss by its logits (N, V), and each token's loss (N,); float32."""
    logits = jnp.matmul(hidden, weight_DV, preferred_element_type=jnp.float32)
    top = logits.max(-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = exp.sum(-1, keepdims=True)
    is_target = jax.nn.one_hot(target, logits.shape[-1], dtype=bool)
    target_logit = jnp.where(is_target, logits, 0).sum(-1)
    loss = (jnp.log(total) + top)[..., 0] - target_logit
    dlogits = jnp.where(scored[..., None], exp / total - is_target, 0)
    return dlogits, jnp.where(scored, loss, 0)


def _forward(weight_DV, hidden_BTD, target_BT, scored_BT, counted_BT, blocks: int):
    def one(hidden, target, scored, counted):
        dlogits, loss = _block(weight_DV, hidden, target, scored)
        return dlogits, _sums(loss, counted)

    tokens = hidden_BTD, target_BT, scored_BT, counted_BT
    return sums_and_gradients(one, (2,), weight_DV, tokens, blocks)


def sums_and_gradients(one: Callable, shape: tuple[int, ...], weight_DV, tokens, blocks: int):
    """The sums (shape) of a loss over all tokens, and its gradients by weight_DV and hidden_BTD.

    one: of a block of tokens' arrays: the gradient of its loss by its logits (N, V), and its sums.
    tokens: arrays (B, T, ...), of which hidden_BTD is the first.
    """
    hidden_BTD = tokens[0]

    def add(carry, block):
        total, dweight_DV = carry
        dlogits, sums = one(*block)
        dlogits = dlogits.astype(weight_DV.dtype)
        axes = tuple(range(dlogits.ndim - 1))
        block_DV = jnp.tensordot(block[0], dlogits, (axes, axes))
        dweight_DV = dweight_DV + block_DV.astype(jnp.float32)
        return (total + sums, dweight_DV), dlogits @ weight_DV.T

    start = (zeros_along(shape, hidden_BTD), zeros_along(weight_DV.shape, hidden_BTD))
    (total, dweight_DV), dhidden = jax.lax.scan(add, start, split_tokens(tokens, blocks))
    batch, _, width = hidden_BTD.shape
    dhidden_BTD = rearrange(dhidden.reshape(blocks, batch, -1, width), "s b t d -> b (s t) d")
    return total, (dweight_DV.astype(weight_DV.dtype), dhidden_BTD)


def _backward(blocks, saved, dtotal_2):
    dweight_DV, dhidden_BTD = saved
    scale = dtotal_2[0].astype(dweight_DV.dtype)
    return scale * dweight_DV, scale * dhidden_BTD, None, None, None


_blockwise.defvjp(_forward, _backward)


def zeros_along(shape, like):
    """float32 zeros that vary over the mesh as `like` does."""
    return jnp.zeros_like(like, shape=shape, dtype=jnp.float32)


def split_tokens(arrays, blocks: int):
    """Arrays (B, T, ...) as (blocks, B * T / blocks, ...), cut along T: a mesh shards B."""
    if is_cut("length"):  # one block with the axes B and T
        return jax.tree.map(lambda a: a[None], arrays)

    def cut(a):
        return rearrange(a, "b (s t) ... -> s (b t) ...", s=blocks)

    return jax.tree.map(cut, arrays)
