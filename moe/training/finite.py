"""Which arrays of a state hold values that are not finite."""

import jax
import jax.numpy as jnp

from moe.errors import UserError


class TrainingDiverged(UserError):
    """The loss, its gradient, an update or a value of the state is no longer a number."""


def not_finite(arrays: dict[str, jax.Array]) -> list[str]:
    """A line for each array that holds NaN or infinity; empty where all are finite. Collective.

    Each array is read once, on its devices; only the faulty ones are looked at again.

    Returns:
        Such as `params.embedding_VD: 3 of 4,096 values, the first in row 17`. A row is an index
        of the array's first axis: a layer, where equal layers are stacked.
    """
    floats = {n: a for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    broken = jax.device_get(_broken(floats))
    lines = []
    for name, a in floats.items():
        if broken[name]:
            count, row = jax.device_get(_where(a))
            where = f", the first in {'layer' if '.unit.' in name else 'row'} {row}"
            lines.append(f"{name}: {count:,} of {a.size:,} values{where if a.ndim else ''}")
    return lines


def in_words(lines: list[str], most: int = 3) -> str:
    """The first lines of `not_finite`, in one."""
    return "; ".join(lines[:most]) + (
        f"; and {len(lines) - most} more arrays" if len(lines) > most else ""
    )


@jax.jit
def _broken(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: ~jnp.isfinite(a).all() for name, a in arrays.items()}


@jax.jit
def _where(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    bad = ~jnp.isfinite(a)
    row = jnp.argmax(bad.any(axis=tuple(range(1, a.ndim)))) if a.ndim else jnp.int32(0)
    return bad.sum(), row
