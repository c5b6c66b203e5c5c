"""Decoding with and without a cache, reading prompts, and experts on a few rows, on this machine.

    python benchmarks/decode.py --json=benchmarks/results/decode.json

The model is the quickstart's with first values: what a step costs doesn't depend on what it says.
Ways that are compared take turns, so that a busy moment of the machine slows both.
"""

import argparse
import functools
import json
from pathlib import Path
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from layers.kernels.grouped_matmul import grouped_feed_forward, spare_rows
from moe.cli import config
from moe.inference.decoder import Decoder, texts_of, tokens_of
from moe.machine import allocator, hardware
from moe.model import functional
from moe.training.abstract_model import Vocabulary

ROUNDS, TURNS, STEPS = 7, 5, 20
LAYERS = {(128, 256, 8): (2, 8, 32, 128), (1024, 512, 32): (4, 32, 128)}  # D, F, E: rows
VOCABULARY = 4096
PROMPTS = (  # texts, tokens of each
    ("quickstart.gin", 32, 128),
    ("thirty_million.gin", 8, 512),
    ("thirty_million.gin", 1, 4096),
)


def seconds(call, *args) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call(*args))
    return time.perf_counter() - started


def decoding() -> dict:
    """Milliseconds per token of the quickstart, by a pass over its 128 tokens and with a cache."""
    spec = config.load(["quickstart.gin"])
    model = spec.build_model(Vocabulary(VOCABULARY))
    values = jax.jit(lambda: functional.initial_values(model.graph, *model.shapes, 0))()
    decoder, length = Decoder(model.graph, *values), spec.sequence_length
    token_BT = np.random.default_rng(0).integers(0, VOCABULARY, (1, length)).astype(np.int32)

    @jax.jit
    def whole(values, token_BT):
        module = model.graph.merge(*values)
        place_BT = jnp.broadcast_to(jnp.arange(length)[None], token_BT.shape)
        hidden_BTD = module(tokens_of(token_BT, place_BT, jnp.ones_like(token_BT))).hidden_BTD
        return module.logits(hidden_BTD[:, -1:])

    half = np.asarray([length // 2], np.int32)
    _, caches = decoder.prefill(token_BT[:, : length // 2], half, length)
    rows, last_B = [], token_BT[:, 0]
    for _ in range(ROUNDS + 1):
        passes = [seconds(whole, values, token_BT) for _ in range(TURNS)]
        steps = []
        for _ in range(STEPS):
            started = time.perf_counter()
            logits_BV, caches, _ = decoder.step(caches, last_B, half)
            jax.block_until_ready(logits_BV)
            steps.append(time.perf_counter() - started)
        rows.append((min(passes), min(steps)))
    passes, steps = (1e3 * np.array(rows[1:]).T).round(3).tolist()
    return {
        "milliseconds_recomputed": statistics.median(passes),
        "milliseconds_cached": statistics.median(steps),
        "times_faster": round(statistics.median(np.divide(passes, steps)), 2),
        "rounds_recomputed": passes,
        "rounds_cached": steps,
    }


def prompts(file: str, texts: int, length: int) -> dict:
    """Milliseconds of reading prompts into a cache, and of the forward pass over them alone."""
    spec = config.load([file])
    model = spec.build_model(Vocabulary(VOCABULARY))
    values = jax.jit(lambda: functional.initial_values(model.graph, *model.shapes, 0))()
    decoder = Decoder(model.graph, *values)
    shape, length_B = (texts, length), np.full(texts, length, np.int32)
    token_BT = np.random.default_rng(0).integers(0, VOCABULARY, shape).astype(np.int32)

    @jax.jit
    def forward(values, token_BT):
        module = model.graph.merge(*values)
        return module.logits(module(texts_of(token_BT, length_B)).hidden_BTD[:, -1:])

    rows = [
        (
            seconds(forward, values, token_BT),
            seconds(lambda: decoder.prefill(token_BT, length_B, 2 * length)[0]),
        )
        for _ in range(ROUNDS + 1)
    ]
    forwards, prefills = 1e3 * np.array(rows[1:]).T
    return {
        "config": file,
        "texts": texts,
        "tokens": length,
        "milliseconds_forward": round(float(np.median(forwards)), 1),
        "milliseconds_prefill": round(float(np.median(prefills)), 1),
        "of_the_forward_pass": round(float(np.median(forwards / prefills)), 3),
    }


def experts(width: int, hidden: int, count: int, rows: int) -> dict:
    """Milliseconds of the experts of one layer on so many rows, by both kernels."""
    draw = np.random.default_rng(0)
    shapes = [(count, width, hidden)] * 2 + [(count, hidden, width)]
    *ups, down = (jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in shapes)
    count_E = np.bincount(draw.integers(0, count, rows), minlength=count).astype(np.int32)
    x_ND = jnp.zeros((rows + spare_rows(rows, count, "loop"), width), jnp.float32)
    calls = [
        jax.jit(functools.partial(grouped_feed_forward, activate=swiglu, kernel=kernel))
        for kernel in ("row_by_row", "loop")
    ]
    given = x_ND, jnp.ones(len(x_ND)), tuple(ups), down, count_E
    found = np.array([[seconds(call, *given) for call in calls] for _ in range(ROUNDS + 2)])[2:]
    one_by_one, blocks = (1e3 * np.median(found, axis=0)).round(3).tolist()
    return {
        "width": width,
        "hidden": hidden,
        "experts": count,
        "rows": rows,
        "milliseconds_row_by_row": one_by_one,
        "milliseconds_blocks": blocks,
    }


def swiglu(up, gate):
    return jax.nn.silu(gate) * up


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    path = Path(parser.parse_args().json)
    allocator.keep_freed_memory()  # as our commands do
    result = {"device": hardware.describe_device(), "decoding": decoding()}
    print(result)
    result["prompts"] = [prompts(*case) for case in PROMPTS]
    for row in result["prompts"]:
        print(row, flush=True)
    result["experts"] = [experts(*layer, rows) for layer, some in LAYERS.items() for rows in some]
    for row in result["experts"]:
        print(row, flush=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
