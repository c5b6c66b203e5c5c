"""Second-order rounding of a whole model: one layer after the other, each by its own inputs.

A layer's inputs are those that come out of the rounded layers before it. B sequences, T tokens, D
model width.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.dispatch import SlotGather
from layers.logical_axes import sharding_rules
from layers.mixture_of_depths import DepthBlock
from layers.moe_layer import MoELayer
from layers.stack import after
from moe.inference.gptq import second_order
from moe.inference.second_moments import Moments, with_moments
from moe.model import functional, sharding
from moe.model.functional import Arrays, Declared, Graph
from moe.training.quantisation import Quantisation, matrices_shape
from routing.inputs import Tokens


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a stack: block is its graph, names its arrays' in the model, by their own."""

    block: Graph
    names: dict[str, str]
    index: int  # in the stack

    @property
    def declared(self) -> dict[str, Declared]:
        """Of its parameters, without the axis of layers."""
        return {n: d._replace(axes=d.axes[1:]) for n, d in self.block.declared.items()}


@dataclasses.dataclass
class Calibrated:
    """Parameters that were rounded with inputs.

    Attributes:
        params: all of them.
        nearest: those that were rounded without, since no matmul of a layer sums over their rows.
        starved: by layer, how many experts got fewer tokens than they have inputs.
    """

    params: Arrays
    nearest: list[str]
    starved: dict[int, int]


def calibrated(
    how: Quantisation,
    graph: Graph,
    stacks,
    params: Arrays,
    router_state: Arrays,
    batches: Sequence[Tokens],
    mesh: jax.sharding.Mesh | None,
) -> Calibrated:
    """The parameters, rounded layer by layer with what these tokens bring as inputs.

    Within a layer all weights are rounded by inputs that its own float weights bring.

    Args:
        how: the format and the weights.
        graph, stacks, params, router_state: of the model.
        batches: the tokens, as at evaluation.
        mesh: that of the parameters; None for one device.

    Raises:
        UserError: as `Quantisation.check`.
    """
    declared = graph.declared
    how.check(params, declared)
    before, found = params, Calibrated(how(params, declared), how.chosen(declared), {})
    rule = (sharding.rule(mesh), mesh.devices.flat[0]) if mesh is not None else (None, None)
    with sharding_rules(*rule):
        embed = jax.jit(lambda p, tokens: graph.merge(p, router_state).embedded(tokens))
        flowing = [embed(found.params, tokens) for tokens in batches]
        compiled: dict[int, Any] = {}
        for number, layer in enumerate(list(layers_of(stacks))):  # graphs live on: each has an id
            observe, pass_on = compiled.setdefault(id(layer.block), programs(layer))
            own = taken(layer, before | router_state)
            moments = _observed(observe, own, flowing, number)
            _round_layer(how, layer, number, own, moments, found)
            now = taken(layer, found.params | router_state)
            flowing = [pass_on(now, x_BTD, tokens, number) for x_BTD, tokens in flowing]
    return found


def layers_of(stacks) -> Iterator[Layer]:
    """The layers of a model, from the first to the last."""
    for s, stack in enumerate(stacks):
        blocks = [functional.split(block)[0] for block in stack.unit.blocks]
        for i in range(stack.repeats):
            for j, block in enumerate(blocks):
                prefix = f"stacks.{s}.unit.blocks.{j}."
                yield Layer(block, {name: prefix + name for name in block.paths}, i)


def taken(layer: Layer, everything: Arrays) -> Arrays:
    """A layer's own arrays."""
    return {name: everything[whole][layer.index] for name, whole in layer.names.items()}


def programs(layer: Layer):
    """Jitted (what `_passed` returns, moments) and `_passed` of a layer's arrays."""

    @jax.jit
    def observe(values, x_BTD, tokens, number):
        params = {name: values[name] for name in layer.declared}
        state = {name: a for name, a in values.items() if name not in params}

        def pass_on(params, x_BTD, tokens):
            return _passed(layer.block, params | state, x_BTD, tokens, number)

        return with_moments(pass_on, params, layer.declared, x_BTD, tokens)[1]

    return observe, jax.jit(functools.partial(_passed, layer.block))


def _passed(block: Graph, values: Arrays, x_BTD, tokens: Tokens, number):
    """x after a layer, and the tokens with what the next layer reads of them."""
    layer = block.merge(values, {})
    feed_forward = (layer.block if isinstance(layer, DepthBlock) else layer).feed_forward
    if isinstance(feed_forward, MoELayer) and not feed_forward.eval_dispatcher.needs_slots:
        feed_forward.eval_dispatcher = SlotGather()  # which shows each expert's inputs
    x_BTD, output, *_ = layer(x_BTD, tokens.for_layer(number, None))
    return x_BTD, tokens if output is None else after(tokens, output)


def _observed(observe, values: Arrays, flowing, number: int) -> dict[str, Moments]:
    """A layer's moments over all batches."""
    total: dict[str, Moments] = {}
    for x_BTD, tokens in flowing:
        found = observe(values, x_BTD, tokens, number)
        total = jax.tree.map(jnp.add, total, found) if total else found
    return total


def _round_layer(
    how: Quantisation,
    layer: Layer,
    number: int,
    values: Arrays,
    moments: dict[str, Moments],
    found: Calibrated,
) -> None:
    """Round a layer's weights into the parameters that were found."""
    chosen = set(how.chosen(layer.declared)) & set(moments)
    for name in sorted(chosen):
        weight, whole, (hessian_SRR, inputs_S) = values[name], layer.names[name], moments[name]
        shape = matrices_shape(weight.shape, layer.declared[name])
        w_SRC = weight.reshape(shape).astype(jnp.float32)
        q_SRC = second_order(w_SRC, hessian_SRR, inputs_S, how.format, how.block_of(shape[1]))
        rounded = q_SRC.reshape(weight.shape).astype(weight.dtype)
        found.params[whole] = found.params[whole].at[layer.index].set(rounded)
        if whole in found.nearest:
            found.nearest.remove(whole)
        starved = int((np.asarray(inputs_S) < shape[1]).sum())
        if starved and layer.declared[name].role == "expert":
            found.starved[number] = max(starved, found.starved.get(number, 0))
