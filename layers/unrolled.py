"""A loop over layers without a scan, whose gradients are written into place.

L layers.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from layers.kernels.choice import Choice
from layers.logical_axes import platform

# Unrolled, so many are as fast to compile as scanned.
FEW = 8


def loop_of(repeats: int, scan: bool | None, remat: str = "none") -> Choice:
    """Whether so many equal layers are "scanned" or "unrolled", and why.

    An accelerator copies every layer's slices out of stacked arrays in a scan, and their gradients
    back; a CPU steps as fast, and compiles one body faster than several.

    scan, remat: as in `Transformer`.
    """
    if scan is not None:
        return Choice("scanned" if scan else "unrolled", "as set")
    if platform() == "cpu":
        return Choice("scanned", f"{repeats}, compiled as one, and a CPU steps as fast")
    if repeats > FEW:
        return Choice("scanned", f"{repeats} would take long to compile, {FEW} would not")
    if remat != "none":  # barriers around what is computed again copy every slice, too
        return Choice("scanned", f"{repeats}, and remat = {remat!r}")
    return Choice("unrolled", f"only {repeats}, and a scan would copy their slices")


def unrolled(body, carry, slices) -> Any:
    """As lax.scan(body, carry, slices), with the body once for each layer."""
    results = []
    for layer in range(jax.tree.leaves(slices)[0].shape[0]):
        flat, tree = jax.tree.flatten(slices)
        taken: list[Any] = [_take(a, layer) for a in flat]
        slices = tree.unflatten([rest for _, rest in taken])
        carry, result = body(carry, tree.unflatten([one for one, _ in taken]))
        results.append(result)
    return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *results)


def _take(stacked, layer: int) -> Any:
    """The layer's slice, and the array to take the next layers' from."""
    if not jnp.issubdtype(stacked.dtype, jnp.inexact):
        return stacked[layer], stacked
    return _taken(stacked, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _taken(stacked, layer: int) -> Any:
    """(stacked[layer], stacked), of which no other slice of this layer may be taken.

    So the gradient of each slice is written into that of the stack, from the last layer on. The sum
    of the slices' gradients would be compiled as their concatenation: one more pass.
    """
    return stacked[layer], stacked


def _forward(stacked, layer: int):
    return _taken(stacked, layer), None


def _backward(layer: int, _, gradients):
    one, rest = gradients
    return (lax.dynamic_update_slice(rest, one[None], (layer, *(0 for _ in one.shape))),)


_taken.defvjp(_forward, _backward)
