"""Hopper kernel: two matmuls of the same rows and the hidden units of both, in one pass.

N rows in blocks of one expert each (`row_blocks`), D width, F columns, E experts.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from layers.kernels import hopper_tiles as tiles
from layers.kernels.row_blocks import BLOCK_ROWS, Blocks


def gated(
    x_ND: Float[Array, "N D"],
    up_EDF: jax.Array,
    gate_EDF: jax.Array,
    combine_N: Float[Array, " N"],
    blocks: Blocks,
    activate,
    multiprocessors: int = tiles.MULTIPROCESSORS,
    interpret=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `row_blocks.gated`, with hidden units of float32 sums, before they are rounded."""
    (rows, width), columns = x_ND.shape, up_EDF.shape[2]
    tile = tiles.Tile(64, tiles.widest(columns, most=128))
    assert rows % BLOCK_ROWS == 0 and tiles.fits(width), (rows, width)
    kernel = tiles.launch(
        functools.partial(_kernel, tile=tile, activate=activate),
        (tiles.like((rows, columns), x_ND.dtype),) * 3,
        multiprocessors=multiprocessors,
        interpret=interpret,
    )
    return tuple(kernel(x_ND, up_EDF, gate_EDF, combine_N, blocks.expert_B, blocks.used_1))


def _kernel(x_ref, up_ref, gate_ref, combine_ref, expert_ref, used_ref, *out_refs, tile, activate):
    width, dtype = x_ref.shape[1], x_ref.dtype
    n_across = out_refs[0].shape[1] // tile.columns
    in_weight = tiles.operand((tiles.STEP, tile.columns), lambda k: (k, 0), dtype)
    in_x = tiles.operand((BLOCK_ROWS, tiles.STEP), lambda k: (0, k), dtype)
    steps, operands = width // tiles.STEP, [in_x, in_weight, in_weight]

    def one_tile(index, memory, out_s, warpgroup):
        block, across = lax.div(index[0], n_across), lax.rem(index[0], n_across)
        expert = expert_ref[block]
        rows = pl.ds(block * BLOCK_ROWS, BLOCK_ROWS)
        columns = pl.ds(across * tile.columns, tile.columns)
        own_rows, _ = tile.halves(warpgroup)

        def compute(run):
            scoped = functools.partial(
                pl.run_scoped, up=tiles.accumulator(tile), gate=tiles.accumulator(tile)
            )

            @scoped
            def _(up, gate):
                run((up, gate))
                up, gate = up[...], gate[...]
                own = combine_ref.at[rows].at[own_rows][...]
                combine = lax.broadcast_in_dim(own, up.shape, (0,))
                results = [a.astype(dtype) for a in (activate(up, gate) * combine, up, gate)]
                targets = [ref.at[rows, columns].at[own_rows] for ref in out_refs]
                tiles.store(results, targets, out_s, warpgroup)

        def step(_, x_s, up_s, gate_s, sums):
            for sum_of_one, weight_s in zip(sums, (up_s, gate_s), strict=True):
                plgpu.wgmma(sum_of_one, x_s.at[own_rows], weight_s)
            plgpu.wgmma_wait(2)
            return sums

        run = tiles.pipeline(step, compute, steps, operands)
        weights = (ref.at[expert].at[:, columns] for ref in (up_ref, gate_ref))
        run(x_ref.at[rows], *weights, allocations=memory)

    allocations = tiles.pipeline(tiles.nothing, tiles.nothing, steps, operands)
    allocations = allocations.get_allocations(x_ref, up_ref.at[0], gate_ref.at[0])
    tiles.on_every_tile((used_ref[0] * n_across,), allocations, dtype, one_tile)
