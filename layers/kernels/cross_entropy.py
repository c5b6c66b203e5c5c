"""Softmax cross-entropy over the vocabulary, without ever storing all logits.

B batch, T tokens, D model width, V vocabulary, N tokens of a block.
"""

import functools
from typing import Any

from einops import rearrange
import jax
import jax.numpy as jnp

from layers.constrain import is_cut, is_placed, per_shard, platform

# Logits at a time: what fits a CPU's cache; elsewhere what keeps the products large.
BLOCK_LOGITS = 2**21
ACCELERATOR_BLOCK_LOGITS = 2**27


def cross_entropy_sum(weight_DV, hidden_BTD, target_BT, scored_BT) -> jax.Array:
    """Nats summed over scored tokens, a float32 scalar. See `cross_entropy_sums`."""
    return cross_entropy_sums(weight_DV, hidden_BTD, target_BT, scored_BT, scored_BT)[0]


def cross_entropy_sums(weight_DV, hidden_BTD, target_BT, scored_BT, counted_BT) -> jax.Array:
    """Nats summed over scored tokens, and over those that are counted too: float32 (2,).

    Equivalent to: -log_softmax(hidden @ weight)[target], summed where scored, and where scored and
    counted. Gradients flow through the first alone: the second is there to be told. They are
    computed with the loss, block by block along T, while the block's logits are in cache. Of
    several devices each does this for its own rows, and the weight's gradients add up at the end;
    where the vocabulary or T is cut there is one block.
    """
    weight_DV = weight_DV.astype(hidden_BTD.dtype)
    arrays = (hidden_BTD, *map(jnp.asarray, (target_BT, scored_BT, counted_BT)))
    if is_cut("vocab") or is_cut("length"):
        return _blockwise(weight_DV, *arrays, 1)

    def own_rows(hidden_BTD, target_BT, scored_BT, counted_BT, weight_DV):
        blocks = _blocks(target_BT.shape, weight_DV.shape[1])
        nats_2: Any = _blockwise(weight_DV, hidden_BTD, target_BT, scored_BT, counted_BT, blocks)
        return nats_2[None]

    return per_shard(own_rows, arrays, (weight_DV,), (("embed", "vocab"),)).sum(0)


def cross_entropy_of_each(weight_DV, hidden_BTD, target_BT) -> jax.Array:
    """Nats of every token, float32 (B, T), without a gradient: what a policy is rewarded by."""
    weight_DV, hidden_BTD = jax.lax.stop_gradient((weight_DV, hidden_BTD))
    weight_DV = weight_DV.astype(hidden_BTD.dtype)
    batch = len(target_BT)
    blocks = 1 if is_placed() else _blocks(target_BT.shape, weight_DV.shape[1])

    def one(block):
        return _block(weight_DV, *block)[1]

    everything = jnp.ones(target_BT.shape, bool)
    nats = jax.lax.map(one, _split((hidden_BTD, jnp.asarray(target_BT), everything), blocks))
    return rearrange(nats.reshape(blocks, batch, -1), "s b t -> b (s t)")


def _blocks(shape: tuple[int, int], vocabulary: int) -> int:
    """How many equal blocks along T keep a block's logits in cache."""
    batch, tokens = shape
    limit = BLOCK_LOGITS if platform() == "cpu" else ACCELERATOR_BLOCK_LOGITS
    wanted = max(1, batch * tokens * vocabulary // limit)
    return next(n for n in range(min(wanted, tokens), 0, -1) if tokens % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(weight_DV, hidden_BTD, target_BT, scored_BT, counted_BT, blocks: int):
    def add(total_2, block):
        *block, counted_N = block
        return total_2 + _both(_block(weight_DV, *block)[1], counted_N), None

    split = _split((hidden_BTD, target_BT, scored_BT, counted_BT), blocks)
    return jax.lax.scan(add, _zeros((2,), hidden_BTD), split)[0]


def _both(loss_N, counted_N):
    """The sum of all losses, and of those that are counted (2,)."""
    return jnp.stack([loss_N.sum(), jnp.where(counted_N, loss_N, 0).sum()])


def _block(weight_DV, hidden_ND, target_N, scored_N):
    """The gradient of the block's loss by the logits (N, V), each token's loss (N,); float32.

    N stands for two axes, B and T, where a mesh cuts both.
    """
    logits_NV = jnp.matmul(hidden_ND, weight_DV, preferred_element_type=jnp.float32)
    top_N1 = logits_NV.max(-1, keepdims=True)
    exp_NV = jnp.exp(logits_NV - top_N1)
    sum_N1 = exp_NV.sum(-1, keepdims=True)
    target_NV = jax.nn.one_hot(target_N, logits_NV.shape[-1], dtype=bool)
    picked_N = jnp.where(target_NV, logits_NV, 0).sum(-1)
    loss_N = (jnp.log(sum_N1) + top_N1)[..., 0] - picked_N
    dlogits_NV = jnp.where(scored_N[..., None], exp_NV / sum_N1 - target_NV, 0)
    loss_N = jnp.where(scored_N, loss_N, 0)
    return dlogits_NV, loss_N


def _forward(weight_DV, hidden_BTD, target_BT, scored_BT, counted_BT, blocks: int):
    def add(carry, block):
        total_2, dweight_DV = carry
        *block, counted_N = block
        dlogits_NV, loss_N = _block(weight_DV, *block)
        small_NV = dlogits_NV.astype(weight_DV.dtype)
        axes = tuple(range(small_NV.ndim - 1))
        step_DV = jnp.tensordot(block[0], small_NV, (axes, axes))
        dweight_DV = dweight_DV + step_DV.astype(jnp.float32)
        return (total_2 + _both(loss_N, counted_N), dweight_DV), small_NV @ weight_DV.T

    start = (_zeros((2,), hidden_BTD), _zeros(weight_DV.shape, hidden_BTD))
    split = _split((hidden_BTD, target_BT, scored_BT, counted_BT), blocks)
    (total_2, dweight_DV), dhidden = jax.lax.scan(add, start, split)
    batch, _, width = hidden_BTD.shape
    dhidden_BTD = rearrange(dhidden.reshape(blocks, batch, -1, width), "s b t d -> b (s t) d")
    return total_2, (dweight_DV.astype(weight_DV.dtype), dhidden_BTD)


def _backward(blocks, saved, dtotal_2):
    dweight_DV, dhidden_BTD = saved
    scale = dtotal_2[0].astype(dweight_DV.dtype)
    return scale * dweight_DV, scale * dhidden_BTD, None, None, None


_blockwise.defvjp(_forward, _backward)


def _zeros(shape, like):
    """float32 zeros that differ between devices where `like` does."""
    return jnp.zeros_like(like, shape=shape, dtype=jnp.float32)


def _split(arrays, blocks: int):
    """(B, T, ...) as (blocks, B * T / blocks, ...): cut along T, so that sharded rows stay put."""
    if is_cut("length"):  # one block, as B and T
        return jax.tree.map(lambda a: a[None], arrays)

    def cut(a):
        return rearrange(a, "b (s t) ... -> s (b t) ...", s=blocks)

    return jax.tree.map(cut, arrays)
