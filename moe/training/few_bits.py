"""Formats of few bits: arrays rounded to their values, with a scale for each block, by qwix.

B values of a block, C columns.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from moe.errors import UserError

FORMATS = {"int8": 8, "int4": 4, "int2": 2, "nf4": 4, "fp8": 8}  # bits of a value
SCALE_BITS = 16  # a scale is a bfloat16


@jax.jit(static_argnums=(1, 2, 3))
def rounded(weight: jax.Array, name: str, axis: int, block: int) -> jax.Array:
    """A weight in a format, with a scale for each block along an axis."""
    quantize, dequantize = _library()
    stored = quantize(
        weight.astype(jnp.float32),
        _qwix_name(name),
        channelwise_axes=tuple(a for a in range(weight.ndim) if a != axis),
        tiled_axes={axis: block},
        scale_dtype=jnp.bfloat16,
    )
    exact = dataclasses.replace(stored, scale=stored.scale.astype(jnp.float32))
    return dequantize(exact).astype(weight.dtype)


def _qwix_name(name: str) -> str:
    """A format as qwix calls it."""
    return "float8_e4m3fn" if name == "fp8" else name


def require_library() -> None:
    """Raise UserError where the package that rounds is missing."""
    if importlib.util.find_spec("qwix") is None:
        raise UserError("weights in few bits need a package: pip install 'moe-routing[quantise]'")


def _library() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What rounds, and what gives floats back."""
    require_library()
    import qwix

    return qwix.quantize, qwix.dequantize


def scale_of(w_BC: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    """The scale of each column, (C,) float32: by which values are divided, and as it is kept."""
    quantize, _ = _library()
    scale_C = quantize(w_BC, _qwix_name(name), channelwise_axes=(1,)).scale[0]
    return scale_C, scale_C.astype(jnp.bfloat16).astype(jnp.float32)


def levels(x: jax.Array, name: str) -> jax.Array:
    """The nearest values of a format, in units of the scale."""
    quantize, dequantize = _library()
    bound = f"fixed,{largest(name)}"  # of which qwix makes a scale of 1
    return dequantize(quantize(x, _qwix_name(name), calibration_method=bound))


@functools.cache
def largest(name: str) -> float:
    """The largest value of a block, in units of its scale."""
    quantize, _ = _library()
    with jax.ensure_compile_time_eval():
        (scale,) = quantize(jnp.ones(1), _qwix_name(name)).scale
        return round(1 / float(scale), 2)
