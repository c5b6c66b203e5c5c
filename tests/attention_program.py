"""Compile attention for devices that need not be here; print what the compiler says as JSON.

python tests/attention_program.py TOPOLOGY KERNEL LENGTH, with the compiler of that topology
(extras plan and plan-cuda). Forward and backward of 2 * 2048 tokens a device, or one longer
sequence, 16 heads of width 128 over 4 key-value heads, in bfloat16; KERNEL as in
`Attention.implementation`.
"""

import json
import os
import sys

from moe.planning import wheels
from moe.planning.chips import Topology

os.environ |= wheels.environment(gpu=Topology.read(sys.argv[1]).is_gpu)

import jax
import jax.numpy as jnp

from layers.kernels.attention import Pattern, attend, choose
from layers.logical_axes import sharding_rules
from moe.model import sharding
from moe.planning import compilers


def main(topology, kernel, length):
    devices, reason = compilers.described(Topology.read(topology))
    assert reason is None, reason
    mesh = sharding.MeshShape(data=1, fsdp=-1).build(devices)
    batch = len(devices) * max(1, 4096 // length)

    def array(*shape, dtype=jnp.bfloat16):
        axes = ("batch", *(None for _ in shape[1:]))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding(mesh, axes, shape))

    query, key = array(batch, length, 16, 128), array(batch, length, 4, 128)
    ids = array(batch, length, dtype=jnp.int32)

    def gradients(query, key, value, position, segment):
        def total(query, key, value):
            with sharding_rules(sharding.rule(mesh), devices[0]):
                chosen = choose(kernel, Pattern(), query, key.shape[2]).kernel
                found.append(chosen)
                y = attend(query, key, value, position, segment, Pattern(), chosen, chunk=1024)
            return jnp.sum(y.astype(jnp.float32))

        return jax.grad(total, (0, 1, 2))(query, key, value)

    found = []
    with compilers.assuming_cudnn():
        program = jax.jit(gradients).lower(query, key, key, ids, ids).compile()
    figures = {
        "kernel": found[0],
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "cudnn": program.as_text().count("__cudnn$fmha"),
        "pallas": program.as_text().count("tpu_custom_call"),
        "collectives": program.as_text().count("all-"),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
