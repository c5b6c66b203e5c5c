"""Compile one layer's step for an H100, which need not be here; print what the compiler says.

python tests/cuda_layer.py KERNEL ROWS EXPERTS WIDTH HIDDEN, with the wheels jax-cuda13-pjrt and
nvidia-cuda-nvcc (its bin/ on PATH), and for our kernels jax-cuda13-plugin. Prints JSON: bytes of
temporaries, numbers in the largest array, how many of our kernels were compiled for sm_90a, and
the bytes of registers that they spill.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import sys
import tempfile

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",  # to standard output
}

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from layers.kernels.grouped_matmul import grouped_feed_forward, spare_rows


def main(kernel, rows, experts, width, hidden):
    target = pathlib.Path(__file__).with_name("h100.txtpb").read_text()
    slice_of_one = topologies.get_topology_desc("", "cuda", target_config=target, topology="1x1x1")
    here = jax.sharding.SingleDeviceSharding(slice_of_one.devices[0])

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def step(x_ND, combine_N, ups, down_EFD, count_E, dy_ND):
        def feed_forward(*given):
            return grouped_feed_forward(*given, count_E, gated, kernel)

        y_ND, pull = jax.vjp(feed_forward, x_ND, combine_N, ups, down_EFD)
        return y_ND, pull(dy_ND)

    rows += spare_rows(rows, experts, kernel) if kernel == "hopper" else 0
    x_ND, up_EDF = array(rows, width), array(experts, width, hidden)
    combine_N, down_EFD = array(rows, dtype=jnp.float32), array(experts, hidden, width)
    args = x_ND, combine_N, (up_EDF, up_EDF), down_EFD, array(experts, dtype=jnp.int32), x_ND
    with captured_output() as said:
        program = jax.jit(step).lower(*args).compile()
    shapes = re.findall(r"\b(?:bf16|f32|s32|pred)\[([\d,]+)\]", program.as_text() or "")
    memory = program.memory_analysis()
    assert memory is not None
    figures = {
        "temporaries": memory.temp_size_in_bytes,
        "largest": max(math.prod(map(int, dims.split(","))) for dims in shapes),
        "kernels": len(re.findall(r"Compiling entry function .* for 'sm_90a'", said[0])),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said[0]))),
    }
    print(json.dumps(figures))


@contextlib.contextmanager
def captured_output():
    """A list that then holds what was written to standard output and error, by C++ too."""
    said, streams = [], (1, 2)
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(stream) for stream in streams]
        for stream in streams:
            os.dup2(file.fileno(), stream)
        try:
            yield said
        finally:
            for stream, old in zip(streams, kept, strict=True):
                os.dup2(old, stream)
            file.seek(0)
            said.append(file.read().decode())


def gated(up, gate):
    return up * jax.nn.silu(gate)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
