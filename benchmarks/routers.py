"""Every router on the quickstart's text, at equal steps: quality, leak, load, drops, parameters.

    python benchmarks/routers.py --json=benchmarks/results/routers.json --workers=2

Each run is `moe train` with one file of configs/routers/. `bits per byte` is of all held-out
documents, every router by its evaluation rule. `training rule` is the same text with the router
deciding as in training; what it is better by than the evaluation rule is what the router saw of
the future (or what noise and dropping cost it, where it is worse).

A whole table takes hours: runs that stand in the JSON file are not repeated, so that the same
command goes on where it stopped. --small trains at half the quickstart's width with 16 experts.
"""

import argparse
from collections.abc import Sequence
import concurrent.futures
import json
import os
from pathlib import Path
import queue
import shutil
import statistics
import subprocess
import sys

ROUTERS = (
    "top_k",
    "balanced",
    "uniform_random",
    "frozen",
    "all_experts",
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
    "hash_clustered",
    "hash_dispersed",
    "hash_future",
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


EXPORT = Path(__file__).parents[1] / "scripts" / "export_embeddings.py"


def one(router: str, seed: int, steps: int, small: bool, folder: Path, cpus=None) -> dict:
    """What a run and two evaluations of it say, from processes of their own."""
    workdir = folder / f"{router}-{seed}"
    bindings = [*QUICKSTART, f"train.seed = {seed}", f"train.steps = {steps}"]
    embeddings = (folder / f"embeddings-{seed}.npy").absolute()
    if router in ("hash_clustered", "hash_dispersed"):
        bindings += [f"{router.split('_')[1].title()}Table.embeddings = '{embeddings}'"]
    if router == "hash_future":
        bindings += ["Transformer.allow_leaks = True"]
    if small:
        bindings += SMALL
        bindings += [] if router == "peer" else ["MoELayer.num_experts = 16"]
    files = ("quickstart.gin", f"routers/{router}.gin")
    summary = call(
        folder,
        *("train", *(f"--gin_file={name}" for name in files), f"--workdir={workdir}"),
        *(f"--gin_bindings={binding}" for binding in bindings),
        cpus=cpus,
    )
    eval_command = ("eval", f"--workdir={workdir}", "--gin_bindings=eval.batch_size = 32")
    rule = call(folder, *eval_command, '--gin_bindings=eval.rule = "training"', cpus=cpus)
    if router == "top_k":  # the baseline whose embeddings clustered hashing starts from
        subprocess.run([sys.executable, EXPORT, workdir, embeddings], check=True)
    shutil.rmtree(workdir)
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


def call(folder: Path, *words: str, cpus: Sequence[int] | None = None) -> dict:
    """`moe` in a process of its own, on some of the cores; what it wrote."""
    path = folder / f"result-{cpus or 'all'}.json".replace(" ", "")
    pin = ["taskset", "--cpu-list", ",".join(map(str, cpus))] if cpus else []
    command = [*pin, sys.executable, "-m", "moe", *words, f"--json={path}"]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    subprocess.run(command, check=True, **out)
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
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each on own cores")
    parser.add_argument("--folder", default="runs/routers", help="for runs that are under way")
    parser.add_argument("--routers", nargs="*", default=ROUTERS)
    arguments = parser.parse_args()
    path, folder = Path(arguments.json), Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"steps": arguments.steps, "small": arguments.small}
    runs = read_runs(path, settings)
    done = {(run["router"], run["seed"]) for run in runs}
    places = [(router, seed) for seed in range(arguments.seeds) for router in arguments.routers]
    cores = sorted(os.sched_getaffinity(0))
    free: queue.Queue = queue.Queue()
    for worker in range(arguments.workers):
        free.put(cores[worker :: arguments.workers])

    def work(place):
        cpus = free.get()
        try:
            return one(*place, arguments.steps, arguments.small, folder, cpus)
        finally:
            free.put(cpus)

    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        left = [pool.submit(work, place) for place in places if place not in done]
        for finished in concurrent.futures.as_completed(left):
            try:
                run = finished.result()
            except subprocess.CalledProcessError as error:  # the others go on
                print(f"{error}\n{error.stdout}", flush=True)
                continue
            # After each run: a long benchmark that is stopped has not been for nothing.
            runs.append(run)
            path.write_text(json.dumps(settings | {"runs": runs}, indent=2) + "\n")
            text = table(runs, arguments.steps, arguments.small)
            path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
            print(f"{len(runs)} of {len(places)}: {run}", flush=True)
    print(table(runs, arguments.steps, arguments.small))


def read_runs(path: Path, settings: dict) -> list[dict]:
    """The runs of an earlier call with the same settings."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    if any(record[name] != value for name, value in settings.items()):
        raise SystemExit(f"{path} holds runs with other settings than {settings}")
    return record["runs"]


if __name__ == "__main__":
    main()
