"""Feed-forwards on rows that lie expert by expert, one after the other: nothing padded or dropped.

N rows, D width, F hidden width, E experts.
"""

from collections.abc import Callable
import functools
import itertools

from flax import nnx
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.constrain import is_placed, platform

# Rows of an expert are worked on 512 at a time, and what is left in one smallest block that holds
# it: a tenth of that is empty on average. Every size is a loop to compile.
BLOCKS = (*(n * base for base in (4, 8, 16, 32, 64) for n in (4, 5, 6, 7)), 512)
# In blocks of at most so many rows, the backward pass multiplies weights by rows, not the reverse.
FEW_ROWS = 64
KERNELS = ("auto", "loop", "ragged_dot", "tokamax")


@nnx.dataclass
class SortedRows(nnx.Pytree):
    """What Sorted dispatch gives the experts: count_PE rows for each in turn, in P parts.

    A part is what one device of a mesh holds; off a mesh there is one. At least `spare_rows` more
    rows follow those of the experts: they may be read, but nothing that comes of them is used.
    own_experts: the rows came to the device that holds their experts, and count_PE is of those.
    shard_axis: the logical axis of P.
    """

    rows_PND: Float[Array, "P N D"] = nnx.data()
    count_PE: Int[Array, "P E"] = nnx.data()
    kernel: str = nnx.static()
    own_experts: bool = nnx.static(default=False)
    shard_axis: str = nnx.static(default="batch")


def spare_rows(rows: int) -> int:
    """How far the last block of the last expert may reach beyond so many rows, at most."""
    used = (0, *(size for size, before in zip(BLOCKS, (0, *BLOCKS), strict=False) if before < rows))
    return max(b - a for a, b in itertools.pairwise(used))


def grouped_feed_forward(
    x_ND: jax.Array,
    ups: tuple[jax.Array, ...],
    down_EFD: jax.Array,
    count_E: jax.Array,
    activate: Callable[..., jax.Array],
    kernel: str,
) -> jax.Array:
    """y_ND: expert e's down(activate(up(x), ...)) on its rows; beyond the counts anything.

    ups: one or two arrays (E, D, F), whose products `activate` takes in this order.
    kernel: "loop", or where there are fast ones (TPU, GPU) "ragged_dot", the compiler's, or
        "tokamax", Pallas kernels of that package.
    """
    if kernel != "loop":
        product = _tokamax() if kernel == "tokamax" else lax.ragged_dot
        before = _named([product(x_ND, up_EDF, count_E) for up_EDF in ups])
        (y_ND,) = _named([product(activate(*before), down_EFD, count_E)])
        real_N1 = (jnp.arange(len(x_ND)) < count_E.sum())[:, None]
        return jnp.where(real_N1, y_ND, 0)
    return _loop(x_ND, ups, down_EFD, count_E, activate)


def _tokamax() -> Callable[..., jax.Array]:
    """Its product, of the signature of `lax.ragged_dot`."""
    from absl import flags
    import tokamax  # pyright: ignore[reportMissingImports]

    if is_placed():
        raise ValueError(
            "Sorted.kernel='tokamax' is for one device: its kernels don't say how their results "
            "vary over a mesh; take 'auto' on several"
        )
    # Or it would look for flags of its own in this program's command line.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    kernels = "xla" if platform() == "cpu" else ("mosaic", "triton")
    return functools.partial(tokamax.ragged_dot, implementation=kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loop(x_ND, ups, down_EFD, count_E, activate):
    return _loop_forward(x_ND, ups, down_EFD, count_E, activate, save=False)[0]


def _loop_forward(x_ND, ups, down_EFD, count_E, activate, save: bool = True):
    def body(expert, start, size, row_S, first, done):
        y_ND, before = done
        x_SD = _rows(x_ND, start, size)
        before_SF = [x_SD @ _one(up_EDF, expert) for up_EDF in ups]
        y_SD = activate(*before_SF) @ _one(down_EFD, expert)
        if save:
            before = [_write(a, new, start) for a, new in zip(before, before_SF, strict=True)]
        return _write(y_ND, y_SD, start), before

    zeros = functools.partial(_zeros, like=x_ND)
    hidden = (len(x_ND), down_EFD.shape[1])
    empty = zeros(x_ND.shape), [zeros(hidden) for _ in ups if save]
    y_ND, before = _over_experts(body, empty, count_E, len(x_ND))
    y_ND, *before = _named([y_ND, *before])
    return y_ND, (x_ND, ups, down_EFD, count_E, before)


def _named(products):
    """By the name under which rematerialisation keeps what experts' matmuls gave."""
    return [checkpoint_name(a, "expert_products") for a in products]


def _loop_backward(activate, saved, dy_ND):
    x_ND, ups, down_EFD, count_E, before = saved

    def body(expert, start, size, row_S, first, done):
        dx_ND, dups, ddown_EFD = done
        # What lies beyond the expert's rows belongs to the next one.
        x_SD, dy_SD = (jnp.where(row_S[:, None], _rows(a, start, size), 0) for a in (x_ND, dy_ND))
        hidden_SF, pull = jax.vjp(activate, *(_rows(a, start, size) for a in before))
        dbefore = pull(dy_SD @ _one(down_EFD, expert).T)
        dx_SD = _input_gradient(dbefore, ups, expert)
        dups = [
            _add(dup_EDF, expert, x_SD, d_SF, first)
            for dup_EDF, d_SF in zip(dups, dbefore, strict=True)
        ]
        ddown_EFD = _add(ddown_EFD, expert, hidden_SF, dy_SD, first)
        return _write(dx_ND, dx_SD, start), dups, ddown_EFD

    zeros = functools.partial(_zeros, like=x_ND)
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    weights = [zeros(w.shape, wide) for w in (*ups, down_EFD)]
    start = zeros(x_ND.shape), weights[:-1], weights[-1]
    dx_ND, dups, ddown_EFD = _over_experts(body, start, count_E, len(x_ND))
    dups = tuple(dup.astype(up.dtype) for dup, up in zip(dups, ups, strict=True))
    return dx_ND, dups, ddown_EFD.astype(down_EFD.dtype), None


_loop.defvjp(_loop_forward, _loop_backward)


def _over_experts(body, carry, count_E, rows: int):
    """body(expert, start, size, row_S, first, carry) for blocks that cover every expert's rows.

    row_S tells which rows of the block are the expert's: its last block may reach into the next
    one's rows, before those are written. `first` is True where no block of the expert came before.
    """
    sizes = [size for size in BLOCKS if size <= rows]
    largest, others = sizes[-1], sizes[:-1]
    start_E = jnp.cumsum(count_E) - count_E

    def one_expert(expert, carry):
        count, start = count_E[expert], start_E[expert]
        full, rest = count // largest, count % largest
        if others:  # what no smaller block holds
            full, rest = full + (rest > others[-1]), jnp.where(rest > others[-1], 0, rest)
        else:
            full, rest = full + (rest > 0), jnp.zeros_like(rest)

        def blocks(size, begin, left, times, first, carry):
            def one_block(n, carry):
                # Depends on n, or the compiler would take the work out of a loop that never runs.
                row_S = jnp.arange(size) < left - n * size
                return body(expert, begin + n * size, size, row_S, first, carry)

            return lax.fori_loop(0, times, one_block, carry)

        smaller = 0
        for size in others:
            fits = ((rest > smaller) & (rest <= size)).astype(count.dtype)
            carry = blocks(size, start + full * largest, rest, fits, True, carry)
            smaller = size
        return blocks(largest, start, count, full, False, carry)

    return lax.fori_loop(0, len(count_E), one_expert, carry)


def _input_gradient(dbefore, ups, expert):
    """dx_SD: the sum of d_SF @ up_DF.T over the ups and their gradients."""
    pairs = [(d_SF, _one(up_EDF, expert)) for d_SF, up_EDF in zip(dbefore, ups, strict=True)]
    if len(dbefore[0]) > FEW_ROWS:
        return sum(d_SF @ up_DF.T for d_SF, up_DF in pairs)
    # A library copies the right operand into the order that it multiplies in: here that is the
    # rows, not the weights. Without the barrier the compiler would turn the product round again.
    return lax.optimization_barrier(sum(up_DF @ d_SF.T for d_SF, up_DF in pairs)).T


def _rows(a_ND, start, size):
    return lax.dynamic_slice(a_ND, (start, 0), (size, a_ND.shape[1]))


def _write(a_ND, rows_SD, start):
    return lax.dynamic_update_slice(a_ND, rows_SD, (start, 0))


def _one(weight_EXY, expert):
    return lax.dynamic_index_in_dim(weight_EXY, expert, keepdims=False)


def _add(total_EXY, expert, a_SX, b_SY, first: bool):
    """total[expert] += a^T b, summed in its own type; `first` spares the reading of zeros."""
    new_XY = lax.dot_general(
        a_SX, b_SY, (((0,), (0,)), ((), ())), preferred_element_type=total_EXY.dtype
    )
    sum_XY = new_XY if first else _one(total_EXY, expert) + new_XY
    return lax.dynamic_update_index_in_dim(total_EXY, sum_XY, expert, 0)


def _zeros(shape, dtype=None, *, like):
    """Zeros that differ between devices where `like` does."""
    return jnp.zeros_like(like, shape=shape, dtype=dtype)
