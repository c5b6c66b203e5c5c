"""The share of the machine's matmul peak that a whole training step uses.

    python benchmarks/step_utilisation.py --json=benchmarks/results/step_utilisation.json

Each dispatcher's step (forward, backward, optimizer) of a config (31 M parameters by default) takes
turns. FLOPs count the chosen experts and the causal half of attention, without recomputation; with
dropping, only assignments that were kept. The peak is a matmul's, measured between the turns.
"""

import argparse
import json
from pathlib import Path
import statistics

import jax
from steps import CompiledStep, in_turns

from moe.machine import hardware
from moe.machine.allocator import keep_freed_memory
from moe.training import metrics

VARIANTS = {
    "Sorted, nothing dropped": (),
    "SlotGather, capacity 1.0": ("MoELayer.dispatcher = @SlotGather()", "Capacity.factor = 1.0"),
}
ROUNDS, STEPS = 5, 2


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--gin_file", default="thirty_million.gin")
    given = parser.parse_args()
    keep_freed_memory()
    rows = {name: CompiledStep([given.gin_file], bindings) for name, bindings in VARIANTS.items()}
    peak = in_turns(rows.values(), ROUNDS, STEPS)
    found = {"device": hardware.describe_device(), "jax": jax.__version__, "config": given.gin_file}
    found |= {"matmul_peak_flops": peak, "rows": []}
    for name, row in rows.items():
        seconds = statistics.median(row.seconds)
        kept = row.kept_per_token()
        speed = metrics.speed_scalars(row.tokens, seconds, row.costs, kept, peak)
        result = {
            "dispatcher": name,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(row.tokens / seconds),
            "kept_per_token": round(kept, 4),
            "effective_utilisation": round(speed["speed/effective_utilisation"], 4),
            "parameters_total": row.costs.parameters_total,
            "parameters_active": row.costs.parameters_active,
        }
        found["rows"].append(result)
        print(result)
    given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
