"""Positions: rotary and ALiBi inside attention, learned and sinusoidal at the embedding.

B batch, T tokens, H heads, D width (of the model or of a head).
"""

import dataclasses
from typing import Literal

from flax import nnx
import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from routing.parameters import normal, parameter
from routing.ranges import Positive

Positions = Literal["rotary", "alibi", "learned", "sinusoidal", "none"]
POSITIONS = ("rotary", "alibi", "learned", "sinusoidal", "none")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotate pairs (i, i + D/2) by position * base^(-2i/D), in float32 (Su et al. 2021, eq. 34).

    Attributes:
        base: of the wavelengths; larger for longer texts.
    """

    base: Positive = 10_000.0

    def __call__(
        self, x_BTHD: Float[Array, "B T H D"], position_BT: Int[Array, "B T"]
    ) -> jax.Array:
        half = x_BTHD.shape[-1] // 2
        frequency_D = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle_BTD = jnp.einsum("bt,d->btd", position_BT.astype(jnp.float32), frequency_D)
        sin, cos = jnp.sin(angle_BTD)[:, :, None], jnp.cos(angle_BTD)[:, :, None]
        first, second = x_BTHD[..., :half], x_BTHD[..., half:]
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return rotated.astype(x_BTHD.dtype)


def alibi_slopes(heads: int) -> np.ndarray:
    """One slope per head: a geometric sequence from 2^(-8/n) (Press et al. 2022, section 3)."""
    whole = 2 ** int(np.floor(np.log2(heads)))
    slopes = 2.0 ** (-8.0 / whole * np.arange(1, whole + 1))
    between = 2.0 ** (-4.0 / whole * np.arange(1, 2 * (heads - whole) + 1, 2))
    return np.concatenate([slopes, between]).astype(np.float32)


def alibi(query_BQ: Int[Array, "B Q"], key_BS: Int[Array, "B S"], heads: int) -> jax.Array:
    """The bias (B, H, Q, S) of attention scores: minus the head's slope times the distance."""
    distance_BQS = jnp.abs(query_BQ[:, :, None] - key_BS[:, None, :]).astype(jnp.float32)
    return -jnp.asarray(alibi_slopes(heads))[None, :, None, None] * distance_BQS[:, None]


def sinusoidal(position_BT: Int[Array, "B T"], width: int) -> jax.Array:
    """(B, T, D): sines, then cosines, of falling frequency (Vaswani et al. 2017, section 3.5)."""
    if width % 2:
        raise ValueError(f"sinusoidal positions need an even d_model, not {width}")
    frequency_D = 10_000.0 ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angle_BTD = jnp.einsum("bt,d->btd", position_BT.astype(jnp.float32), frequency_D)
    return jnp.concatenate([jnp.sin(angle_BTD), jnp.cos(angle_BTD)], axis=-1)


class LearnedPositions(nnx.Module):
    """A vector for each of the first `length` positions."""

    def __init__(self, length: int, width: int):
        self.length = length
        self.table_TD = parameter((length, width), (None, "embed"), normal(0.02), role="position")

    def __call__(self, position_BT: Int[Array, "B T"]) -> jax.Array:
        """(B, T, D); raise ValueError for sequences longer than the table."""
        if position_BT.shape[1] > self.length:
            raise ValueError(
                f"{position_BT.shape[1]} tokens per sequence, but Transformer.max_length="
                f"{self.length} learned positions; raise it or shorten the sequences"
            )
        return self.table_TD[...][position_BT]
