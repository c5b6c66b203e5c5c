"""Feed-forward experts on rows sorted by expert: no row is padding, none is dropped.

N rows, D width, F hidden width, E experts, R rows of a block.
"""

from collections.abc import Callable
import functools
import itertools
from typing import Any

from flax import nnx
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.kernels import hopper
from layers.kernels.choice import Choice
from layers.kernels.row_blocks import BLOCK_ROWS, aligned_rows, units
from layers.kernels.row_by_row import row_by_row
from layers.kernels.slot_blocks import slot_blocks
from layers.logical_axes import device, has_mesh, platform

# An expert's rows are computed in blocks of 512, and the rest in the smallest block that holds it,
# of which a tenth is empty on average. Every block size is one more loop to compile.
BLOCKS = (*(n * base for base in (4, 8, 16, 32, 64) for n in (4, 5, 6, 7)), 512)
# In blocks of at most so many rows, the backward pass multiplies weights by rows, not the reverse.
FEW_ROWS = 64
KERNELS = ("auto", "loop", "hopper", "slot_blocks", "ragged_dot", "tokamax")


def choose(kernel: str, dtype: Any, width: int) -> Choice:
    """What multiplies rows by their experts' weights on the device of this program.

    Args:
        kernel: one of `KERNELS`; "auto" never takes `ragged_dot` on a GPU.
        dtype: of rows and weights.
        width: D.

    Raises:
        ValueError: the kernel is set, and can't serve on this GPU.
    """
    on = platform()
    refused = hopper.refusal(device(), dtype, width) if on == "gpu" else None
    if kernel == "hopper" and refused:
        raise ValueError(f"Sorted.kernel='hopper' can't serve here: {refused}; take 'auto'")
    if kernel != "auto":
        return Choice(kernel, "as set")
    if on == "cpu":
        return Choice("loop", "blocks that fit a CPU's cache")
    if on == "tpu":
        return Choice("ragged_dot", "a kernel of the TPU's compiler")
    if refused:
        why = f"no Hopper kernels: {refused}; ragged_dot would be a masked matmul per expert"
        return Choice("slot_blocks", why)
    card = getattr(device(), "device_kind", on)
    return Choice("hopper", f"{card}, {jnp.dtype(dtype)}, width {width}, JAX {jax.__version__}")


def row_multiple(kernel: str) -> int:
    """Each expert's rows begin at a multiple of it."""
    return BLOCK_ROWS if kernel == "hopper" else 1


@nnx.dataclass
class SortedRows(nnx.Pytree):
    """Rows sorted by expert, in P shards, one for each device of a mesh (one off a mesh).

    Attributes:
        rows_PND: in every shard count_PE[p, 0] rows of expert 0, then those of expert 1, and so on,
            each expert's from a multiple of `row_multiple(kernel)` on, with zeros between. There
            are at least `spare_rows` more than `count_PE.sum(1)`. Kernels may read those behind;
            their outputs are discarded.
        combine_PN: the gate of each row's assignment, by which its expert's output is multiplied;
            float32, 0 for rows without one.
        count_PE: rows of each expert.
        kernel: as in `grouped_feed_forward`.
        local_experts: E counts only the experts that a shard's device holds; rows have been sent
            to it.
        shard_axis: the logical axis of P.
    """

    rows_PND: Float[Array, "P N D"] = nnx.data()
    combine_PN: Float[Array, "P N"] = nnx.data()
    count_PE: Int[Array, "P E"] = nnx.data()
    kernel: str = nnx.static()
    local_experts: bool = nnx.static(default=False)
    shard_axis: str = nnx.static(default="batch")


def spare_rows(rows: int, experts: int, kernel: str) -> int:
    """The rows that a kernel needs beyond `rows` rows.

    The most that the last expert's last block may reach beyond them; or that experts leave empty
    which begin at multiples.
    """
    if kernel == "hopper":
        return aligned_rows(rows, experts, BLOCK_ROWS) - rows
    used = (0, *(size for size, before in zip(BLOCKS, (0, *BLOCKS), strict=False) if before < rows))
    return max(b - a for a, b in itertools.pairwise(used))


def grouped_feed_forward(
    x_ND: Float[Array, "N D"],
    combine_N: Float[Array, " N"],
    ups: tuple[jax.Array, ...],
    down_EFD: Float[Array, "E F D"],
    count_E: Int[Array, " E"],
    activate: Callable[..., jax.Array],
    kernel: str,
) -> jax.Array:
    """(N, D): combine * down(activate(up(x), ...)) of each row's expert; undefined past the counts.

    Args:
        x_ND: rows sorted by expert, each expert's from a multiple of `row_multiple` on; with
            `spare_rows` rows of padding.
        combine_N: what each row's output is multiplied by. The hidden units are, before the last
            matmul, so that no output is kept for the backward pass.
        ups: one or two arrays (E, D, F); `activate` takes their matmuls in this order.
        down_EFD: the output weights.
        count_E: rows of each expert.
        activate: hidden units from one or two arrays (N, F).
        kernel: "loop" over blocks, "hopper" (our kernels for that card; loops over blocks where the
            program is not compiled for CUDA), "slot_blocks" (batched matmuls over equal slots,
            then blocks of what overflows), "ragged_dot" of the compiler (fast on TPU), or
            "tokamax", the Pallas kernels of that package; `choose` makes one of them of "auto".
    """
    if kernel == "row_by_row":  # in decoding
        return row_by_row(x_ND, combine_N, ups, down_EFD, count_E, activate)
    if kernel == "hopper":
        return hopper.feed_forward(x_ND, combine_N, ups, down_EFD, count_E, activate)
    if kernel == "slot_blocks":
        return slot_blocks(x_ND, combine_N, ups, down_EFD, count_E, activate)
    if kernel != "loop":
        matmul = _tokamax() if kernel == "tokamax" else lax.ragged_dot
        before = _named([matmul(x_ND, up_EDF, count_E) for up_EDF in ups])
        y_ND = matmul(units(activate, combine_N[:, None], *before), down_EFD, count_E)
        real_N1 = (jnp.arange(len(x_ND)) < count_E.sum())[:, None]
        return jnp.where(real_N1, y_ND, 0)
    return _loop(x_ND, combine_N, ups, down_EFD, count_E, activate)


def _tokamax() -> Callable[..., jax.Array]:
    """Tokamax's grouped matmul, with the signature of `lax.ragged_dot`."""
    from absl import flags
    import tokamax  # pyright: ignore[reportMissingImports]

    if has_mesh():
        raise ValueError(
            "Sorted.kernel='tokamax' is for one device: its kernels don't say how their results "
            "vary over a mesh; take 'auto' on several"
        )
    # Otherwise tokamax would look for its flags in this program's command line.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    kernels = "xla" if platform() == "cpu" else ("mosaic", "triton")
    return functools.partial(tokamax.ragged_dot, implementation=kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _loop(x_ND, combine_N, ups, down_EFD, count_E, activate):
    return _loop_forward(x_ND, combine_N, ups, down_EFD, count_E, activate, save=False)[0]


def _loop_forward(x_ND, combine_N, ups, down_EFD, count_E, activate, save: bool = True):
    def body(expert, start, size, is_own_R, first, done):
        y_ND, before = done
        x_RD = _rows(x_ND, start, size)
        before_RF = [x_RD @ _one(up_EDF, expert) for up_EDF in ups]
        hidden_RF = units(activate, _rows(combine_N1, start, size), *before_RF)
        y_RD = hidden_RF @ _one(down_EFD, expert)
        if save:
            before = [_write(a, new, start) for a, new in zip(before, before_RF, strict=True)]
        return _write(y_ND, y_RD, start), before

    combine_N1 = combine_N[:, None]
    zeros = functools.partial(_zeros, like=x_ND)
    hidden = (len(x_ND), down_EFD.shape[1])
    empty = zeros(x_ND.shape), [zeros(hidden) for _ in ups if save]
    y_ND, before = _over_experts(body, empty, count_E, len(x_ND))
    return y_ND, (x_ND, combine_N1, ups, down_EFD, count_E, _named(before))


def _named(matmuls):
    """The experts' matmuls under the name by which rematerialisation saves them."""
    return [checkpoint_name(a, "expert_matmuls") for a in matmuls]


def _loop_backward(activate, saved, dy_ND):
    x_ND, combine_N1, ups, down_EFD, count_E, before = saved

    def body(expert, start, size, is_own_R, first, done):
        dx_ND, dcombine_N1, dups, ddown_EFD = done
        # Rows of the block past the expert's own belong to the next expert.
        x_RD, dy_RD = (
            jnp.where(is_own_R[:, None], _rows(a, start, size), 0) for a in (x_ND, dy_ND)
        )
        of_rows = (_rows(a, start, size) for a in (combine_N1, *before))
        hidden_RF, pull = jax.vjp(functools.partial(units, activate), *of_rows)
        dcombine_R1, *dbefore = pull(dy_RD @ _one(down_EFD, expert).T)
        dx_RD = _input_gradient(dbefore, ups, expert)
        dups = [
            _add(dup_EDF, expert, x_RD, d_RF, first)
            for dup_EDF, d_RF in zip(dups, dbefore, strict=True)
        ]
        ddown_EFD = _add(ddown_EFD, expert, hidden_RF, dy_RD, first)
        dx_ND, dcombine_N1 = _write(dx_ND, dx_RD, start), _write(dcombine_N1, dcombine_R1, start)
        return dx_ND, dcombine_N1, dups, ddown_EFD

    zeros = functools.partial(_zeros, like=x_ND)
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    weights = [zeros(w.shape, wide) for w in (*ups, down_EFD)]
    start = zeros(x_ND.shape), jnp.zeros_like(combine_N1), weights[:-1], weights[-1]
    dx_ND, dcombine_N1, dups, ddown_EFD = _over_experts(body, start, count_E, len(x_ND))
    dups = tuple(dup.astype(up.dtype) for dup, up in zip(dups, ups, strict=True))
    return dx_ND, dcombine_N1[:, 0], dups, ddown_EFD.astype(down_EFD.dtype), None


_loop.defvjp(_loop_forward, _loop_backward)


def _over_experts(body, carry, count_E, rows: int):
    """Call body(expert, start, size, is_own_R, first, carry) for blocks that cover all rows.

    is_own_R: which of the block's R = size rows are the expert's. Its last block may reach into the
        next expert's rows, before those are written.
    first: whether this is the expert's first block.
    """
    sizes = [size for size in BLOCKS if size <= rows]
    largest, others = sizes[-1], sizes[:-1]
    start_E = jnp.cumsum(count_E) - count_E

    def one_expert(expert, carry):
        count, start = count_E[expert], start_E[expert]
        full, rest = count // largest, count % largest
        if others:  # a rest that no smaller block holds takes a full one
            full, rest = full + (rest > others[-1]), jnp.where(rest > others[-1], 0, rest)
        else:
            full, rest = full + (rest > 0), jnp.zeros_like(rest)

        def blocks(size, begin, left, times, first, carry):
            def one_block(n, carry):
                # The mask depends on n: otherwise the compiler would hoist the work out of a loop
                # that may not run at all.
                is_own_R = jnp.arange(size) < left - n * size
                return body(expert, begin + n * size, size, is_own_R, first, carry)

            return lax.fori_loop(0, times, one_block, carry)

        smaller = 0
        for size in others:
            fits = ((rest > smaller) & (rest <= size)).astype(count.dtype)
            carry = blocks(size, start + full * largest, rest, fits, True, carry)
            smaller = size
        return blocks(largest, start, count, full, False, carry)

    return lax.fori_loop(0, len(count_E), one_expert, carry)


def _input_gradient(dbefore, ups, expert):
    """dx_RD: the sum of d_RF @ up_DF.T over the gradients and their weights."""
    pairs = [(d_RF, _one(up_EDF, expert)) for d_RF, up_EDF in zip(dbefore, ups, strict=True)]
    if len(dbefore[0]) > FEW_ROWS:
        return sum(d_RF @ up_DF.T for d_RF, up_DF in pairs)
    # The CPU's library copies the right operand into its own layout: here that is the rows, not
    # the weights. Without the barrier the compiler would transpose the matmul back.
    return lax.optimization_barrier(sum(up_DF @ d_RF.T for d_RF, up_DF in pairs)).T


def _rows(a_ND, start, size):
    return lax.dynamic_slice(a_ND, (start, 0), (size, a_ND.shape[1]))


def _write(a_ND, rows_RD, start):
    return lax.dynamic_update_slice(a_ND, rows_RD, (start, 0))


def _one(weights, expert):
    return lax.dynamic_index_in_dim(weights, expert, keepdims=False)


def _add(total, expert, a, b, first: bool):
    """total[expert] += a^T b in total's type; for the `first` block, total[expert] = a^T b."""
    new = lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=total.dtype)
    summed = new if first else _one(total, expert) + new
    return lax.dynamic_update_index_in_dim(total, summed, expert, 0)


def _zeros(shape, dtype=None, *, like):
    """Zeros that vary over the mesh as `like` does."""
    return jnp.zeros_like(like, shape=shape, dtype=dtype)
