"""The share of a sweep's time outside of training steps: 40 short trials of `nano`.

    python benchmarks/sweep_overhead.py --json=benchmarks/results/sweep_overhead.json

One `moe sweep --run`, from its first line to its last, with a worker for each core: 34 learning
rates, three reported runs and three of the control. What counts as outside is all that a worker's
time holds beside the steps: starting processes, text, loading or compiling the program, the final
evaluation, writing, and waiting for the last trial.
"""

import argparse
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import time

from moe.machine import hardware
from moe.sweeps.worker import places

SWEEP = """
sweep.question = "Which learning rate is best?"
sweep.base = ("runs/nano.gin", "routers/top_k.gin", {changes})
sweep.arms = {{"top_k": ()}}
sweep.baseline = "top_k"
sweep.tune = {{"AdamW.learning_rate": (3e-3, 3e-2, "log")}}
sweep.trials = {trials}
sweep.seeds = {seeds}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--trials", type=int, default=34)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval_bytes", type=int, default=200_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    settings = f"train.steps = {given.steps}", f"train.final_eval_bytes = {given.eval_bytes}"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "overhead.gin")
        changes = ", ".join(map(repr, settings))
        config.write_text(SWEEP.format(changes=changes, trials=given.trials, seeds=given.seeds))
        out = Path(folder, "sweep")
        flags = [f"--gin_file={config}", f"--folder={out}", "--run"]
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "moe", "sweep", *flags], check=True)
        elapsed = time.monotonic() - started
        rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    steps = [row["train_seconds"] for row in rows]
    workers = len(places(0))
    found = {
        "device": hardware.describe_device(),
        "settings": settings,
        "trials": len(rows),
        "workers": workers,
        "seconds_of_the_whole": elapsed,
        "seconds_of_steps_per_trial": sum(steps) / len(steps),
        "share_outside_of_steps": 1 - sum(steps) / (workers * elapsed),
    }
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
