"""Time saved by flattening rows before a matmul (layers/linear.py), in a feed-forward's gradient.

python benchmarks/linear.py --json=benchmarks/results/linear.json
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from moe.machine import hardware
from moe.machine.allocator import keep_freed_memory

BATCH, TOKENS, WIDTH, HIDDEN = 32, 128, 128, 512


def gated(multiply, weights, x):
    up, gate, down = weights
    return multiply(jax.nn.silu(multiply(x, gate)) * multiply(x, up), down)


def direct(x, weight):
    return x @ weight


def flattened(x, weight):
    return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], -1)


def milliseconds(multiply, weights, x) -> float:
    """Median milliseconds of the gradient by all weights and the input, over 15 runs."""
    gradient = jax.jit(jax.grad(lambda w, x: jnp.square(gated(multiply, w, x)).sum(), (0, 1)))
    times = []
    for _ in range(16):
        start = time.perf_counter()
        jax.block_until_ready(gradient(weights, x))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def measure() -> dict[str, float]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    weights = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    x = jax.random.normal(keys[3], (BATCH, TOKENS, WIDTH))
    return {f.__name__: milliseconds(f, weights, x) for f in (direct, flattened)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    path = parser.parse_args().json
    result = {
        "device": hardware.describe_device(),
        "jax": jax.__version__,
        "shape": {"batch": BATCH, "tokens": TOKENS, "width": WIDTH, "hidden": HIDDEN},
        "milliseconds_gradient": {"allocator_default": measure()},
    }
    keep_freed_memory()
    result["milliseconds_gradient"]["allocator_keeps_memory"] = measure()
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
