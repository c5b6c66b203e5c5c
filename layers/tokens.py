"""What a block knows of its tokens beside their representations. B batch, T tokens."""

import dataclasses

from flax import nnx
import jax
from jaxtyping import Array, Float, Int, Key

from layers.constrain import constrain
from routing.records import RouterOutput, WholeStep


@nnx.dataclass
class Tokens(nnx.Pytree):
    """segment_BT is 0 for padding; index_B numbers the sequences of the whole optimizer step.

    key names seed, step and, inside a block, the layer. step is set in micro-batches whose losses
    need the statistics of the whole optimizer step. logits_BTE are the router's logits in the
    sparse layer before, where the router reads them; None means zero.
    """

    token_BT: Int[Array, "B T"] = nnx.data()
    segment_BT: Int[Array, "B T"] = nnx.data()
    position_BT: Int[Array, "B T"] = nnx.data()
    index_B: Int[Array, " B"] = nnx.data()
    key: Key[Array, ""] = nnx.data()
    train: bool = nnx.static()
    step: WholeStep | None = nnx.data(default=None)
    logits_BTE: Float[Array, "B T E"] | None = nnx.data(default=None)

    def for_layer(self, layer, step: WholeStep | None) -> "Tokens":
        """The same tokens with the layer's own key and its own whole-step statistics."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, layer), step=step)

    def after(self, output: RouterOutput) -> "Tokens":
        """The same tokens with a router's logits, where it gave them to the next layer."""
        if output.logits_GTE is None:
            return self
        logits_BTE = output.logits_GTE.reshape(*self.token_BT.shape, -1)
        return dataclasses.replace(self, logits_BTE=constrain(logits_BTE, "batch", "length", None))
