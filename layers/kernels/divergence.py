"""The divergence of a student's next-token distribution from a teacher's, block by block.

As in `cross_entropy`, the logits of a block of tokens alone are held, here of both models.

B batch, T tokens, D model width (the teacher's may be another one), V vocabulary, N tokens of a
block, which keeps the two axes B and T where a mesh shards T.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from layers.kernels.cross_entropy import (
    num_blocks,
    split_tokens,
    sums_and_gradients,
    zeros_along,
)
from layers.logical_axes import is_cut, per_shard
from routing.records import AnyArray


def divergence_sum(
    weight_DV: Float[Array, "D V"],
    hidden_BTD: Float[Array, "B T D"],
    teacher_weight_DV: Float[Array, "Dt V"],
    teacher_hidden_BTD: Float[Array, "B T Dt"],
    scored_BT: Bool[AnyArray, "B T"],
    temperature: Float[AnyArray, ""] | float,
) -> Float[Array, ""]:
    """temperature^2 * KL(teacher || student) in nats, summed over scored tokens; float32.

    Both distributions are softmaxes of logits / temperature; the factor keeps the gradients' size
    (Hinton et al. 2015, arXiv 1503.02531, section 2). Equivalent, for softened logits s and t, to:
    temperature^2 * (softmax(t) * (log_softmax(t) - log_softmax(s))).sum(-1), summed where scored.
    Only the student has a gradient. Where the mesh shards the vocabulary or T, there is a single
    block.

    Args:
        weight_DV, teacher_weight_DV: output weights, for the same vocabulary.
        hidden_BTD, teacher_hidden_BTD: representations after the last norm, of the same tokens.
        scored_BT: which tokens the sum is over.
        temperature: above 0.
    """
    student = weight_DV.astype(hidden_BTD.dtype), hidden_BTD
    teacher = teacher_weight_DV.astype(teacher_hidden_BTD.dtype), teacher_hidden_BTD
    (teacher_weight_DV, teacher_hidden_BTD) = jax.lax.stop_gradient(teacher)
    temperature = jnp.asarray(temperature, jnp.float32)
    weights = student[0], teacher_weight_DV, temperature
    arrays = hidden_BTD, teacher_hidden_BTD, jnp.asarray(scored_BT)
    if is_cut("vocab") or is_cut("length"):
        return _blockwise(weights, arrays, 1)

    def one_shard(hidden_BTD, teacher_hidden_BTD, scored_BT, *weights):
        blocks = num_blocks(scored_BT.shape, weights[0].shape[1])
        tokens = hidden_BTD, teacher_hidden_BTD, scored_BT
        total: Any = _blockwise(weights, tokens, blocks)
        return total[None]

    axes = (("embed", "vocab"), ("embed", "vocab"), ())
    return per_shard(one_shard, arrays, weights, axes).sum(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _blockwise(weights, tokens, blocks: int):
    def add(total, block):
        return total + _block(*weights, *block)[1], None

    return jax.lax.scan(add, zeros_along((), tokens[0]), split_tokens(tokens, blocks))[0]


def _block(weight_DV, teacher_weight_DV, temperature, hidden, teacher_hidden, scored):
    """The gradient of a block's sum by the student's logits (N, V), and the sum; float32."""

    def log_prob(hidden, weight_DV):
        logits = jnp.matmul(hidden, weight_DV, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(logits / temperature)

    student, teacher = log_prob(hidden, weight_DV), log_prob(teacher_hidden, teacher_weight_DV)
    teacher_prob = jnp.exp(teacher)
    each = jnp.square(temperature) * (teacher_prob * (teacher - student)).sum(-1)
    dlogits = temperature * (jnp.exp(student) - teacher_prob)
    return jnp.where(scored[..., None], dlogits, 0), jnp.where(scored, each, 0).sum()


def _forward(weights, tokens, blocks: int):
    return sums_and_gradients(functools.partial(_block, *weights), (), weights[0], tokens, blocks)


def _backward(blocks, saved, dtotal):
    dweight_DV, dhidden_BTD = saved
    scale = dtotal.astype(dweight_DV.dtype)
    return (scale * dweight_DV, None, None), (scale * dhidden_BTD, None, None)


_blockwise.defvjp(_forward, _backward)
