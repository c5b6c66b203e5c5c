"""Attention's weighted sums of values inside each document, by the kernel of the platform.

B batch, T tokens, H query heads, N key-value heads, K width of a head; Q queries and S keys of a
chunk.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.kernels.choice import Choice
from layers.logical_axes import device, is_cut, per_device, splits_fully
from layers.positions import alibi

KERNELS = ("auto", "chunks", "cudnn", "splash")
# What each platform has; others have chunks in plain JAX.
FAST = {"gpu": "cudnn", "tpu": "splash"}
# cuDNN and splash work in blocks of so many tokens.
BLOCK = 128
# cuDNN reads a mask of B * Q * S numbers for Q queries at a time, this many at most.
CUDNN_QUERIES = 4096
SPLASH_BLOCKS = (512, 256, BLOCK)
QUERY_AXES = ("batch", None, "heads", None)
KEY_AXES = ("batch", None, "kv_heads", None)


class Pattern(NamedTuple):
    """Which tokens of its document a token sees, and with which bias.

    Attributes:
        causal: only itself and earlier ones.
        window: only the last `window` tokens (both sides when not causal).
        alibi: with ALiBi's bias.
    """

    causal: bool = True
    window: int | None = None
    alibi: bool = False

    @property
    def sides(self) -> tuple[int, int] | None:
        """The most tokens before and after itself; None without a window."""
        if self.window is None:
            return None
        return self.window - 1, 0 if self.causal else self.window - 1


def choose(
    kernel: str, pattern: Pattern, query: jax.ShapeDtypeStruct, kv_heads: int | None = None
) -> Choice:
    """The kernel for queries of this shape (B, T, H, K) and type on this program's platform.

    Args:
        kernel: one of `KERNELS`.
        pattern: which tokens a token sees.
        query: the queries; keys have the same shape, but for their heads.
        kv_heads: N; H where None.

    Raises:
        ValueError: "cudnn" or "splash" is asked for where it can't run.
    """
    if kernel == "chunks":
        return Choice(kernel, "as set")
    on = device().platform
    wanted = FAST.get(on) if kernel == "auto" else kernel
    if wanted is None:
        return Choice("chunks", f"there is no kernel for a {on}")
    obstacles = _cudnn_obstacle if wanted == "cudnn" else _splash_obstacle
    obstacle = obstacles(pattern, query, kv_heads or query.shape[2])
    if obstacle is None:
        reason = "as set" if kernel != "auto" else "it never holds the scores"
        return Choice(wanted, reason)
    if kernel != "auto":
        raise ValueError(f"Attention.implementation={kernel!r} {obstacle}; choose 'auto'")
    return Choice("chunks", f"{wanted} {obstacle}")


def _cudnn_obstacle(pattern: Pattern, query, kv_heads: int) -> str | None:
    """What keeps cuDNN's flash attention from these queries; None where nothing does."""
    batch, length, heads, width = query.shape
    card = device()
    capability = getattr(card, "compute_capability", None)  # unknown to a compiler without a card
    if "NVIDIA" not in card.device_kind:
        return f"needs an NVIDIA GPU, not {card.device_kind}"
    if capability is not None and float(capability) < 8:
        return f"needs compute capability 8.0, not {capability}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16, not {query.dtype}"
    if length % BLOCK:
        return f"needs a length that {BLOCK} divides, not {length}"
    if pattern.alibi:
        return "would hold ALiBi's bias of every head"
    if pattern.window is not None and not pattern.causal:
        return "has windows for causal models only"
    if is_cut("length"):
        return "needs whole sequences, which the mesh cuts"
    key = jax.ShapeDtypeStruct((batch, length, kv_heads, width), query.dtype)
    try:  # JAX knows the widths that the card and its cuDNN take
        jax.eval_shape(
            functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), query, key, key
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"is refused: {str(error).splitlines()[0].rstrip('.')}"
    return None


def _splash_obstacle(pattern: Pattern, query, kv_heads: int) -> str | None:
    """What keeps splash attention from these queries; None where nothing does."""
    batch, length, _, width = query.shape
    on = device().platform
    if on != "tpu":
        return f"needs a TPU, not a {on}"
    if length % BLOCK:
        return f"needs a length that {BLOCK} divides, not {length}"
    if pattern.alibi:
        return "has no ALiBi"
    whole = splits_fully(QUERY_AXES, query.shape)
    if not whole or not splits_fully(KEY_AXES, (batch, length, kv_heads, width)):
        return "needs a mesh that splits sequences and heads alone, evenly"
    return None


def attend(
    query_BTHK: Float[Array, "B T H K"],
    key_BTNK: Float[Array, "B T N K"],
    value_BTNK: Float[Array, "B T N K"],
    position_BT: Int[Array, "B T"],
    segment_BT: Int[Array, "B T"],
    pattern: Pattern,
    kernel: str,
    chunk: int | None = None,
) -> jax.Array:
    """(B, T, H, K): softmax attention of each query to the keys of its document.

    Args:
        kernel: "chunks", "cudnn" or "splash"; `choose` makes one of them of "auto".
        chunk: "chunks": queries at a time; all where None.
    """
    arrays = (query_BTHK, key_BTNK, value_BTNK, position_BT, segment_BT)
    if kernel == "splash":
        axes = (QUERY_AXES, KEY_AXES, KEY_AXES, ("batch", None))
        one = functools.partial(splash, pattern=pattern)
        return per_device(one, (query_BTHK, key_BTNK, value_BTNK, segment_BT), axes)
    if kernel == "cudnn":
        return in_chunks(*arrays, pattern, CUDNN_QUERIES, "cudnn", BLOCK)
    return in_chunks(*arrays, pattern, chunk, "xla")


def in_chunks(
    query_BTHK,
    key_BTNK,
    value_BTNK,
    position_BT,
    segment_BT,
    pattern: Pattern,
    chunk: int | None,
    implementation: Literal["xla", "cudnn"],
    align: int = 1,
) -> jax.Array:
    """Attention of so many queries at a time, each chunk against the keys that it may see.

    The backward pass computes a chunk again, so that no T x T array is kept.

    Args:
        implementation: as in `jax.nn.dot_product_attention`.
        align: each chunk's first key is a multiple of it.
    """
    length = query_BTHK.shape[1]
    chunk, chunks = chunk or length, []
    for first in range(0, length, chunk):
        queries = slice(first, min(first + chunk, length))
        keys = _seen(pattern, queries, length, align)
        mix = functools.partial(
            _mix, queries=queries, keys=keys, pattern=pattern, implementation=implementation
        )
        mix = mix if length <= chunk else jax.checkpoint(mix)
        chunks.append(mix(query_BTHK, key_BTNK, value_BTNK, position_BT, segment_BT))
    return chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=1)


def _seen(pattern: Pattern, queries: slice, length: int, align: int) -> slice:
    """The keys that any of these queries may see."""
    before, after = pattern.sides or (length, 0 if pattern.causal else length)
    start = max(0, queries.start - before) // align * align
    return slice(start, min(length, queries.stop + after))


def _mix(
    query_BTHK,
    key_BTNK,
    value_BTNK,
    position_BT,
    segment_BT,
    *,
    queries: slice,
    keys: slice,
    pattern: Pattern,
    implementation: Literal["xla", "cudnn"],
):
    """Attention's weighted sums of values for a chunk of queries, (B, Q, H, K)."""
    bias_BHQS = None
    if pattern.alibi:
        heads = query_BTHK.shape[2]
        bias_BHQS = alibi(position_BT[:, queries], position_BT[:, keys], heads)
        bias_BHQS = bias_BHQS.astype(query_BTHK.dtype)
    mask_BQS = segment_BT[:, queries, None] == segment_BT[:, None, keys]
    options: dict[str, Any] = {"is_causal": pattern.causal, "local_window_size": pattern.sides}
    if queries != keys:  # JAX's options assume that queries and keys start at the same token
        options, key_S = {}, jnp.arange(keys.start, keys.stop)
        before_QS = jnp.arange(queries.start, queries.stop)[:, None] - key_S[None]
        if pattern.causal:
            mask_BQS &= before_QS[None] >= 0
        if pattern.window is not None:
            mask_BQS &= jnp.abs(before_QS)[None] < pattern.window
    return jax.nn.dot_product_attention(
        query_BTHK[:, queries],
        key_BTNK[:, keys],
        value_BTNK[:, keys],
        bias=bias_BHQS,
        mask=mask_BQS[:, None],
        implementation=implementation,
        **options,
    )


def splash(
    query_BTHK, key_BTNK, value_BTNK, segment_BT, pattern: Pattern, interpret: bool = False
) -> jax.Array:
    """JAX's Pallas kernel for TPUs: blocks in which no query sees a key are not computed.

    interpret: run it on a CPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    length, heads, width = query_BTHK.shape[1:]
    shape = (length, length)
    if pattern.sides is not None:
        mask = masks.LocalMask(shape, pattern.sides, 0)
    else:
        mask = masks.CausalMask(shape) if pattern.causal else masks.FullMask(shape)
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

    def one(query_THK, key_TNK, value_TNK, segment_T):
        query_HTK, key_NTK, value_NTK = (
            jnp.swapaxes(a, 0, 1) for a in (query_THK, key_TNK, value_TNK)
        )
        scaled_HTK = (query_HTK.astype(jnp.float32) * width**-0.5).astype(query_HTK.dtype)
        segments = kernels.SegmentIds(segment_T, segment_T)
        mixed_HTK: Any = kernel(scaled_HTK, key_NTK, value_NTK, segments)
        return jnp.swapaxes(mixed_HTK, 0, 1)

    return jax.vmap(one)(query_BTHK, key_BTNK, value_BTNK, segment_BT)
