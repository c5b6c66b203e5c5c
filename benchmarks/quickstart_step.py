"""Seconds per training step of the quickstart and of alternatives to its settings.

    python benchmarks/quickstart_step.py --json=benchmarks/results/quickstart_step.json

Each row is the quickstart with some settings changed. The rows take turns, so that a busy moment of
the machine slows all of them. Only the row with the default allocator runs by itself, before the
others: once the allocator keeps freed memory, that can't be undone.
"""

import argparse
import json
from pathlib import Path
import statistics

import jax
from steps import CompiledStep, in_turns

from moe.machine import hardware
from moe.machine.allocator import keep_freed_memory

SHIPPED = "as shipped"
ROWS = {
    SHIPPED: (),
    "all activations kept": ("Transformer.remat = 'none'",),
    "all activations recomputed": ("Transformer.remat = 'full'",),
    "layers unrolled": ("Transformer.scan = False",),
    "slots, capacity 1": ("MoELayer.dispatcher = @SlotGather()", "Capacity.factor = 1.0"),
    "slots, capacity 1.25": ("MoELayer.dispatcher = @SlotGather()", "Capacity.factor = 1.25"),
    "Muon": ("train.optimizer = @Muon()",),
    "dense": ("Transformer.moe = None", "FeedForward.d_ff = 512"),
}
FILES = ("quickstart.gin",)
ROUNDS, STEPS = 5, 3


def result(row: CompiledStep, peak: float) -> dict[str, float]:
    median = statistics.median(row.seconds)
    return {
        "milliseconds_median": 1e3 * median,
        "milliseconds_least": 1e3 * min(row.seconds),
        "utilisation": row.flops / median / peak,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    path = Path(parser.parse_args().json)
    before = CompiledStep(FILES, ROWS[SHIPPED])
    before.run(ROUNDS * STEPS)
    keep_freed_memory()
    rows = {name: CompiledStep(FILES, bindings) for name, bindings in ROWS.items()}
    peak = in_turns(rows.values(), ROUNDS, STEPS)
    results = {"as shipped, default allocator": result(before, peak)}
    results |= {name: result(row, peak) for name, row in rows.items()}
    head = {"device": hardware.describe_device(), "jax": jax.__version__, "matmul_peak_flops": peak}
    path.write_text(json.dumps({**head, "rows": results}, indent=2) + "\n", encoding="utf-8")
    for name, found in results.items():
        print(
            f"{name:<32} {found['milliseconds_median']:6.0f} ms  "
            f"utilisation {found['utilisation']:.2f}"
        )


if __name__ == "__main__":
    main()
