"""The records of tokens on their way to a router: `Tokens` in a model, `RouterInputs` in a layer.

B batch, T tokens of a sequence (of a group in RouterInputs), G groups, D model width, E experts.
"""

from collections.abc import Sequence
import dataclasses
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from routing.records import AnyArray, GlobalBatch


def named_key(key: jax.Array, name: str) -> jax.Array:
    """The key of one kind of random draw: the given key, with the draw's name folded in."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


@nnx.dataclass
class Context(nnx.Pytree):
    """What a layer gets beside its tokens.

    Attributes:
        global_batch: the statistics of the global batch, in a micro-batch whose losses need them.
        previous_logits: the router's logits in the previous sparse layer, zero in the first, for
            routers that `reads_previous_logits`; (B, T, E) in `Tokens`, (G, T, E) in
            `RouterInputs`.
        loss_weights: the factors of the routers' losses in the training loss, by `Router.key_of`;
            a compiled step is then the same for all of them. Those of the losses where None.
    """

    global_batch: GlobalBatch | None = nnx.data(default=None)
    previous_logits: Float[Array, "rows tokens E"] | None = nnx.data(default=None)
    loss_weights: dict[str, Array] | None = nnx.data(default=None)


@nnx.dataclass
class Tokens(nnx.Pytree):
    """The tokens of a batch, without their representations.

    Inside a Mixture-of-Depths block T counts only the tokens that go through it.

    Attributes:
        token_BT: token ids.
        segment_BT: numbers the documents of a sequence from 1; 0 for padding.
        position_BT: positions in the document.
        index_B: numbers the sequences of the global batch.
        key: of seed and step, and inside a block of the layer.
        train: whether routers decide as in training.
        context: what a layer gets beside its tokens.
    """

    token_BT: Int[Array, "B T"] = nnx.data()
    segment_BT: Int[Array, "B T"] = nnx.data()
    position_BT: Int[Array, "B T"] = nnx.data()
    index_B: Int[Array, " B"] = nnx.data()
    key: Key[Array, ""] = nnx.data()
    train: bool = nnx.static()
    context: Context = nnx.data(default_factory=Context)

    @classmethod
    def of(cls, token_BT: ArrayLike | Sequence, train: bool = False, seed: int = 0) -> "Tokens":
        """Token ids (B, T), or (T,) for one sequence, each sequence a document without padding.

        train: routers decide as in training, with random draws from the seed.

        Raises:
            ValueError: token_BT holds no integers, or has another shape.
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
        """The same tokens, with the layer's key and its statistics of the global batch."""
        context = dataclasses.replace(self.context, global_batch=global_batch)
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, layer), context=context)

    def with_loss_weights(self, weights: dict[str, Array]) -> "Tokens":
        """The same tokens, with the factors of the routers' losses."""
        context = dataclasses.replace(self.context, loss_weights=weights)
        return dataclasses.replace(self, context=context)

    def with_previous_logits(self, logits_BTE: Float[Array, "B T E"] | None) -> "Tokens":
        """The same tokens, with the router's logits in the previous sparse layer."""
        context = dataclasses.replace(self.context, previous_logits=logits_BTE)
        return dataclasses.replace(self, context=context)


@nnx.dataclass
class RouterInputs(nnx.Pytree):
    """The tokens that a router decides on, in groups.

    Attributes:
        x_GTD: representations without noise; zero for padding.
        valid_GT: False for padding.
        token_id_GT: token ids.
        position_GT: positions in the document.
        index_G: numbers the groups of the global batch, so that random draws depend neither on the
            mesh nor on the number of micro-batches.
        key: of seed, step and layer.
        train: whether to decide as in training.
        context: what a layer gets beside its tokens.
        segment_GT: numbers the documents of each sequence from 1; 0 for padding.
        sequences: how many sequences, one after the other, a group is.
    """

    x_GTD: Float[Array, "G T D"] = nnx.data()
    valid_GT: Bool[Array, "G T"] = nnx.data()
    token_id_GT: Int[Array, "G T"] = nnx.data()
    position_GT: Int[Array, "G T"] = nnx.data()
    index_G: Int[Array, " G"] = nnx.data()
    key: Key[Array, ""] = nnx.data()
    train: bool = nnx.static()
    context: Context = nnx.data(default_factory=Context)
    segment_GT: Int[Array, "G T"] | None = nnx.data(default=None)
    sequences: int = nnx.static(default=1)

    @classmethod
    def of(
        cls, x_BTD: Float[AnyArray, "B T D"], tokens: Tokens, sequences_per_group: int = 1
    ) -> "RouterInputs":
        """Groups of whole sequences from a batch; float32, with padding set to zero.

        Args:
            x_BTD: representations.
            tokens: of the batch.
            sequences_per_group: in training; at most the batch. At evaluation a group is one
                sequence, so that sequences don't affect each other.

        Raises:
            ValueError: the batch does not divide into such groups.
        """
        batch, length, width = x_BTD.shape
        per_group = min(sequences_per_group, batch) if tokens.train else 1
        if batch % per_group:
            raise ValueError(
                f"a batch of {batch} sequences does not divide into groups of "
                f"MoELayer.sequences_per_group={per_group}"
            )
        shape = (batch // per_group, per_group * length)
        valid_GT = (tokens.segment_BT > 0).reshape(shape)
        x_GTD = x_BTD.reshape(*shape, width).astype(jnp.float32)
        context = tokens.context
        if context.previous_logits is not None:
            logits_GTE = context.previous_logits.reshape(*shape, -1)
            logits_GTE = jnp.where(valid_GT[..., None], logits_GTE, 0)
            context = dataclasses.replace(context, previous_logits=logits_GTE)
        return cls(
            x_GTD=jnp.where(valid_GT[..., None], x_GTD, 0),
            valid_GT=valid_GT,
            token_id_GT=tokens.token_BT.reshape(shape),
            position_GT=tokens.position_BT.reshape(shape),
            index_G=tokens.index_B[::per_group],
            key=tokens.key,
            train=tokens.train,
            context=context,
            segment_GT=tokens.segment_BT.reshape(shape),
            sequences=per_group,
        )

    def keys_G(self, name: str) -> Key[Array, " G"]:
        """One key for each group, for the draws of this name ("jitter", "sampling", ...)."""
        key = named_key(self.key, name)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, self.index_G)
