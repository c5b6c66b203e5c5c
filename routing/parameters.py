"""Parameters with logical axes, role and initializer, and `initialize`, which sets their values.

A module declares `parameter(shape, axes, init, role=...)`; `initialize(module, seed)` fills it.
Values depend on (seed, path, layer, expert) alone: not on the mesh, the order of construction, or
how layers are stacked for the scan.
"""

from collections.abc import Callable
import math
from typing import Literal, TypeVar, get_args
import zlib

from flax import nnx
import jax
import jax.numpy as jnp

M = TypeVar("M", bound=nnx.Module)
Init = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
# A parameter's role: FLOPs, weight decay, Muon and gradient norms read it, never names.
Role = Literal[
    "attention",
    "companion",
    "embedding",
    "expert",
    "feed_forward",
    "head",
    "latent",
    "norm",
    "position",
    "router",
]
ROLES = get_args(Role)
# Axes along which every index has a random key of its own.
KEYED_AXES = ("layer", "expert")


class _Filled(nnx.Variable):
    """A variable that raises ValueError when it is read before its values are set."""

    def __getitem__(self, key):
        if not self.get_metadata().get("filled", True):
            raise ValueError(
                "this module's parameters have no values yet: call routing.initialize(module, seed)"
                " first, which fills them in place"
            )
        return super().__getitem__(key)

    def set_value(self, value, **options):
        super().set_value(value, **options)
        if not self.get_metadata().get("filled", True):
            self.set_metadata(filled=True)


class Parameter(_Filled, nnx.Param):
    """A variable that the optimizer updates."""


class RouterState(_Filled):
    """A variable of a router that is saved with the model and never updated by the optimizer."""


def parameter(
    shape: tuple[int, ...], axes: tuple[str | None, ...], init: Init, *, role: Role
) -> nnx.Param:
    """A float32 parameter, whose values `initialize` sets.

    Args:
        shape: of the parameter.
        axes: a logical axis, or None, for each dimension.
        init: the initializer.
        role: one of `ROLES`.

    Raises:
        ValueError: role is none of `ROLES`.
    """
    assert len(shape) == len(axes), (shape, axes)
    if role not in ROLES:
        raise ValueError(f"parameter(role={role!r}): one of {', '.join(ROLES)}")
    values = jnp.zeros(shape, jnp.float32)
    return Parameter(values, axes=axes, init=init, role=role, filled=False)


def router_state(shape: tuple[int, ...], dtype, axes: tuple[str | None, ...], init: Init):
    """A variable of router state, whose values `initialize` sets."""
    assert len(shape) == len(axes), (shape, axes)
    return RouterState(jnp.zeros(shape, dtype), axes=axes, init=init, filled=False)


def zeros(key, shape, dtype):
    return jnp.zeros(shape, dtype)


def ones(key, shape, dtype):
    return jnp.ones(shape, dtype)


def normal(std: float) -> Init:
    """Normal with a given standard deviation."""

    def init(key, shape, dtype):
        return std * jax.random.normal(key, shape, dtype)

    return init


def truncated_normal(scale: float = 1.0, fan_in_axes: int = 1) -> Init:
    """Variance scale / fan_in, cut at two standard deviations (Fedus et al. 2021, section 2.4).

    Fan-in is the product of the first `fan_in_axes` dimensions (after layer and expert). As in the
    paper, the variance is that of the normal distribution before it is cut.
    """

    def init(key, shape, dtype):
        std = math.sqrt(scale / math.prod(shape[:fan_in_axes]))
        return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)

    return init


def uniform(bound: float) -> Init:
    """Uniform between -bound and bound."""

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def orthogonal(gain: float = 1.0) -> Init:
    """Orthonormal columns (rows, where there are more columns than rows) times a gain."""

    def init(key, shape, dtype):
        rows, columns = shape
        return gain * jax.random.orthogonal(key, rows, dtype=dtype, m=columns)

    return init


def initialize(module: M, seed: int | jax.Array) -> M:
    """Set every parameter and router state to its initial value, in place; return the module.

    Works under jit on a module that is made there.
    """
    root = jax.random.key(seed)
    _, state = nnx.split(module)

    def fill(path, variable):
        if not isinstance(variable, nnx.Param | RouterState):
            return variable
        meta = variable.get_metadata()
        name = "/".join(str(key) for key in path if not isinstance(key, int))
        key = jax.random.fold_in(root, zlib.crc32(name.encode()))
        value = _keyed(key, variable, meta["axes"], meta["init"], meta)
        return variable.replace(value, filled=True)

    flat = [(path, fill(path, variable)) for path, variable in nnx.to_flat_state(state)]
    nnx.update(module, nnx.from_flat_state(flat))
    return module


def _keyed(key, variable, axes, init, meta):
    """The initialiser, mapped over the layer and expert axes with a key for each index."""
    shape, dtype = variable.shape, variable.dtype
    axes = ("layer", *axes) if len(shape) == len(axes) + 1 else axes
    indices = []
    while axes and axes[0] in KEYED_AXES:
        numbers = meta.get("layers") if axes[0] == "layer" else None
        indices.append(jnp.arange(shape[0]) if numbers is None else jnp.asarray(numbers))
        axes, shape = axes[1:], shape[1:]

    def one(key):
        return init(key, shape, dtype)

    for index in reversed(indices):
        one = _over(index, one)
    return one(key)


def _over(index, one):
    return lambda key: jax.vmap(lambda i: one(jax.random.fold_in(key, i)))(index)
