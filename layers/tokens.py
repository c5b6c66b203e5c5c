"""What a block knows of its tokens beside their representations. B batch, T tokens."""

from collections.abc import Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from layers.constrain import constrain
from routing.records import GlobalBatch, RouterOutput


@nnx.dataclass
class Tokens(nnx.Pytree):
    """segment_BT is 0 for padding; index_B numbers the sequences of the whole optimizer step.

    key names seed, step and, inside a block, the layer. global_batch is set in micro-batches whose
    losses need the statistics of the whole optimizer step. logits_BTE are the router's logits in
    the sparse layer before, where the router reads them; None means zero.
    """

    token_BT: Int[Array, "B T"] = nnx.data()
    segment_BT: Int[Array, "B T"] = nnx.data()
    position_BT: Int[Array, "B T"] = nnx.data()
    index_B: Int[Array, " B"] = nnx.data()
    key: Key[Array, ""] = nnx.data()
    train: bool = nnx.static()
    global_batch: GlobalBatch | None = nnx.data(default=None)
    logits_BTE: Float[Array, "B T E"] | None = nnx.data(default=None)

    @classmethod
    def of(cls, token_BT: ArrayLike | Sequence, train: bool = False, seed: int = 0) -> "Tokens":
        """Token ids (B, T), or (T,) for one sequence, each sequence a document without padding.

        train: routers decide as in training, by draws that the seed names.

        Raises:
            ValueError: what is no integers of that shape.
        """
        ids = jnp.asarray(token_BT)
        if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"token ids are {ids.dtype} of shape {ids.shape}; they must be integers (B, T) or "
                "(T,)"
            )
        ids = jnp.atleast_2d(ids).astype(jnp.int32)
        position_BT = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        index_B = jnp.arange(len(ids), dtype=jnp.int32)
        key = jax.random.key(seed)
        return cls(ids, jnp.ones_like(ids), position_BT, index_B, key, train=train)

    def for_layer(self, layer, global_batch: GlobalBatch | None) -> "Tokens":
        """The same tokens with the layer's own key and its own statistics of the global batch."""
        return dataclasses.replace(
            self, key=jax.random.fold_in(self.key, layer), global_batch=global_batch
        )

    def after(self, output: RouterOutput) -> "Tokens":
        """The same tokens with a router's logits, where it gave them to the next layer."""
        if output.logits_GTE is None:
            return self
        logits_BTE = output.logits_GTE.reshape(*self.token_BT.shape, -1)
        return dataclasses.replace(self, logits_BTE=constrain(logits_BTE, "batch", "length", None))
