"""The tables of hash routing: which expert each token id goes to (Roller et al. 2021, section 3).

V vocabulary, D width of an embedding, E experts.
"""

from pathlib import Path

import gin
import jax
import numpy as np

from routing.records import Sizes


@gin.configurable
def random_table(key: jax.Array, sizes: Sizes) -> jax.Array:
    """Every id to an expert drawn uniformly."""
    return jax.random.randint(key, (sizes.vocab_size,), 0, sizes.num_experts)


@gin.configurable
def balanced_table(key: jax.Array, sizes: Sizes) -> np.ndarray:
    """The most frequent id first, each to the expert with the least of the training text so far."""
    return emptiest_first(sizes.training_text("balanced_table").count_V, sizes.num_experts)


@gin.configurable
def clustered_table(key: jax.Array, sizes: Sizes, embeddings: str = "") -> np.ndarray:
    """One expert for each k-means cluster of a model's embeddings: a .npy file (V, D)."""
    return clusters(sizes, embeddings)


@gin.configurable
def dispersed_table(key: jax.Array, sizes: Sizes, embeddings: str = "") -> np.ndarray:
    """The members of every k-means cluster spread evenly over the experts: the opposite."""
    return spread(clusters(sizes, embeddings), sizes.num_experts)


def emptiest_first(count_V: np.ndarray, num_experts: int) -> np.ndarray:
    """A greedy balance of the counts over the experts; ties: the lowest id, the lowest expert."""
    table_V = np.zeros(len(count_V), np.int32)
    load_E = np.zeros(num_experts, np.int64)
    for token in np.argsort(-count_V.astype(np.int64), kind="stable"):
        table_V[token] = expert = load_E.argmin()
        load_E[expert] += count_V[token]
    return table_V


def spread(cluster_V: np.ndarray, num_experts: int) -> np.ndarray:
    """Inside each cluster, member number n goes to expert n mod E."""
    table_V = np.zeros(len(cluster_V), np.int32)
    for cluster in np.unique(cluster_V):
        members = np.flatnonzero(cluster_V == cluster)
        table_V[members] = np.arange(len(members)) % num_experts
    return table_V


def clusters(sizes: Sizes, embeddings: str) -> np.ndarray:
    """E clusters of the embeddings of all V ids.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    from scipy.cluster import vq  # half a second, for these tables alone

    if not Path(embeddings).is_file():
        raise ValueError(
            f"embeddings={embeddings!r} is no file; scripts/export_embeddings.py writes one from "
            "a run"
        )
    embedding_VD = np.load(embeddings)
    if embedding_VD.ndim != 2 or embedding_VD.shape[0] != sizes.vocab_size:
        raise ValueError(
            f"{embeddings} has shape {embedding_VD.shape}; it must be (vocabulary, width) with a "
            f"vocabulary of {sizes.vocab_size}"
        )
    # The same for every seed and layer: the embeddings are what differs between two tables.
    _, cluster_V = vq.kmeans2(
        embedding_VD.astype(np.float64), sizes.num_experts, iter=30, minit="++", rng=0
    )
    return cluster_V.astype(np.int32)
