"""Checksums of the bits that each device of a mesh holds of arrays.

P devices; N arrays, or words of one array.
"""

from collections.abc import Callable, Mapping
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

GOLDEN = np.uint32(0x9E3779B1)  # 2^32 over the golden ratio, odd: spreads neighbouring indices


def checksums(mesh: Mesh, arrays: Mapping[str, jax.Array]) -> np.ndarray:
    """(P, N): a checksum of the bits that each device holds of each array. Collective.

    Devices in the order of the mesh. A single changed number always changes the checksum; several
    ones leave it as it is once in 2^32.
    """
    specs = tuple(getattr(a.sharding, "spec", PartitionSpec()) for a in arrays.values())
    return np.asarray(_summing(mesh, specs)(*arrays.values()))


@functools.lru_cache(maxsize=8)
def _summing(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable:
    """The compiled function; every process receives all devices' checksums."""

    def local(*arrays):
        return jnp.stack([_checksum(a) for a in arrays])[None]

    each = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(mesh.axis_names), check_vma=False
    )
    return jax.jit(each, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _checksum(a: jax.Array) -> jax.Array:
    """The sum of all words times odd factors by their place, modulo 2^32, in any order."""
    word_N = _words(a).reshape(-1)
    factor_N = jax.lax.iota(jnp.uint32, word_N.size) * GOLDEN | np.uint32(1)
    return jnp.sum(word_N * factor_N, dtype=jnp.uint32)


def _words(a: jax.Array) -> jax.Array:
    """An array's bits, as numbers of 32."""
    if a.dtype == jnp.bool_:
        return a.astype(jnp.uint32)
    size = {1: jnp.uint8, 2: jnp.uint16}.get(a.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(a, size).astype(jnp.uint32)
