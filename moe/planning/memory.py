"""Memory of a training step on one device, counted from shapes: an estimate without the compiler.

D model width, F hidden width.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from layers.attention import Attention
from layers.block import Block
from layers.dispatch import Sorted
from layers.experts.feed_forward import GATED
from layers.kernels.attention import CUDNN_QUERIES
from layers.kernels.cross_entropy import ACCELERATOR_BLOCK_LOGITS
from layers.logical_axes import sharding_rules
from layers.mixture_of_depths import blocks_of
from layers.moe_layer import MoELayer
from layers.remat import rematerialised
from layers.stack import Stack, moe_layers
from moe.model import sharding
from moe.model.transformer import DTYPES
from moe.training.abstract_model import AbstractModel, abstract_tokens
from moe.training.train_step import Program

SCORE_BYTES = 10  # of an attention score: float32 twice, and once in the compute type


def step_bytes(
    model: AbstractModel, program: Program, sequences: int, accumulate: int, on: Any = None
) -> dict[str, int]:
    """Peak bytes of a training step on one device, by kind.

    Peak = state + parameters in the compute type + residuals (traced on one device's tokens) +
    max(gradients (twice with several micro-batches) and one layer's all-gathered weights and
    backward workspace, LM head with logits).

    On a mesh with a tensor or sequence axis, only the state is counted. Left out everywhere: the
    mixing weights of soft slots, and rows from other devices that a remat policy keeps.

    Args:
        model, program: of the run.
        sequences: in a micro-batch, over all devices.
        accumulate: micro-batches per step.
        on: the device to choose attention's kernel for; one of the mesh's where None.
    """
    module, state = model.module, program.abstract_state
    mesh, dtype = program.batch_sharding.mesh.shape, DTYPES[module.compute_dtype]
    parameters = sum(map(_on_one, state.params.values()))
    found = {
        "parameters": parameters,
        "optimizer": sum(map(_on_one, jax.tree.leaves(state.opt_state))),
        "router_state": sum(map(_on_one, jax.tree.leaves(state.router_state))),
    }
    if mesh["tensor"] > 1 or mesh["sequence"] > 1:
        return found
    small = jnp.dtype(dtype).itemsize
    shards = math.prod(mesh[axis] for axis in sharding.RULES["batch"])
    shape = (sequences // shards, model.sequence_length)
    # Of one device's tokens, so that no rule cuts them further.
    devices: Any = program.batch_sharding.mesh.devices
    with sharding_rules(None, on or devices.flat[0]):
        saved = sum(
            stack.repeats * _saved(stack, shape, module.d_model, dtype) for stack in module.stacks
        )
        layer = max(
            _gathered(state.params, f"stacks.{i}.", mesh, small) // stack.repeats
            + max(_working(b, model, mesh, shape, dtype) for b in blocks_of(stack.unit.blocks))
            for i, stack in enumerate(module.stacks)
        )
    logits = min(ACCELERATOR_BLOCK_LOGITS, math.prod(shape) * module.vocab_size)
    moments = (
        {"gradients": parameters * (1 if accumulate == 1 else 2), "one_layer": layer},
        # Before any other gradient exists: the logits, and the head with its gradient.
        {"head": 4 * logits + module.vocab_size * module.d_model * (small + 4)},
    )
    found |= {
        "parameters_in_compute_type": sum(
            _on_one(a) * small // 4 for a in state.params.values() if a.dtype.itemsize > small
        ),
        "saved_for_backward": saved,
        **max(moments, key=lambda moment: sum(moment.values())),
    }
    return found | {"total": sum(found.values())}


def _on_one(leaf) -> int:
    """Bytes of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _saved(stack: Stack, shape: tuple[int, int], width: int, dtype) -> int:
    """Bytes of residuals that one unit keeps from its forward to its backward pass.

    shape: sequences and tokens on one device.
    """
    graphdef, state = nnx.split(stack.unit)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), state)

    def forward(state, x_BTD, tokens):
        unit = nnx.merge(graphdef, state)
        for layer in moe_layers(unit.blocks):
            if isinstance(layer.dispatcher, Sorted) and layer.dispatcher.kernel == "auto":
                layer.dispatcher = dataclasses.replace(layer.dispatcher, kernel="ragged_dot")
        return unit(x_BTD, tokens, 0, None)[0][0]

    forward = rematerialised(forward, stack.remat)

    def residuals(state, x_BTD, tokens):
        return jax.vjp(lambda state, x_BTD: forward(state, x_BTD, tokens), state, x_BTD)[1]

    x_BTD: Any = jax.ShapeDtypeStruct((*shape, width), dtype)
    saved = jax.tree.leaves(jax.eval_shape(residuals, one, x_BTD, abstract_tokens(shape)))
    weights = [leaf.shape for leaf in jax.tree.leaves(one)]
    total = 0
    for leaf in saved:
        if leaf.shape in weights:  # counted with the parameters
            weights.remove(leaf.shape)
        elif not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            total += math.prod(leaf.shape) * leaf.dtype.itemsize
    return total


def _gathered(params, prefix: str, mesh: Mapping[str, int], small: int) -> int:
    """Bytes of a stack's weights, all-gathered over the fsdp axis, in the compute type.

    small: bytes of a number of that type. Gradients are reduce-scattered and need no such room.
    """
    count = 0
    for name, leaf in params.items():
        if name.startswith(prefix) and "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec)):
            count += math.prod(leaf.sharding.shard_shape(leaf.shape)) * mesh["fsdp"]
    return count * small


def _working(block: Block, model: AbstractModel, mesh, shape: tuple[int, int], dtype) -> int:
    """Bytes of a block's backward workspace: the larger one of attention and feed-forward."""
    rows = sum(_rows(block.feed_forward, model, mesh, math.prod(shape)))
    return max(_attention(block.attention, shape, dtype), jnp.dtype(dtype).itemsize * rows)


def _attention(attention: Attention, shape: tuple[int, int], dtype) -> int:
    """Bytes of attention's backward workspace: scores, or a kernel's eight arrays and its mask."""
    sequences, length = shape
    query = jax.ShapeDtypeStruct((*shape, *attention.query_DHK.shape[-2:]), dtype)
    kernel = attention.chosen_kernel(query).kernel
    if kernel == "chunks":
        queries = min(length, attention.chunk or length)
        return SCORE_BYTES * sequences * query.shape[2] * queries * length
    mask = sequences * min(length, CUDNN_QUERIES) * length if kernel == "cudnn" else 0
    return query.dtype.itemsize * (8 * query.size + mask)


def _rows(layer, model: AbstractModel, mesh, tokens: int) -> Iterator[int]:
    """Numbers in a feed-forward's backward workspace, of its shared expert and its experts in turn.

    A row at its expert counts 4 D (input, output and their gradients), with `Sorted` 3 D, since no
    output is kept, and F for each array around the activation; a row in a send buffer counts 2 D
    (itself and its gradient).
    """
    width = model.module.d_model
    if not isinstance(layer, MoELayer):
        yield tokens * (4 * width + _arrays(layer.activation) * layer.up_DF.shape[-1])
        return
    for companion in layer.companions:
        if companion.hidden_width:
            arrays = _arrays(companion.activation)
            yield tokens * (4 * width + arrays * companion.hidden_width)
    sent = round(tokens * model.costs.rows_per_token)
    of_a_row = 3 if isinstance(layer.dispatcher, Sorted) else 4
    if isinstance(layer.dispatcher, Sorted):
        devices, dispatcher = mesh["expert"], layer.dispatcher
        received = devices * dispatcher.most_rows(sent, devices)
        if dispatcher.buffer is not None and dispatcher.overflow == "exact" and devices > 1:
            received += devices * sent  # overflow has room for all rows
    elif layer.capacity.factor is None:
        received = tokens * layer.num_experts
    else:
        received = min(round(sent * layer.capacity.factor), tokens * layer.num_experts)
    experts = layer.experts
    width = experts.row_width or width
    hidden = _arrays(experts.activation) * experts.hidden_width
    yield 2 * sent * width + received * (of_a_row * width + hidden)


def _arrays(activation: str) -> int:
    """Arrays of hidden width in the backward pass: around the activation, and their gradients."""
    return 6 if activation in GATED else 4
