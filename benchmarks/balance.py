"""Without a balancing loss the load collapses; does either CV^2 loss, or a bias, repair it?

    python benchmarks/balance.py --json=benchmarks/results/balance.json

`moe train` at half the quickstart's width with 16 experts, for each way of balancing (Shazeer et
al. 2017, table 6; Wang et al. 2024). The load is max over mean of what the routers chose in the
last logged step, the mean over layers; the violation is of the most crowded layer.
"""

import argparse
import json
from pathlib import Path
import statistics
import tempfile

from routers import QUICKSTART, SMALL, call, spread

NOISY = ("routers/noisy_top_k.gin", "NoisyTopK.k = 2", "MoELayer.capacity = @Capacity()")
SIGMOID = ("routers/loss_free.gin", "MoELayer.capacity = @Capacity()")
EASY = "Capacity.factor = 2.0"  # so that dropping doesn't stand in for balancing
WAYS = {
    "noisy top-2, no loss": (*NOISY, EASY, "NoisyTopK.losses = ()"),
    "noisy top-2, importance": (*NOISY, EASY, "NoisyTopK.losses = [@ImportanceLoss()]"),
    "noisy top-2, load": (*NOISY, EASY, "NoisyTopK.losses = [@LoadLoss()]"),
    "noisy top-2, both": (*NOISY, EASY),
    "sigmoid top-2, no loss": (*SIGMOID, EASY, "TopK.balancer = None"),
    "sigmoid top-2, loss-free bias": (*SIGMOID, EASY),
}


def one(way: str, seed: int, steps: int, folder: Path) -> dict:
    """The last load and the held-out bits per byte of one run."""
    config, *bindings = WAYS[way]
    workdir = folder / f"{len(list(folder.iterdir()))}"
    settings = (*QUICKSTART, *SMALL, "MoELayer.num_experts = 16", f"train.seed = {seed}")
    settings = (*settings, f"train.steps = {steps}", *bindings)
    summary = call(
        folder,
        *("train", "--gin_file=quickstart.gin", f"--gin_file={config}", f"--workdir={workdir}"),
        *(f"--gin_bindings={binding}" for binding in settings),
    )
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "way": way,
        "seed": seed,
        "bits_per_byte": summary["val_bits_per_byte"],
        "max_over_mean_load": last["load/max_over_mean"],
        "violation": last["load/max_over_mean_worst"] - 1,
        "dead_experts": last["load/dead_experts"],
    }


def table(runs: list[dict], steps: int) -> str:
    lines = [
        f"After {steps} steps; 16 experts in each of 4 layers.",
        "",
        "| balancing | max/mean load | worst violation | dead of 64 | bits per byte |",
        "|---|---|---|---|---|",
    ]
    for way in dict.fromkeys(run["way"] for run in runs):
        own = [run for run in runs if run["way"] == way]
        dead = statistics.mean(run["dead_experts"] for run in own)
        figures = (
            spread([run[name] for run in own])
            for name in ("max_over_mean_load", "violation", "bits_per_byte")
        )
        load, violation, bits = figures
        lines.append(f"| {way} | {load} | {violation} | {dead:.1f} | {bits} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    path, runs = Path(arguments.json), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for way in WAYS:
                runs.append(one(way, seed, arguments.steps, Path(folder)))
                record = {"steps": arguments.steps, "runs": runs}
                path.write_text(json.dumps(record, indent=2) + "\n")
                text = table(runs, arguments.steps)
                path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
