"""Every router on the quickstart's text, at equal steps: quality, leak, load, drops, parameters.

    python benchmarks/routers.py --json=benchmarks/results/routers.json

Each run is `moe train` with one file of configs/routers/. `bits per byte` is of all held-out
documents, every router by its evaluation rule. `training rule` is the same text with the router
deciding as in training; what it is better by than the evaluation rule is what the router saw of
the future (or what noise and dropping cost it, where it is worse). --small trains at half the
quickstart's width with 16 experts, where a run takes half a minute.
"""

import argparse
import json
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile

ROUTERS = (
    "balanced",
    "uniform_random",
    "frozen",
    "all_experts",
    "top_k",
    "mixtral",
    "loss_free",
    "quantile",
    "simbal",
    "switch",
    "noisy_top_k",
    "hierarchical",
    "gshard",
    "st_moe",
    "v_moe",
    "remoe",
    "dselect_k",
    "moe_plus_plus",
    "default_moe",
    "hash_random",
    "hash_balanced",
    "hash_previous",
    "hash_bigram",
    "hash_position",
    "hash_predicted",
    "multi_hash",
    "base",
    "sinkhorn",
    "expert_choice",
    "expert_choice_capped",
    "strictly_balanced",
    "soft_moe_causal",
    "soft_choice",
    "lory",
    "sampled_reinforce",
    "sampled_gumbel",
    "mode_staged",
    "mode_integrated",
    "peer",
)
QUICKSTART = ("train.max_seconds = None", "train.prompts = ()")
SMALL = (
    "Transformer.d_model = 64",
    "Transformer.num_heads = 1",
    "TrainedBPE.vocab_size = 2048",
    "MoELayer.d_ff = 64",
)


def one(router: str, seed: int, steps: int, small: bool, folder: Path) -> dict:
    """What a run and two evaluations of it say, from processes of their own."""
    workdir = folder / f"{router}-{seed}"
    bindings = [*QUICKSTART, f"train.seed = {seed}", f"train.steps = {steps}"]
    if small:
        bindings += SMALL
        bindings += [] if router == "peer" else ["MoELayer.num_experts = 16"]
    files = ("quickstart.gin", f"routers/{router}.gin")
    summary = call(
        folder,
        *("train", *(f"--gin_file={name}" for name in files), f"--workdir={workdir}"),
        *(f"--gin_bindings={binding}" for binding in bindings),
    )
    eval_command = ("eval", f"--workdir={workdir}", "--gin_bindings=eval.batch_size = 32")
    rule = call(folder, *eval_command, '--gin_bindings=eval.rule = "training"')
    return {
        "router": router,
        "seed": seed,
        "bits_per_byte": summary["val_bits_per_byte"],
        "training_rule": rule["bits_per_byte"],
        "max_over_mean_load": rule["max_over_mean_load"],
        "dropped": rule["dropped"],
        "tokens_per_second": summary["tokens_per_second"],
        "parameters_total": summary["parameters_total"],
        "parameters_active": summary["parameters_active"],
        "experts_per_token": summary["kept_experts_per_token"],
    }


def call(folder: Path, *words: str) -> dict:
    path = folder / "result.json"
    subprocess.run([sys.executable, "-m", "moe", *words, f"--json={path}"], check=True)
    return json.loads(path.read_text())


def spread(values) -> str:
    """Mean and, of several, the standard error."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def table(runs: list[dict], steps: int, small: bool) -> str:
    size = "half the quickstart's width, 16 experts" if small else "the quickstart's model"
    lines = [
        f"Held-out bits per byte after {steps} steps, {size}, best first.",
        "",
        "| router | bits per byte | training rule better by | max/mean load | dropped | "
        "kept per token | parameters | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_router: dict[str, list[dict]] = {}
    for run in runs:
        by_router.setdefault(run["router"], []).append(run)

    def bits(router):
        return statistics.mean(run["bits_per_byte"] for run in by_router[router])

    for router in sorted(by_router, key=bits):
        own = by_router[router]
        mean = {
            name: statistics.mean(run[name] for run in own)
            for name in ("max_over_mean_load", "dropped", "experts_per_token", "parameters_total")
        }
        leak = spread([run["bits_per_byte"] - run["training_rule"] for run in own])
        lines.append(
            f"| `{router}` | {spread([run['bits_per_byte'] for run in own])} | {leak} | "
            f"{mean['max_over_mean_load']:.2f} | {mean['dropped']:.1%} | "
            f"{mean['experts_per_token']:.2f} | {mean['parameters_total']:,.0f} | {len(own)} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--routers", nargs="*", default=ROUTERS)
    arguments = parser.parse_args()
    path = Path(arguments.json)
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for router in arguments.routers:
                size = arguments.steps, arguments.small
                runs.append(one(router, seed, *size, Path(folder)))
                # After each run: a long benchmark that is stopped has not been for nothing.
                record = {"steps": arguments.steps, "small": arguments.small, "runs": runs}
                path.write_text(json.dumps(record, indent=2) + "\n")
                text = table(runs, arguments.steps, arguments.small)
                path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
