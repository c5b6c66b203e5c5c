"""What a layer keeps of the tokens so far when text is generated.

B sequences, T tokens of a prompt, S slots for tokens, N key-value heads, K width of a head.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from routing.records import DecodingState


@nnx.dataclass
class KeyValues(nnx.Pytree):
    """The keys and values of attention: that of the token at position p in slot p mod S.

    With as many slots as positions this is a plain cache, with a window's number of them a ring.

    Attributes:
        key_BSNK: keys, as they are compared with queries.
        value_BSNK: values.
        filled_BS: False for slots without a token, and for tokens that took no part in the layer.
    """

    key_BSNK: Float[Array, "B S N K"] = nnx.data()
    value_BSNK: Float[Array, "B S N K"] = nnx.data()
    filled_BS: Bool[Array, "B S"] = nnx.data()

    @classmethod
    def of_prompt(
        cls,
        key_BTNK: Float[Array, "B T N K"],
        value_BTNK: Float[Array, "B T N K"],
        real_BT: Bool[Array, "B T"],
        length_B: Int[Array, " B"],
        slots: int,
    ) -> "KeyValues":
        """The last `slots` of the first length_B tokens; those that are not real are left out."""
        place_BS = places(length_B - 1, slots)
        token_BS = jnp.maximum(place_BS, 0)

        def gathered(a):
            return jnp.take_along_axis(a, token_BS[..., None, None], axis=1)

        filled_BS = (place_BS >= 0) & jnp.take_along_axis(real_BT, token_BS, axis=1)
        return cls(gathered(key_BTNK), gathered(value_BTNK), filled_BS)

    def with_tokens(
        self,
        position_BT: Int[Array, "B T"],
        key_BTNK: Float[Array, "B T N K"],
        value_BTNK: Float[Array, "B T N K"],
        real_BT: Bool[Array, "B T"],
    ) -> "KeyValues":
        """The cache after T more tokens of each sequence."""
        row_B1 = jnp.arange(len(position_BT))[:, None]
        slot_BT = position_BT % self.filled_BS.shape[1]

        def written(a, new):
            return a.at[row_B1, slot_BT].set(new.astype(a.dtype), unique_indices=True)

        return KeyValues(
            written(self.key_BSNK, key_BTNK),
            written(self.value_BSNK, value_BTNK),
            written(self.filled_BS, real_BT),
        )


def places(last_B: Int[Array, " B"], slots: int) -> jax.Array:
    """The position (B, S) of the token in each slot, of those up to last_B; negative for none."""
    last_B1 = last_B[:, None]
    return last_B1 - (last_B1 - jnp.arange(slots)[None]) % slots


@nnx.dataclass
class LayerCache(nnx.Pytree):
    """What a block keeps of the tokens so far.

    Attributes:
        attention: keys and values.
        router: of an MoE layer's router; empty for dense blocks.
        depth: of a Mixture-of-Depths router; empty where all tokens go through.
    """

    attention: KeyValues = nnx.data()
    router: DecodingState = nnx.data(default_factory=dict)
    depth: DecodingState = nnx.data(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a layer's cache is made for.

    Attributes:
        length_B: tokens of each sequence; those behind them are padding.
        slots: the most tokens that a sequence will have.
        spare: slots of a window beyond its width: as many as tokens may be added at once, less one.
    """

    length_B: jax.Array
    slots: int
    spare: int = 0
