"""What the kernels for NVIDIA's Hopper cards share: tiles, how they lie in memory, their pipeline.

A block of three warpgroups computes one tile after another: one warpgroup loads (TMA), two multiply
(wgmma), each its half of the tile, with the accumulators in registers; results leave through shared
memory. As many blocks run as the card has multiprocessors.
"""

import dataclasses
import functools
import itertools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

# The step along the summed axis, and how many steps are loaded ahead.
STEP, STAGES = 64, 4
# A part of the results on its way out, and how many parts each warpgroup has on the way.
PART, PARTS = 64, 2
# Multiprocessors of an H100 SXM, where the device doesn't say.
MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile of results that a block computes.

    Attributes:
        rows: of one warpgroup.
        columns: of one warpgroup.
        by_rows: whether the two warpgroups share the columns and split the rows; otherwise they
            share the rows and split the columns.
        cluster: blocks beside each other that load the left operand once for all (TMA multicast).
    """

    rows: int
    columns: int
    by_rows: bool = True
    cluster: int = 1

    @property
    def block_rows(self) -> int:
        return self.rows * (2 if self.by_rows else 1)

    @property
    def block_columns(self) -> int:
        return self.columns * (1 if self.by_rows else 2)

    def halves(self, warpgroup):
        """The rows and the columns of one warpgroup within the block's tile."""
        if self.by_rows:
            return pl.ds(warpgroup * self.rows, self.rows), slice(None)
        return slice(None), pl.ds(warpgroup * self.columns, self.columns)


def widest(size: int, most: int = 256) -> int:
    """The widest tile of at most `most` columns that divides `size`, a multiple of 64."""
    return next(n for n in (256, 128, 64) if n <= most and size % n == 0)


def fits(summed: int) -> bool:
    """Whether a matmul may sum over so many numbers: two whole steps or more."""
    return summed % STEP == 0 and summed > STEP


def layout(columns: int, dtype) -> tuple:
    """How an array of so many columns lies in shared memory, as wgmma and TMA want it."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(min(columns, STEP) * bits)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def operand(shape, index, dtype, cluster: int = 1):
    """A tile of an operand, loaded ahead; a cluster's blocks share it."""
    return plgpu.BlockSpec(
        shape,
        index,
        transforms=layout(shape[1], dtype),
        memory_space=plgpu.SMEM,
        delay_release=1,
        collective_axes=("cluster",) if cluster > 1 else (),
    )


def pipeline(step, compute, steps, operands):
    """Calls step(_, *tiles, accumulators) `steps` times while the next tiles are loaded."""
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=40,
        wg_axis="warpgroup",
        num_compute_wgs=2,
        max_concurrent_steps=STAGES,
        compute_context=compute,
        in_specs=operands,
    )


def nothing(*_, **__):
    """In place of a step, where only the pipeline's memory is asked for."""


def outgoing(dtype):
    """Shared memory for results on their way out."""
    return plgpu.SMEM((2, PARTS, PART, PART), dtype, transforms=layout(PART, dtype))


def store(results, targets, out_s, warpgroup) -> None:
    """Write each of `results` (rows, columns), which lie in registers, to its target, in parts.

    A part waits for nothing but the one whose room it takes, of the tile before too.
    """
    sent = 0
    for result, target in zip(results, targets, strict=True):
        for row, column in itertools.product(*(range(0, size, PART) for size in result.shape)):
            room = sent % PARTS
            part = slice(row, row + PART), slice(column, column + PART)
            plgpu.wait_smem_to_gmem(PARTS - 1, wait_read_only=True)
            out_s[warpgroup, room] = result[part]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[warpgroup, room], target.at[part])
            sent += 1
    if sent % PARTS:  # the next tile's first part takes the first room again
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def accumulator(tile: Tile):
    return plgpu.WGMMAAccumulatorRef((tile.rows, tile.columns), jnp.float32)


def launch(body, results, cluster: int = 1, multiprocessors: int = MULTIPROCESSORS, interpret=None):
    """The kernel of `body` as a function of arrays; results: their shapes and types."""
    return plgpu.kernel(
        body,
        out_type=results,
        grid=(max(1, multiprocessors // cluster),),
        grid_names=("processor",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
    )


def on_every_tile(tiles, allocations, dtype, one_tile):
    """Call one_tile(index, memory, out_s, warpgroup) for the tiles of this block.

    tiles: sizes of the grid of tiles. allocations: of the pipeline, used by one tile after another.
    """

    @functools.partial(
        pl.run_scoped, memory=allocations, out_s=outgoing(dtype), collective_axes="warpgroup"
    )
    def _(memory, out_s):
        warpgroup = lax.axis_index("warpgroup")

        @plgpu.nd_loop(tiles, collective_axes="processor")
        def _(info):
            one_tile(info.index, memory, out_s, warpgroup)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def like(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
