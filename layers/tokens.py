"""What a block knows of its tokens beside their representations. B batch, T tokens."""

import dataclasses

from flax import nnx
import jax
from jaxtyping import Array, Int, Key

from routing.records import WholeStep


@nnx.dataclass
class Tokens(nnx.Pytree):
    """segment_BT is 0 for padding; index_B numbers the sequences of the whole optimizer step.

    key names seed, step and, inside a block, the layer. step is set in micro-batches whose losses
    need the statistics of the whole optimizer step.
    """

    token_BT: Int[Array, "B T"] = nnx.data()
    segment_BT: Int[Array, "B T"] = nnx.data()
    position_BT: Int[Array, "B T"] = nnx.data()
    index_B: Int[Array, " B"] = nnx.data()
    key: Key[Array, ""] = nnx.data()
    train: bool = nnx.static()
    step: WholeStep | None = nnx.data(default=None)

    def for_layer(self, layer, step: WholeStep | None) -> "Tokens":
        """The same tokens with the layer's own key and its own whole-step statistics."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, layer), step=step)
