"""A mixture of experts beside the dense model of equal active parameters, at equal steps, 3 seeds.

    python benchmarks/dense_vs_moe.py --json=benchmarks/results/dense_vs_moe.json

Each run is `moe train` on the quickstart's text at half its width: a model of this size lacks
parameters after a few hundred steps already. The result is bits per byte of all held-out documents.
"""

import argparse
import json
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile

BOTH = (
    "Transformer.d_model = 64",
    "Transformer.num_heads = 1",
    "TrainedBPE.vocab_size = 2048",
    "train.max_seconds = None",
    "train.prompts = ()",
)
RUNS = {
    "moe": (
        "quickstart.gin",
        *("MoELayer.num_experts = 16", "MoELayer.d_ff = 64", "Capacity.factor = 1.25"),
        *("MoELayer.dispatcher = @SlotGather()", "MoELayer.eval_dispatcher = @Sorted()"),
    ),
    "dense": ("quickstart_dense.gin", "FeedForward.d_ff = 128"),
}


def one(name: str, seed: int, steps: int, folder: Path) -> dict:
    """The summary of one run, from a process of its own."""
    path = folder / f"{name}-{seed}.json"
    config, *own = RUNS[name]
    bindings = (*BOTH, *own, f"train.seed = {seed}", f"train.steps = {steps}")
    command = [sys.executable, "-m", "moe", "train", f"--gin_file={config}"]
    command += [f"--gin_bindings={binding}" for binding in bindings]
    command += [f"--workdir={folder / f'{name}-{seed}'}", f"--json={path}"]
    subprocess.run(command, check=True)
    return json.loads(path.read_text())


def table(runs: dict[str, list[dict]], steps: int) -> str:
    """Mean and standard error over seeds, as Markdown."""
    lines = [
        f"Held-out bits per byte after {steps} steps on {runs['moe'][0]['corpus']['name']}.",
        "",
        "| model | parameters | active | bits per byte | seeds |",
        "|---|---|---|---|---|",
    ]
    for name, summaries in runs.items():
        values = [s["val_bits_per_byte"] for s in summaries]
        error = statistics.stdev(values) / len(values) ** 0.5
        first = summaries[0]
        lines.append(
            f"| {name} | {first['parameters_total']:,} | {first['parameters_active']:,} | "
            f"{statistics.mean(values):.4f} ± {error:.4f} | {len(values)} |"
        )
    gains = [
        dense["val_bits_per_byte"] - moe["val_bits_per_byte"]
        for moe, dense in zip(runs["moe"], runs["dense"], strict=True)
    ]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    lines += ["", f"Gain of the MoE, seed by seed: {statistics.mean(gains):.4f} ± {error:.4f}."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    runs: dict[str, list[dict]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for name in RUNS:
                runs[name].append(one(name, seed, arguments.steps, Path(folder)))
    path = Path(arguments.json)
    path.write_text(json.dumps({"steps": arguments.steps, "runs": runs}, indent=2) + "\n")
    text = table(runs, arguments.steps)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
