"""Hopper kernel: blocks of rows by their experts' weights, as they are or transposed.

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

# Numbers in one expert's weights from which clusters load rows once for two blocks. Of the two
# sizes that were timed, 2 Mi ran faster without and 56 Mi with.
CLUSTER_WEIGHTS = 2**24


def tile_of(width: int, columns: int, transpose: bool) -> tiles.Tile:
    """The tile for weights (D, F): the fastest of those timed on an H100, where it divides F."""
    cluster = 2 if width * columns >= CLUSTER_WEIGHTS and columns % 512 == 0 else 1
    if transpose and columns % 256 == 0:
        return tiles.Tile(128, 128, by_rows=False, cluster=cluster)
    return tiles.Tile(64, tiles.widest(columns), cluster=cluster)


def matmul(
    x_ND: Float[Array, "N D"],
    weight_EDF: jax.Array,
    blocks: Blocks,
    transpose: bool = False,
    tile: tiles.Tile | None = None,
    multiprocessors: int = tiles.MULTIPROCESSORS,
    interpret=None,
) -> jax.Array:
    """(N, F): as `row_blocks.matmul`; rows of blocks that are not in use stay undefined."""
    rows, width = x_ND.shape
    columns = weight_EDF.shape[1 if transpose else 2]
    tile = tile or tile_of(width, columns, transpose)
    across = tile.block_columns * tile.cluster
    assert tile.block_rows == BLOCK_ROWS and rows % BLOCK_ROWS == 0, (tile, rows)
    assert columns % across == 0 and tiles.fits(width), (tile, width, columns)
    kernel = tiles.launch(
        functools.partial(_kernel, tile=tile, transpose=transpose),
        tiles.like((rows, columns), x_ND.dtype),
        tile.cluster,
        multiprocessors,
        interpret,
    )
    return kernel(x_ND, weight_EDF, blocks.expert_B, blocks.used_1)


def _kernel(x_ref, weight_ref, expert_ref, used_ref, y_ref, *, tile: tiles.Tile, transpose: bool):
    width, dtype = x_ref.shape[1], x_ref.dtype
    n_across = y_ref.shape[1] // (tile.block_columns * tile.cluster)
    in_x = tiles.operand((BLOCK_ROWS, tiles.STEP), lambda k: (0, k), dtype, tile.cluster)
    if transpose:
        in_weight = tiles.operand((tile.block_columns, tiles.STEP), lambda k: (0, k), dtype)
    else:
        in_weight = tiles.operand((tiles.STEP, tile.block_columns), lambda k: (k, 0), dtype)
    steps, operands = width // tiles.STEP, [in_x, in_weight]

    def one_tile(index, memory, out_s, warpgroup):
        block, across = lax.div(index[0], n_across), lax.rem(index[0], n_across)
        expert = expert_ref[block]
        rows = pl.ds(block * BLOCK_ROWS, BLOCK_ROWS)
        column = across * tile.cluster + lax.axis_index("cluster")
        columns = pl.ds(column * tile.block_columns, tile.block_columns)
        own_rows, own_columns = tile.halves(warpgroup)

        def compute(run):
            @functools.partial(pl.run_scoped, sums=tiles.accumulator(tile))
            def _(sums):
                run(sums)
                target = y_ref.at[rows, columns].at[own_rows, own_columns]
                tiles.store([sums[...].astype(dtype)], [target], out_s, warpgroup)

        def step(_, x_s, weight_s, sums):
            if transpose:
                own = weight_s if tile.by_rows else weight_s.at[own_columns]
                own = own.transpose((1, 0))
            else:
                own = weight_s if tile.by_rows else weight_s.at[:, own_columns]
            plgpu.wgmma(sums, x_s.at[own_rows] if tile.by_rows else x_s, own)
            plgpu.wgmma_wait(1)
            return sums

        weight = weight_ref.at[expert]
        weight = weight.at[columns] if transpose else weight.at[:, columns]
        run = tiles.pipeline(step, compute, steps, operands)
        run(x_ref.at[rows], weight, allocations=memory)

    allocations = tiles.pipeline(tiles.nothing, tiles.nothing, steps, operands)
    allocations = allocations.get_allocations(x_ref, weight_ref.at[0])
    tiles.on_every_tile((used_ref[0] * n_across,), allocations, dtype, one_tile)
