"""Hopper kernel: the gradient of each expert's weights, summed over its blocks of rows.

N rows in blocks of one expert each (`row_blocks`), D width, F columns, E experts.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from layers.kernels import hopper_tiles as tiles
from layers.kernels.row_blocks import BLOCK_ROWS, Blocks


def tile_of(width: int, columns: int) -> tiles.Tile:
    """The tile for gradients (D, F), multiples of 64 of which one is a multiple of 128."""
    if width % 128 == 0:
        return tiles.Tile(64, tiles.widest(columns))
    return tiles.Tile(64, tiles.widest(columns // 2, most=128), by_rows=False)


def weight_gradient(
    x_ND: Float[Array, "N D"],
    dy_NF: Float[Array, "N F"],
    blocks: Blocks,
    tile: tiles.Tile | None = None,
    multiprocessors: int = tiles.MULTIPROCESSORS,
    interpret=None,
) -> jax.Array:
    """(E, D, F): as `row_blocks.weight_gradient`. Padding within an expert's blocks must be 0."""
    width, columns = x_ND.shape[1], dy_NF.shape[1]
    tile = tile or tile_of(width, columns)
    assert width % tile.block_rows == 0 and columns % tile.block_columns == 0, (tile, width)
    kernel = tiles.launch(
        functools.partial(_kernel, tile=tile),
        tiles.like((len(blocks.first_E), width, columns), x_ND.dtype),
        multiprocessors=multiprocessors,
        interpret=interpret,
    )
    return kernel(x_ND, dy_NF, blocks.first_E, blocks.blocks_E)


def _kernel(x_ref, dy_ref, first_ref, blocks_ref, dw_ref, *, tile: tiles.Tile):
    (experts, width, columns), dtype = dw_ref.shape, x_ref.dtype
    operands = [
        tiles.operand((tiles.STEP, size), lambda k: (k, 0), dtype)
        for size in (tile.block_rows, tile.block_columns)
    ]

    def one_tile(index, memory, out_s, warpgroup):
        expert, down, across = index
        steps = blocks_ref[expert] * (BLOCK_ROWS // tiles.STEP)
        # From the expert's first row on; its steps end before the next expert's.
        rows = pl.ds(pl.multiple_of(first_ref[expert], BLOCK_ROWS), x_ref.shape[0])
        rows_of_dw = pl.ds(down * tile.block_rows, tile.block_rows)
        columns_of_dw = pl.ds(across * tile.block_columns, tile.block_columns)
        own_rows, own_columns = tile.halves(warpgroup)

        def compute(run):
            @functools.partial(pl.run_scoped, sums=tiles.accumulator(tile))
            def _(sums):
                run(sums)
                target = dw_ref.at[expert].at[rows_of_dw, columns_of_dw].at[own_rows, own_columns]
                tiles.store([sums[...].astype(dtype)], [target], out_s, warpgroup)

        def step(_, x_s, dy_s, sums):
            own_x = x_s.at[:, own_rows] if tile.by_rows else x_s
            own_dy = dy_s if tile.by_rows else dy_s.at[:, own_columns]
            plgpu.wgmma(sums, own_x.transpose((1, 0)), own_dy)
            plgpu.wgmma_wait(1)
            return sums

        run = tiles.pipeline(step, compute, steps, operands)
        run(x_ref.at[rows, rows_of_dw], dy_ref.at[rows, columns_of_dw], allocations=memory)

    allocations = tiles.pipeline(tiles.nothing, tiles.nothing, tiles.STAGES, operands)
    allocations = allocations.get_allocations(x_ref, dy_ref)
    grid = (experts, width // tile.block_rows, columns // tile.block_columns)
    tiles.on_every_tile(grid, allocations, dtype, one_tile)
