"""Feed-forward experts on rows in blocks of one expert each, by kernels for NVIDIA's Hopper cards.

N rows in blocks (`row_blocks`), D width, F hidden width, E experts. Exact at any balance: an expert
has as many blocks as its rows fill, and an empty one none. Elsewhere than on CUDA the same program
loops over blocks.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from layers.kernels import row_blocks
from layers.logical_axes import device

JAX_NEEDED = (0, 11)  # 0.10's Mosaic GPU has another pipeline, which was never timed
WIDTH_MULTIPLE = 64
HIDDEN_MULTIPLE = 128


class Matmuls(NamedTuple):
    """What computes a layer's matmuls: functions with the signatures of those in `row_blocks`."""

    matmul: Callable[..., jax.Array]
    weight_gradient: Callable[..., jax.Array]
    gated: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


REFERENCE = Matmuls(row_blocks.matmul, row_blocks.weight_gradient, row_blocks.gated)


def refusal(on: Any, dtype: Any, width: int) -> str | None:
    """Why the kernels can't serve on this device; None where they can.

    Args:
        on: a device.
        dtype: of rows and weights.
        width: D. F may be anything: it is padded to a multiple of 128.
    """
    if jax.__version_info__[:2] < JAX_NEEDED:
        return f"JAX {jax.__version__} is older than {'.'.join(map(str, JAX_NEEDED))}"
    capability = str(getattr(on, "compute_capability", "none"))
    if capability.split(".")[0] != "9":  # later cards have other instructions than wgmma
        return f"compute capability {capability}, not 9"
    return _misfit(dtype, width)


def _misfit(dtype, width: int) -> str | None:
    """Why the kernels can't take such rows; None where they can."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"{jnp.dtype(dtype)}, not bfloat16"
    if width % WIDTH_MULTIPLE or width == WIDTH_MULTIPLE:
        return f"width {width} is no multiple of {WIDTH_MULTIPLE} from {2 * WIDTH_MULTIPLE} on"
    return None


def mosaic(**settings) -> Matmuls:
    """The kernels, with `multiprocessors` or `interpret` (JAX 0.11 or later)."""
    from layers.kernels import hopper_gated, hopper_matmul, hopper_weight_gradient

    kernels = (hopper_matmul.matmul, hopper_weight_gradient.weight_gradient, hopper_gated.gated)
    return Matmuls(*(_varying(functools.partial(kernel, **settings)) for kernel in kernels))


def _varying(kernel):
    """The kernel with results that vary over a mesh as its rows do, which it does not say."""

    def call(x_ND, *args, **kwargs):
        def typed(y):
            axes = _varies_over(x_ND) - _varies_over(y)
            return lax.pcast(y, tuple(axes), to="varying") if axes else y

        return jax.tree.map(typed, kernel(x_ND, *args, **kwargs))

    return call


def _varies_over(x) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


@functools.cache
def _by_platform(multiprocessors: int | None) -> Matmuls:
    """The kernels where a program is compiled for CUDA, loops over blocks elsewhere."""
    settings = {} if multiprocessors is None else {"multiprocessors": multiprocessors}

    def choice(fast, slow):
        def call(*arrays, **static):
            # Functions such as `activate` are no arrays.
            held = {n: a for n, a in enumerate(arrays) if callable(a)}
            passed = [a for n, a in enumerate(arrays) if n not in held]

            def complete(function, *passed):
                rest = iter(passed)
                args = (held[n] if n in held else next(rest) for n in range(len(arrays)))
                return function(*args, **static)

            return lax.platform_dependent(
                *passed,
                cuda=functools.partial(complete, fast),
                default=functools.partial(complete, slow),
            )

        return call

    return Matmuls(*map(choice, mosaic(**settings), REFERENCE))


def feed_forward(
    x_ND: jax.Array,
    combine_N: jax.Array,
    ups: tuple[jax.Array, ...],
    down_EFD: jax.Array,
    count_E: jax.Array,
    activate: Callable[..., jax.Array],
    matmuls: Matmuls | None = None,
) -> jax.Array:
    """(N, D): as `grouped_feed_forward`, but rows lie in blocks, as `row_blocks` says.

    So do the rows of the output's gradient, which must be zero in an expert's padding. Blocks that
    are not in use are undefined.
    """
    if matmuls is None:
        loops = jax.__version_info__[:2] < JAX_NEEDED or _misfit(x_ND.dtype, x_ND.shape[1])
        processors = getattr(device(), "core_count", None)
        matmuls = REFERENCE if loops else _by_platform(processors)
    more = -down_EFD.shape[1] % HIDDEN_MULTIPLE
    if more:
        ups = tuple(jnp.pad(up_EDF, ((0, 0), (0, 0), (0, more))) for up_EDF in ups)
        down_EFD = jnp.pad(down_EFD, ((0, 0), (0, more), (0, 0)))
    blocks = row_blocks.blocks_of(count_E, len(x_ND))
    return _feed_forward(x_ND, combine_N, ups, down_EFD, blocks, activate, matmuls)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _feed_forward(x_ND, combine_N, ups, down_EFD, blocks, activate, matmuls: Matmuls):
    return _forward(x_ND, combine_N, ups, down_EFD, blocks, activate, matmuls)[0]


def _forward(x_ND, combine_N, ups, down_EFD, blocks, activate, matmuls: Matmuls):
    if len(ups) == 2:
        hidden_NF, *before = matmuls.gated(x_ND, *ups, combine_N, blocks, activate)
        before = [_named(a) for a in before]
    else:
        before = [_named(matmuls.matmul(x_ND, up_EDF, blocks)) for up_EDF in ups]
        hidden_NF = row_blocks.units(activate, combine_N[:, None], *before)
    y_ND = matmuls.matmul(hidden_NF, down_EFD, blocks)
    return y_ND, (x_ND, combine_N, ups, down_EFD, blocks, before)


def _backward(activate, matmuls: Matmuls, saved, dy_ND):
    x_ND, combine_N, ups, down_EFD, blocks, before = saved

    units = functools.partial(row_blocks.units, activate)
    hidden_NF, pull = jax.vjp(units, combine_N[:, None], *before)
    dcombine_N1, *dbefore = pull(matmuls.matmul(dy_ND, down_EFD, blocks, transpose=True))
    dx_ND = sum(
        matmuls.matmul(d_NF, up_EDF, blocks, transpose=True)
        for d_NF, up_EDF in zip(dbefore, ups, strict=True)
    )
    dups = tuple(matmuls.weight_gradient(x_ND, d_NF, blocks) for d_NF in dbefore)
    dcombine_N = dcombine_N1[:, 0]
    return dx_ND, dcombine_N, dups, matmuls.weight_gradient(hidden_NF, dy_ND, blocks), None


_feed_forward.defvjp(_forward, _backward)


def _named(matmul):
    """An experts' matmul under the name by which rematerialisation saves it."""
    return checkpoint_name(matmul, "expert_matmuls")
