"""Attention in chunks of queries: milliseconds and temporary bytes of forward and backward.

    python benchmarks/attention.py --json=benchmarks/results/attention.json

A causal layer of width 256 with 4 heads and rotary positions, on 4,096 tokens in sequences of each
length. Chunk sizes take turns, each after a warm-up call; bytes are the compiler's temporaries.
"""

import argparse
import json
from pathlib import Path
import statistics

from flax import nnx
import jax
import jax.numpy as jnp

from layers.attention import Attention
from moe.bench.routers import timed
from moe.machine import hardware
from moe.machine.allocator import keep_freed_memory
from routing import initialize

TOKENS, WIDTH, HEADS = 4096, 256, 4
LENGTHS, CHUNKS, ROUNDS = (256, 512, 1024, 2048, 4096), (None, 2048, 1024, 512, 256, 128), 7


def gradients(length: int, chunk: int | None):
    """The compiled gradients of a layer, and their arguments."""
    graph, state = nnx.split(initialize(Attention(WIDTH, HEADS, chunk=chunk), 0))
    x_BTD = jax.random.normal(jax.random.key(0), (TOKENS // length, length, WIDTH))
    place_BT = jnp.broadcast_to(jnp.arange(length), x_BTD.shape[:2])

    def loss(state, x_BTD):
        return jnp.sum(nnx.merge(graph, state)(x_BTD, place_BT, jnp.ones_like(place_BT)) ** 2)

    return jax.jit(jax.grad(loss, (0, 1))).lower(state, x_BTD).compile(), (state, x_BTD)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    keep_freed_memory()
    found = {"device": hardware.describe_device(), "jax": jax.__version__, "rows": []}
    for length in LENGTHS:
        chunks = [chunk for chunk in CHUNKS if chunk is None or chunk < length]
        runs = {chunk: gradients(length, chunk) for chunk in chunks}
        seconds = {chunk: [] for chunk in chunks}
        for _ in range(ROUNDS):
            for chunk, (run, arguments) in runs.items():
                timed(run, *arguments)
                seconds[chunk].append(timed(run, *arguments))
        for chunk, (run, _) in runs.items():
            row = {
                "length": length,
                "chunk": chunk,
                "milliseconds": round(1e3 * statistics.median(seconds[chunk]), 1),
                "bytes": run.memory_analysis().temp_size_in_bytes,
            }
            found["rows"].append(row)
            print(row, flush=True)
    given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
