"""What a training step holds on one device, by counting: an estimate where no compiler is at hand.

t tokens of a device, D model width, F hidden width, K experts per token.
"""

from collections.abc import Iterator
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from layers.block import Block
from layers.cross_entropy import ACCELERATOR_BLOCK_LOGITS
from layers.depths import blocks_of
from layers.dispatch import Sorted
from layers.feed_forward import GATED
from layers.moe_layer import MoELayer
from layers.stack import Stack, rematerialised
from layers.tokens import Tokens
from moe import sharding
from moe.assemble import Model
from moe.model import DTYPES
from moe.step import Program

SCORE_BYTES = 10  # of an attention score: float32 twice, and once in the compute type


def step_bytes(
    model: Model, program: Program, mesh: dict[str, int], sequences: int, accumulate: int
) -> dict[str, int]:
    """Bytes by kind on one device at the fullest moment of a step, which is some layer's backward.

    A program keeps, beside its state: the gradients (twice with several micro-batches), the
    parameters in the compute type, and what each layer saves for its backward pass (exact, from
    the shapes of its residuals). One layer at a time holds its weights put together from fsdp's
    parts, with their gradients, and what its own backward pass works with.

    sequences: of a micro-batch, on all devices.
    """
    module, state = model.module, program.abstract_state
    dtype = DTYPES[module.compute_dtype]
    held = {name: _on_one(leaf) for name, leaf in state.params.items()}
    parameters = sum(held.values())
    optimizer = sum(map(_on_one, jax.tree.leaves(state.opt_state)))
    small = jnp.dtype(dtype).itemsize
    shards = math.prod(mesh[axis] for axis in sharding.RULES["batch"])
    shape = (sequences // shards, model.sequence_length // mesh["sequence"])
    saved = sum(
        stack.repeats * _saved(stack, shape, module.d_model, dtype) for stack in module.stacks
    )
    layer = max(
        _gathered(state.params, f"stacks.{i}.", mesh, small) // stack.repeats
        + max(_working(block, model, mesh, shape, small) for block in _blocks(stack))
        for i, stack in enumerate(module.stacks)
    )
    logits = min(ACCELERATOR_BLOCK_LOGITS, math.prod(shape) * module.vocab_size)
    head = SCORE_BYTES * logits + module.vocab_size * module.d_model * (small + 4)
    found = {
        "parameters": parameters,
        "optimizer": optimizer + sum(map(_on_one, jax.tree.leaves(state.router_state))),
        "gradients": parameters * (1 if accumulate == 1 else 2),
        "parameters_in_compute_type": parameters * small // 4 if small < 4 else 0,
        "saved_for_backward": saved,
        "one_layer": max(layer, head),
    }
    return found | {"total": sum(found.values())}


def _on_one(leaf) -> int:
    """Bytes of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _blocks(stack: Stack) -> list[Block]:
    return blocks_of(stack.unit.blocks)


def _saved(stack: Stack, shape: tuple[int, int], width: int, dtype) -> int:
    """What one unit keeps between its forward and its backward pass."""
    graphdef, state = nnx.split(stack.unit)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), state)

    def forward(state, x_BTD, tokens):
        (x_BTD, _), _ = nnx.merge(graphdef, state)(x_BTD, tokens, 0, None)
        return x_BTD

    forward = rematerialised(forward, stack.remat)

    def residuals(state, x_BTD, tokens):
        return jax.vjp(lambda state, x_BTD: forward(state, x_BTD, tokens), state, x_BTD)[1]

    x_BTD: Any = jax.ShapeDtypeStruct((*shape, width), dtype)
    kept = jax.tree.leaves(jax.eval_shape(residuals, one, x_BTD, _tokens(shape)))
    weights = [leaf.shape for leaf in jax.tree.leaves(one)]
    total = 0
    for leaf in kept:
        if leaf.shape in weights:  # they are there anyway
            weights.remove(leaf.shape)
        elif not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            total += math.prod(leaf.shape) * leaf.dtype.itemsize
    return total


def _tokens(shape: tuple[int, int]) -> Tokens:
    integers: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    index_B: Any = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Tokens(integers, integers, integers, index_B, key, train=True)


def _gathered(params, prefix: str, mesh: dict[str, int], small: int) -> int:
    """Weights of a stack whole along fsdp, in the compute type, with gradients in float32."""
    if mesh["fsdp"] == 1:
        return 0
    count = 0
    for name, leaf in params.items():
        if name.startswith(prefix):
            cut = {axis for part in leaf.sharding.spec if part for axis in part}
            whole = mesh["fsdp"] if "fsdp" in cut else 1
            count += math.prod(leaf.sharding.shard_shape(leaf.shape)) * whole
    return count * (small + 4)


def _working(block: Block, model: Model, mesh, shape: tuple[int, int], small: int) -> int:
    """What a block's backward pass works with, attention or feed-forward, whichever is more."""
    attention, sequences = block.attention, shape[0]
    heads = attention.query_DHK.shape[-2] // mesh["tensor"]
    queries = min(shape[1], attention.chunk or shape[1])
    scores = SCORE_BYTES * sequences * heads * queries * model.sequence_length
    return max(scores, small * sum(_rows(block.feed_forward, model, mesh, math.prod(shape))))


def _rows(layer, model: Model, mesh, tokens: int) -> Iterator[int]:
    """Numbers at work in a feed-forward: six times every row, and every hidden unit twice.

    Rows: what goes in and comes out, their gradients, and a copy of each on its way. Hidden
    units: before and after the activation, and the gradients.
    """
    width = model.module.d_model
    if not isinstance(layer, MoELayer):
        hidden = layer.up_DF.shape[-1] // mesh["tensor"]
        yield tokens * (6 * width + _arrays(layer.activation) * hidden)
        return
    if layer.shared is not None:
        yield from _rows(layer.shared, model, mesh, tokens)
    rows = round(tokens * model.costs.experts_per_token)
    if isinstance(layer.dispatcher, Sorted):
        devices = mesh["expert"]
        rows = devices * layer.dispatcher.most_rows(rows, devices)
    elif layer.capacity.factor is None:
        rows = tokens * layer.num_experts
    else:
        rows = round(rows * layer.capacity.factor)
    experts = layer.experts
    hidden = getattr(experts, "up_EDF", None)
    hidden = 0 if hidden is None else hidden.shape[-1] // mesh["tensor"]
    yield rows * (6 * width + _arrays(getattr(experts, "activation", "relu")) * hidden)


def _arrays(activation: str) -> int:
    return 6 if activation in GATED else 4
