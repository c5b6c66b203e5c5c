"""Multi-head attention with grouped keys and values.

B batch, T tokens, D model width, H query heads, N key-value heads, K width of a head.
"""

from typing import Literal

from flax import nnx
import gin
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from layers.decoding import KeyValues, Prompt, places
from layers.kernels.attention import Pattern, attend, choose
from layers.kernels.choice import Choice
from layers.linear import linear
from layers.logical_axes import is_cut, logical_constraint
from layers.norms import RMSNorm
from layers.positions import Rotary, alibi
from routing.parameters import parameter, truncated_normal
from routing.ranges import Count, Positive


@gin.configurable
class Attention(nnx.Module):
    """Softmax attention inside each document of the batch.

    Args:
        d_model: D.
        num_heads: H; D must divide by it unless head_width is given.
        num_kv_heads: N (grouped-query attention; 1 is multi-query); H where None.
        head_width: K; D / H where None.
        positions: "rotary", "alibi", or anything else for none here.
        causal: a token sees only itself and earlier ones.
        window: a token sees only the last `window` tokens (both sides when not causal).
        qk_norm: RMSNorm on queries and keys.
        rotary: `Rotary()` where None.
        out_scale: variance scale of the output weights.
        implementation: "auto": on NVIDIA GPUs "cudnn", on TPUs "splash" (kernels that never hold
            the scores), wherever they can compute the same, else "chunks" of queries in plain JAX.
            A run's first lines say which and why.
        chunk: of "chunks", queries at a time in longer sequences, each chunk against the keys that
            it may see, so that no T x T scores are held and few masked ones are computed; the
            backward pass computes a chunk's scores again. None: all at once, as where a mesh
            shards sequences.
    """

    def __init__(
        self,
        d_model: Count,
        num_heads: Count,
        num_kv_heads: Count | None = None,
        head_width: Count | None = None,
        positions: str = "rotary",
        causal: bool = True,
        window: Count | None = None,
        qk_norm: bool = False,
        rotary: Rotary | None = None,
        out_scale: Positive = 1.0,
        implementation: Literal["auto", "chunks", "cudnn", "splash"] = "auto",
        chunk: Count | None = 1024,
    ):
        kv_heads = num_kv_heads or num_heads
        if head_width is None and d_model % num_heads:
            raise ValueError(
                f"d_model={d_model} does not divide by num_heads={num_heads}; choose a multiple "
                "or set Attention.head_width"
            )
        if num_heads % kv_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide by num_kv_heads={kv_heads}; "
                "choose a divisor of num_heads"
            )
        if window is not None and window < 1:
            raise ValueError(f"Attention.window={window} must be at least 1, or None")
        if chunk is not None and chunk < 1:
            raise ValueError(f"Attention.chunk={chunk} must be at least 1, or None")
        width = head_width or d_model // num_heads
        if positions == "rotary" and width % 2:
            raise ValueError(f"rotary positions need an even head width, not {width}")
        self.positions, self.causal, self.window, self.chunk = positions, causal, window, chunk
        self.rotary = Rotary() if rotary is None else rotary
        self.implementation = implementation
        init = truncated_normal()
        self.query_DHK = parameter(
            (d_model, num_heads, width), ("embed", "heads", None), init, role="attention"
        )
        self.key_DNK = parameter(
            (d_model, kv_heads, width), ("embed", "kv_heads", None), init, role="attention"
        )
        self.value_DNK = parameter(
            (d_model, kv_heads, width), ("embed", "kv_heads", None), init, role="attention"
        )
        out = truncated_normal(out_scale, fan_in_axes=2)
        self.out_HKD = parameter(
            (num_heads, width, d_model), ("heads", None, "embed"), out, role="attention"
        )
        self.query_norm = RMSNorm(width) if qk_norm else None
        self.key_norm = RMSNorm(width) if qk_norm else None

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        position_BT: Int[Array, "B T"],
        segment_BT: Int[Array, "B T"],
    ):
        """The output (B, T, D). No token attends to another segment (document)."""
        return self._attended(self._heads(x_BTD, position_BT), position_BT, segment_BT)

    def prefill(
        self,
        x_BTD: Float[Array, "B T D"],
        position_BT: Int[Array, "B T"],
        segment_BT: Int[Array, "B T"],
        prompt: Prompt,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """The output for prompts, and their keys and values; a window keeps its last ones."""
        heads = self._heads(x_BTD, position_BT)
        slots = prompt.slots
        if self.window is not None:
            slots = min(slots, self.window + prompt.spare)
        cache = KeyValues.of_prompt(*heads[1:], segment_BT > 0, prompt.length_B, slots)
        return self._attended(heads, position_BT, segment_BT), cache

    def step(
        self,
        x_R1D: Float[Array, "R 1 D"],
        position_R1: Int[Array, "R 1"],
        segment_R1: Int[Array, "R 1"],
        cache: KeyValues,
    ) -> tuple[Float[Array, "R 1 D"], KeyValues]:
        """The output for further tokens of each sequence, and the cache with them.

        R = B T rows: those of a sequence stand one after the other. What the cache holds of places
        from the first of them on, as of tokens that were taken back, is not seen.
        """
        rows = len(cache.filled_BS), -1

        def by_sequence(a_R1):
            return a_R1.reshape(*rows, *a_R1.shape[2:])

        query_BTHK, key_BTNK, value_BTNK = map(by_sequence, self._heads(x_R1D, position_R1))
        position_BT, real_BT = by_sequence(position_R1), by_sequence(segment_R1) > 0
        cache = cache.with_tokens(position_BT, key_BTNK, value_BTNK, real_BT)
        place_BS = places(position_BT[:, -1], cache.filled_BS.shape[1])
        distance_BTS = position_BT[..., None] - place_BS[:, None]
        seen_BTS = (cache.filled_BS & (place_BS >= 0))[:, None] & (distance_BTS >= 0)
        if self.window is not None:
            seen_BTS &= distance_BTS < self.window
        bias_BHTS = None
        if self.positions == "alibi":
            heads = query_BTHK.shape[2]
            bias_BHTS = alibi(position_BT, place_BS, heads).astype(query_BTHK.dtype)
        mixed_BTHK = jax.nn.dot_product_attention(
            query_BTHK,
            cache.key_BSNK,
            cache.value_BSNK,
            bias=bias_BHTS,
            mask=seen_BTS[:, None],
        )
        mixed_R1HK = mixed_BTHK.reshape(-1, 1, *mixed_BTHK.shape[2:])
        return linear(mixed_R1HK, self.out_HKD[...], contracted=2), cache

    def _heads(self, x_BTD, position_BT) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B, T, H, K), and keys and values (B, T, N, K)."""
        query_BTHK = linear(x_BTD, self.query_DHK[...])
        key_BTNK = linear(x_BTD, self.key_DNK[...])
        value_BTNK = linear(x_BTD, self.value_DNK[...])
        if self.query_norm is not None and self.key_norm is not None:
            query_BTHK, key_BTNK = self.query_norm(query_BTHK), self.key_norm(key_BTNK)
        if self.positions == "rotary":
            query_BTHK = self.rotary(query_BTHK, position_BT)
            key_BTNK = self.rotary(key_BTNK, position_BT)
        return query_BTHK, key_BTNK, value_BTNK

    def _attended(self, heads, position_BT, segment_BT) -> jax.Array:
        """The output (B, T, D) for these queries, keys and values."""
        query_BTHK, key_BTNK, value_BTNK = heads
        if is_cut("length"):  # keys and values of all tokens are gathered; queries stay sharded
            query_BTHK = logical_constraint(query_BTHK, "batch", "length", "heads", None)
            key_BTNK = logical_constraint(key_BTNK, "batch", None, "kv_heads", None)
            value_BTNK = logical_constraint(value_BTNK, "batch", None, "kv_heads", None)
        shape = jax.ShapeDtypeStruct(query_BTHK.shape, query_BTHK.dtype)
        mixed_BTHK = attend(
            query_BTHK,
            key_BTNK,
            value_BTNK,
            position_BT,
            segment_BT,
            self.pattern,
            self.chosen_kernel(shape).kernel,
            None if is_cut("length") else self.chunk,
        )
        mixed_BTHK = checkpoint_name(mixed_BTHK, "attention")
        return linear(mixed_BTHK, self.out_HKD[...], contracted=2)

    @property
    def pattern(self) -> Pattern:
        """Which tokens a token sees."""
        return Pattern(self.causal, self.window, self.positions == "alibi")

    def chosen_kernel(self, query: jax.ShapeDtypeStruct) -> Choice:
        """What computes attention for queries of this shape and type, and why."""
        return choose(self.implementation, self.pattern, query, self.key_DNK.shape[-2])
