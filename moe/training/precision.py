"""The types in which parameters and an optimizer's moments are kept between steps."""

import dataclasses
from typing import Any, Literal, NamedTuple
import zlib

import gin
import jax
import jax.numpy as jnp
import optax

from moe.model.functional import Arrays
from moe.training.optimizer import Parameters, is_matrix
from moe.training.rounding import mixed, stochastically

# Matrices of these roles may be kept in bfloat16: not routers, norms, or what is gathered by row.
LOW_ROLES = ("attention", "embedding", "expert", "feed_forward", "head", "latent")


class WithMasters(NamedTuple):
    """An optimizer's state beside the float32 parameters that it updates."""

    masters: Arrays
    optimizer: Any


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Precision:
    """What is kept in bfloat16 from step to step. Updates are always computed in float32.

    It concerns the matrices of attention, feed-forwards, experts, embedding and head; all other
    parameters, such as routers and norms, stay float32.

    Attributes:
        parameters: "float32"; "bfloat16", rounded stochastically after each update (4 bytes a
            parameter less, with its gradient); "masters", bfloat16 ones beside float32 ones, which
            the optimizer updates (2 bytes a parameter more; gradients are bfloat16).
        moments: of the optimizer: "float32", or "bfloat16", rounded stochastically (with AdamW
            4 bytes a parameter less).
    """

    parameters: Literal["float32", "bfloat16", "masters"] = "float32"
    moments: Literal["float32", "bfloat16"] = "float32"

    def stored(self, params: Arrays, declared: Parameters) -> Arrays:
        """Float32 parameters, arrays or their shapes, in the types in which they are kept."""
        return {name: _to(a, self._type(declared[name])) for name, a in params.items()}

    def _type(self, declared) -> Any:
        low = self.parameters != "float32" and is_low(declared)
        return jnp.bfloat16 if low else jnp.float32

    def init(self, optimizer, params: Arrays, declared: Parameters) -> tuple[Arrays, Any]:
        """The first parameters as they are kept, and the optimizer's first state.

        params: float32.
        """
        state = optimizer.init(params)
        state = self._kept_moments(state, params, declared, jnp.uint32(0))
        kept = self.stored(params, declared)
        if self.parameters == "masters":
            # Where nothing is rounded there is no second copy.
            state = WithMasters({n: a for n, a in params.items() if is_low(declared[n])}, state)
        return kept, state

    def update(
        self,
        optimizer: optax.GradientTransformationExtraArgs,
        grads: Arrays,
        state: Any,
        params: Arrays,
        declared: Parameters,
        seed: jax.Array,
        **given,
    ) -> tuple[Arrays, Any, Arrays]:
        """Parameters and optimizer state after an update, as they are kept; and the updates.

        Args:
            grads: in the types of the parameters, or float32.
            seed: uint32, another one in each step.
            given: further arguments of the optimizer.
        """
        masters = {}
        if self.parameters == "masters":
            masters, state = state
        before = {name: masters.get(name, a).astype(jnp.float32) for name, a in params.items()}
        wide = jax.tree.map(lambda a: a.astype(jnp.float32), grads)
        state = jax.tree.map(lambda a: a.astype(jnp.float32) if is_half(a) else a, state)
        updates: Any
        updates, state = optimizer.update(wide, state, before, **given)
        after: Any = optax.apply_updates(before, updates)
        state = self._kept_moments(state, after, declared, seed)
        if self.parameters == "bfloat16":
            kept = {
                name: stochastically(a, seed_of(name, seed)) if is_low(declared[name]) else a
                for name, a in after.items()
            }
            return kept, state, updates
        if self.parameters == "masters":
            state = WithMasters({name: after[name] for name in masters}, state)
        return self.stored(after, declared), state, updates

    @staticmethod
    def with_values(state: Any, params: Arrays) -> Any:
        """An optimizer's state whose masters, where it has any, have the values of parameters."""
        if not isinstance(state, WithMasters):
            return state
        return state._replace(masters={n: params[n].astype(jnp.float32) for n in state.masters})

    def _kept_moments(self, state: Any, params: Arrays, declared: Parameters, seed) -> Any:
        """The optimizer's state with arrays of a parameter's shape as they are kept."""
        if self.moments == "float32":
            return state

        def keep(path, leaf):
            keys = [getattr(p, "key", None) for p in path]
            name = next((key for key in reversed(keys) if key in declared), None)
            if name is None or not is_low(declared[name]) or leaf.shape != params[name].shape:
                return leaf
            return stochastically(leaf, seed_of(jax.tree_util.keystr(path), seed))

        return jax.tree_util.tree_map_with_path(keep, state)


def is_low(declared) -> bool:
    """Whether a parameter may be kept in bfloat16."""
    return declared.role in LOW_ROLES and is_matrix(declared.axes)


def is_half(a: jax.Array) -> bool:
    """Whether an array is bfloat16."""
    return a.dtype == jnp.bfloat16


def seed_of(name: str, seed: jax.Array) -> jax.Array:
    """A seed of its own for each array of a step."""
    return mixed(seed ^ jnp.uint32(zlib.crc32(name.encode())))


def _to(a, dtype) -> Any:
    if isinstance(a, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(a.shape, dtype)
    return a.astype(dtype)
