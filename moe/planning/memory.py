"""What a training step holds on one device, by counting: an estimate where no compiler is at hand.

D model width, F hidden width.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from layers.block import Block
from layers.dispatch import Sorted
from layers.experts.feed_forward import GATED
from layers.kernels.cross_entropy import ACCELERATOR_BLOCK_LOGITS
from layers.mixture_of_depths import blocks_of
from layers.moe_layer import MoELayer
from layers.stack import Stack, moe_layers, rematerialised
from moe.model import sharding
from moe.model.transformer import DTYPES
from moe.training.abstract_model import AbstractModel, abstract_tokens
from moe.training.train_step import Program

SCORE_BYTES = 10  # of an attention score: float32 twice, and once in the compute type


def step_bytes(
    model: AbstractModel, program: Program, sequences: int, accumulate: int
) -> dict[str, int]:
    """Bytes by kind on one device at the fullest moment of a step.

    A program keeps, beside its state, the parameters in the compute type and what each layer saves
    for its backward pass (its residuals, traced on one device's tokens); then the gradients (twice
    with several micro-batches). One layer at a time has its weights put together from fsdp's parts,
    and what its own backward pass works with. Or the head is the fullest moment.

    Only the state where a tensor or sequence axis cuts what a layer works with. Not counted: what
    mixes tokens into soft slots, and rows from other devices that a remat policy keeps.

    sequences: of a micro-batch, on all devices.
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
    saved = sum(
        stack.repeats * _saved(stack, shape, module.d_model, dtype) for stack in module.stacks
    )
    layer = max(
        _gathered(state.params, f"stacks.{i}.", mesh, small) // stack.repeats
        + max(_working(block, model, mesh, shape, small) for block in blocks_of(stack.unit.blocks))
        for i, stack in enumerate(module.stacks)
    )
    logits = min(ACCELERATOR_BLOCK_LOGITS, math.prod(shape) * module.vocab_size)
    moments = (
        {"gradients": parameters * (1 if accumulate == 1 else 2), "one_layer": layer},
        # Before there is any gradient: logits, and the head with its own.
        {"head": 4 * logits + module.vocab_size * module.d_model * (small + 4)},
    )
    found |= {
        "parameters_in_compute_type": parameters * small // 4 if small < 4 else 0,
        "saved_for_backward": saved,
        **max(moments, key=lambda moment: sum(moment.values())),
    }
    return found | {"total": sum(found.values())}


def _on_one(leaf) -> int:
    """Bytes of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _saved(stack: Stack, shape: tuple[int, int], width: int, dtype) -> int:
    """What one unit keeps between its forward and its backward pass."""
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
    kept = jax.tree.leaves(jax.eval_shape(residuals, one, x_BTD, abstract_tokens(shape)))
    weights = [leaf.shape for leaf in jax.tree.leaves(one)]
    total = 0
    for leaf in kept:
        if leaf.shape in weights:  # they are there anyway
            weights.remove(leaf.shape)
        elif not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            total += math.prod(leaf.shape) * leaf.dtype.itemsize
    return total


def _gathered(params, prefix: str, mesh: Mapping[str, int], small: int) -> int:
    """A stack's weights, put together from fsdp's parts, in the compute type.

    Their gradients are added up in parts, as they come.
    """
    count = 0
    for name, leaf in params.items():
        if name.startswith(prefix) and "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec)):
            count += math.prod(leaf.sharding.shard_shape(leaf.shape)) * mesh["fsdp"]
    return count * small


def _working(block: Block, model: AbstractModel, mesh, shape: tuple[int, int], small: int) -> int:
    """What a block's backward pass works with, attention or feed-forward, whichever is more."""
    attention, sequences = block.attention, shape[0]
    queries = min(shape[1], attention.chunk or shape[1])
    scores = SCORE_BYTES * sequences * attention.query_DHK.shape[-2] * queries * shape[1]
    return max(scores, small * sum(_rows(block.feed_forward, model, mesh, math.prod(shape))))


def _rows(layer, model: AbstractModel, mesh, tokens: int) -> Iterator[int]:
    """How many numbers a feed-forward works with: rows of width D and of hidden width F.

    Of a row at its expert: what goes in and comes out and their gradients; on its way: a copy of
    it and of its gradient. Of hidden units: before and after the activation, and the gradients.
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
    if isinstance(layer.dispatcher, Sorted):
        devices, dispatcher = mesh["expert"], layer.dispatcher
        came = devices * dispatcher.most_rows(sent, devices)
        if dispatcher.buffer is not None and dispatcher.overflow == "exact" and devices > 1:
            came += devices * sent  # the second exchange has room for all
    elif layer.capacity.factor is None:
        came = tokens * layer.num_experts
    else:
        came = min(round(sent * layer.capacity.factor), tokens * layer.num_experts)
    experts = layer.experts
    width = experts.row_width or width
    hidden = _arrays(experts.activation) * experts.hidden_width
    yield 2 * sent * width + came * (4 * width + hidden)


def _arrays(activation: str) -> int:
    return 6 if activation in GATED else 4
