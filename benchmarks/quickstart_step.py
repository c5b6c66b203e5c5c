"""Why the quickstart is set up as it is: seconds per step of its alternatives, taken in turns.

    python benchmarks/quickstart_step.py --json=benchmarks/results/quickstart_step.json

Every row is the quickstart with some settings changed. The rows take turns, so that a busy moment
of the machine hits all of them; the first row alone runs before the allocator is told to keep
freed memory, which can't be taken back.
"""

import argparse
import json
from pathlib import Path
import statistics
import time
from typing import Any

import gin
import jax

from moe import assemble, gin_files, hardware
from moe.allocator import keep_freed_memory
from moe.objective import NextToken
from moe.sharding import MeshShape
from moe.step import to_devices

SHIPPED = "as shipped"
ROWS = {
    SHIPPED: (),
    "all activations kept": ("Transformer.remat = 'none'",),
    "all activations recomputed": ("Transformer.remat = 'full'",),
    "layers unrolled": ("Transformer.scan = False",),
    "capacity 1.25": ("Capacity.factor = 1.25",),
    "capacity over the batch": ("MoELayer.sequences_per_group = 32",),
    "Muon": ("train.optimizer = @Muon()",),
    "dense": ("Transformer.moe = None", "FeedForward.d_ff = 512"),
}
ROUNDS, STEPS = 5, 3


class Row:
    """A compiled step and the seconds that it took."""

    def __init__(self, bindings: tuple[str, ...]):
        gin_files.load(["quickstart.gin"], bindings)
        run = gin.get_bindings("train")
        text = run["data"].prepare()
        batch, length = run["batch_size"], run["sequence_length"]
        size = {"batch_size": batch, "sequence_length": length}
        model = assemble.assemble(
            run["model"], NextToken(), token_vocabulary=text.tokenizer.vocab_size, **size
        )
        self.flops = model.costs.flops_per_token * batch * length
        settings: dict[str, Any] = {"steps": run["steps"], "seed": 0, "accumulate": 1}
        program = assemble.program(
            model, run["optimizer"], MeshShape().build(), batch_size=batch, **settings
        )
        self.step, self.state = program.step, program.init(0)
        rows = text.train_batches(batch, length, 0).batch(0)
        self.batch = to_devices(rows, program.batch_sharding, batch)
        self.seconds: list[float] = []
        self.run(1)
        self.seconds.clear()  # the first step compiled

    def run(self, steps: int) -> None:
        for _ in range(steps):
            start = time.perf_counter()
            self.state, measured = self.step(self.state, self.batch)
            jax.block_until_ready((self.state.params, measured.loss))
            self.seconds.append(time.perf_counter() - start)

    def result(self, peak: float) -> dict[str, float]:
        median = statistics.median(self.seconds)
        return {
            "milliseconds_median": 1e3 * median,
            "milliseconds_least": 1e3 * min(self.seconds),
            "utilisation": self.flops / median / peak,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    path = Path(parser.parse_args().json)
    peaks = [hardware.matmul_peak()]
    before = Row(ROWS[SHIPPED])
    before.run(ROUNDS * STEPS)
    keep_freed_memory()
    rows = {name: Row(bindings) for name, bindings in ROWS.items()}
    for _ in range(ROUNDS):
        peaks.append(hardware.matmul_peak())
        for row in rows.values():
            row.run(STEPS)
    peak = statistics.median(peaks)
    results = {"as shipped, default allocator": before.result(peak)}
    results |= {name: row.result(peak) for name, row in rows.items()}
    head = {"device": hardware.describe_device(), "jax": jax.__version__, "matmul_peak_flops": peak}
    path.write_text(json.dumps({**head, "rows": results}, indent=2) + "\n", encoding="utf-8")
    for name, result in results.items():
        print(
            f"{name:<32} {result['milliseconds_median']:6.0f} ms  "
            f"utilisation {result['utilisation']:.2f}"
        )


if __name__ == "__main__":
    main()
