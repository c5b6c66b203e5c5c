"""One batch of token sequences. B sequences, T tokens each."""

from flax import nnx
from jaxtyping import Array, Bool, Int
import numpy as np

IntBT = Int[Array | np.ndarray, "B T"]


@nnx.dataclass
class Batch(nnx.Pytree):
    """Inputs and targets of B sequences of T tokens.

    Attributes:
        token_BT: the tokens the model reads, int32.
        target_BT: the token that each position predicts, int32.
        segment_BT: 0 for padding, else 1, 2, ... for the documents of the window, int32.
        position_BT: position within the document's piece in the window, from 0, int32.
        scored_BT: True where the prediction counts in the loss.
        index_B: number of each sequence in the whole optimizer step; random keys derive from it.
    """

    token_BT: IntBT = nnx.data()
    target_BT: IntBT = nnx.data()
    segment_BT: IntBT = nnx.data()
    position_BT: IntBT = nnx.data()
    scored_BT: Bool[Array | np.ndarray, "B T"] = nnx.data()
    index_B: Int[Array | np.ndarray, " B"] = nnx.data()
