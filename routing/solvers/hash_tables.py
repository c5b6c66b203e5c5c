"""The tables of hash routing: the expert of each token id (Roller et al. 2021, section 3).

A table is a value: called with a key and sizes, it returns the experts of all V ids.

V vocabulary, D width of an embedding, E experts.
"""

import abc
import dataclasses
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np

from routing.records import Sizes


class Table(abc.ABC):
    """Abstract: the expert of every token id."""

    @abc.abstractmethod
    def __call__(self, key: jax.Array, sizes: Sizes) -> jax.Array | np.ndarray:
        """The expert of every id: integers in [0, E), (V,)."""


@gin.configurable
@dataclasses.dataclass(frozen=True)
class RandomTable(Table):
    """An expert for every id, drawn uniformly."""

    def __call__(self, key, sizes):
        return jax.random.randint(key, (sizes.vocab_size,), 0, sizes.num_experts)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class BalancedTable(Table):
    """Ids by falling frequency, each to the expert with the fewest training tokens so far."""

    def __call__(self, key, sizes):
        return emptiest_first(sizes.training_text("BalancedTable").count_V, sizes.num_experts)


@dataclasses.dataclass(frozen=True)
class _OfEmbeddings(Table):
    """Abstract: a table from clusters of a model's embeddings.

    Attributes:
        embeddings: path of a .npy file, float (V, D).
    """

    embeddings: str


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ClusteredTable(_OfEmbeddings):
    """One expert for each k-means cluster of a model's embeddings."""

    def __call__(self, key, sizes):
        return clusters(self.embeddings, sizes)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class DispersedTable(_OfEmbeddings):
    """The ids of every k-means cluster spread evenly over the experts."""

    def __call__(self, key, sizes):
        return spread(clusters(self.embeddings, sizes), sizes.num_experts)


def emptiest_first(count_V: np.ndarray, num_experts: int) -> np.ndarray:
    """The expert of every id, int32 (V,), with counts balanced greedily; ties: the lowest index."""
    table_V = np.zeros(len(count_V), np.int32)
    load_E = np.zeros(num_experts, np.int64)
    for token in np.argsort(-count_V.astype(np.int64), kind="stable"):
        table_V[token] = expert = load_E.argmin()
        load_E[expert] += count_V[token]
    return table_V


def spread(cluster_V: np.ndarray, num_experts: int) -> np.ndarray:
    """The expert of every id, int32 (V,): id n of a cluster goes to expert n mod E."""
    table_V = np.zeros(len(cluster_V), np.int32)
    for cluster in np.unique(cluster_V):
        members = np.flatnonzero(cluster_V == cluster)
        table_V[members] = np.arange(len(members)) % num_experts
    return table_V


def clusters(embeddings: str, sizes: Sizes) -> np.ndarray:
    """The cluster of every id, int32 (V,), of E k-means clusters.

    Raises:
        ValueError: the file is missing, or holds no array (V, D).
    """
    from scipy.cluster import vq  # takes half a second to import

    if not Path(embeddings).is_file():
        raise ValueError(
            f"embeddings={embeddings!r} is no file; scripts/export_embeddings.py writes one from "
            "a run"
        )
    try:  # not np.load, which unpickles and unzips by the first bytes
        embedding_VD = np.lib.format.open_memmap(embeddings, mode="r")
    except Exception as error:  # a header is an expression: it fails in many ways
        first = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(f"embeddings={embeddings!r} is no .npy file: {first}") from None
    if embedding_VD.dtype.kind not in "fiu":
        raise ValueError(f"{embeddings} holds {embedding_VD.dtype}, not numbers")
    if embedding_VD.ndim != 2 or embedding_VD.shape[0] != sizes.vocab_size:
        raise ValueError(
            f"{embeddings} has shape {embedding_VD.shape}; it must be (vocabulary, width) with a "
            f"vocabulary of {sizes.vocab_size}"
        )
    # The same for every seed and layer, so that tables differ by their embeddings alone.
    _, cluster_V = vq.kmeans2(
        embedding_VD.astype(np.float64), sizes.num_experts, iter=30, minit="++", rng=0
    )
    return cluster_V.astype(np.int32)


def hash_bits(key: jax.Array) -> jax.Array:
    """A uint32 of which every bit depends on every bit of the key (MurmurHash3's finalizer)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        key = (key ^ (key >> shift)) * jnp.uint32(factor)
    return key ^ (key >> 16)
