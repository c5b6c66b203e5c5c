"""Equal layers as one loop: a scan, whose depth costs no compile time, or unrolled.

L layers, B batch, T tokens, D model width.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.block import Block
from layers.kernels.choice import Choice
from layers.logical_axes import logical_constraint
from layers.mixture_of_depths import DepthBlock, blocks_of
from layers.moe_layer import MoELayer
from layers.remat import Remat, rematerialised
from layers.unrolled import loop_of, unrolled
from routing.inputs import Tokens
from routing.records import GlobalBatch, RouterOutput


class Unit(nnx.Module):
    """The blocks of one iteration of the scan, e.g. a dense one and then a sparse one."""

    def __init__(self, blocks: Sequence[Block | DepthBlock]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x_BTD: Float[Array, "B T D"], tokens: Tokens, first_layer, global_batch):
        """((x, last router's logits), (outputs of MoE routers, of Mixture-of-Depths routers)).

        first_layer: the number of the unit's first block in the model.
        """
        outputs, mod_outputs = [], []
        for j, block in enumerate(self.blocks):
            whole = global_batch[len(outputs)] if global_batch and block.is_moe else None
            x_BTD, output, *mod_output = block(x_BTD, tokens.for_layer(first_layer + j, whole))
            if output is not None:
                tokens = after(tokens, output)
                outputs.append(dataclasses.replace(output, logits_GTE=None))
            mod_outputs += mod_output
        return (x_BTD, tokens.context.previous_logits), (outputs, mod_outputs)


class Stack(nnx.Module):
    """`repeats` units, whose parameters are stacked along a leading layer axis.

    Args:
        make_blocks: makes the blocks of one unit.
        repeats: how many units.
        first_layer: number of the first layer in the model; initial values derive from it.
        remat: a name of `layers.remat.REMAT`.
        scan: False unrolls the loop; the result is the same. None: by `loop_of`.
    """

    def __init__(
        self,
        make_blocks: Callable[[], Sequence[Block | DepthBlock]],
        repeats: int,
        first_layer: int,
        remat: Remat = "none",
        scan: bool | None = None,
    ):
        self.repeats, self.first_layer, self.remat, self.scan = repeats, first_layer, remat, scan
        self.unit = Unit(make_blocks())
        self.length = len(self.unit.blocks)
        graphdef, state = nnx.split(self.unit)
        flat = [
            (path, self._stacked(path, variable)) for path, variable in nnx.to_flat_state(state)
        ]
        self.unit = nnx.merge(graphdef, nnx.from_flat_state(flat))

    def _stacked(self, path, variable):
        """A variable with a leading layer axis; its metadata number the layers in the model."""
        block = next(part for part in path if isinstance(part, int))
        layers = tuple(self.first_layer + block + self.length * i for i in range(self.repeats))
        value = jnp.zeros((self.repeats, *variable.shape), variable.dtype)
        return variable.replace(value, layers=layers)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens, global_batch: list[GlobalBatch] | None
    ):
        """Returns (x, last_logits, moe_outputs, mod_outputs); outputs are stacked over layers.

        last_logits are those of the last router, where a router of the model reads them.
        global_batch: for each sparse block of the unit, global-batch statistics stacked over
            repeats.
        """
        graphdef, state = nnx.split(self.unit)

        def body(carry, slices):
            x_BTD, logits_BTE = carry
            state, first_layer, global_batch = slices
            here = tokens.with_previous_logits(logits_BTE)
            return nnx.merge(graphdef, state)(x_BTD, here, first_layer, global_batch)

        scanned = self.loop.kernel == "scanned"
        body = rematerialised(body, self.remat, in_scan=scanned)
        start = (x_BTD, tokens.context.previous_logits)
        over_layers: Any = jax.lax.scan if scanned else unrolled
        first = self.first_layer + self.length * jnp.arange(self.repeats)
        carry, (outputs, mod_outputs) = over_layers(body, start, (state, first, global_batch))
        return *carry, in_layer_order(outputs), in_layer_order(mod_outputs)

    @property
    def loop(self) -> Choice:
        """Whether layers are "scanned" or "unrolled" on this program's platform, and why."""
        return loop_of(self.repeats, self.scan, self.remat)

    def update_router_state(self, stats_per_block) -> None:
        """Update every `StepState`, layer by layer, from statistics stacked over repeats."""
        if not any(layer.step_states() for layer in moe_layers(self.unit.blocks)):
            return
        graphdef, state = nnx.split(self.unit)

        def one(state, stats_per_block):
            unit = nnx.merge(graphdef, state)
            for layer, stats in zip(moe_layers(unit.blocks), stats_per_block, strict=True):
                for step_state in layer.step_states():
                    step_state.update(stats)
            return nnx.state(unit)

        nnx.update(self.unit, jax.vmap(one)(state, stats_per_block))


def after(tokens: Tokens, output: RouterOutput) -> Tokens:
    """The tokens, with the logits of a router that hands them to the next sparse layer."""
    if output.logits_GTE is None:
        return tokens
    logits_BTE = output.logits_GTE.reshape(*tokens.token_BT.shape, -1)
    return tokens.with_previous_logits(logical_constraint(logits_BTE, "batch", "length", None))


def moe_layers(blocks) -> list[MoELayer]:
    """The MoE layers of some blocks, in order."""
    found = [block.feed_forward for block in blocks_of(blocks)]
    return [layer for layer in found if isinstance(layer, MoELayer)]


def in_layer_order(outputs: list[RouterOutput]):
    """The outputs of all sparse blocks, stacked over layers; given is one stack per block."""
    if not outputs:
        return None

    def interleave(*leaves):
        stacked = jnp.stack(leaves, axis=1)
        return stacked.reshape(-1, *stacked.shape[2:])

    return jax.tree.map(interleave, *outputs)
