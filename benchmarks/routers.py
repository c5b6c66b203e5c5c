"""All routers on the quickstart's text at equal steps: quality, leak, load, drops, parameters.

    python benchmarks/routers.py --json=benchmarks/results/routers.json --workers=2

Each run is `moe train` with one file of configs/routers/ and half the quickstart's batch, so that
the table takes hours and not a day. `bits per byte` is of all held-out documents, by each router's
evaluation rule. In `training rule`, the router decides as in training: where that is better, the
router sees the future; where it is worse, noise and dropping cost it something. Times of steps are
from benchmarks/overhead.py.

Runs in the JSON file are not repeated, so that the same command continues an interrupted table.
--small trains at half the quickstart's width with 16 experts.
"""

import json
from pathlib import Path
import shutil
import statistics
import subprocess
import sys

from runs import QUICKSTART, SMALL, Place, arguments, by_case, measure, rows, spread

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
BATCH = 16  # sequences a step
OVERHEAD = Path(__file__).parent / "results" / "overhead.json"  # by benchmarks/overhead.py
EXPORT = Path(__file__).parents[1] / "scripts" / "export_embeddings.py"


def settings_of(router: str, embeddings: Path) -> tuple[list[str], list[str]]:
    """Config files and bindings of a run with a router.

    embeddings: those of the baseline, which clustered hashing needs.
    """
    bindings = [*QUICKSTART, f"train.batch_size = {BATCH}"]
    if router in ("hash_clustered", "hash_dispersed"):
        table = f"{router.split('_')[1].title()}Table"
        bindings += [f"{table}.embeddings = '{embeddings.absolute()}'"]
    if router == "hash_future":
        bindings += ["Transformer.allow_leaks = True"]
    return ["quickstart.gin", f"routers/{router}.gin"], bindings


def one(router: str, seed: int, place: Place, *, steps: int, small: bool) -> dict:
    """Results of a run, and of its evaluation by the training rule."""
    workdir = place.folder / f"{router}-{seed}"
    embeddings = place.folder / f"embeddings-{seed}.npy"
    files, bindings = settings_of(router, embeddings)
    bindings += [f"train.seed = {seed}", f"train.steps = {steps}"]
    if small:
        bindings += SMALL
        bindings += [] if router == "peer" else ["MoELayer.num_experts = 16"]
    given = [f"--gin_file={name}" for name in files]
    summary = place.moe("train", *given, f"--workdir={workdir}", bindings=bindings)
    settings = ("eval.batch_size = 32", 'eval.rule = "training"')
    rule = place.moe("eval", f"--workdir={workdir}", bindings=settings)
    if router == "top_k":  # the baseline whose embeddings clustered hashing starts from
        subprocess.run([sys.executable, EXPORT, workdir, embeddings], check=True)
    shutil.rmtree(workdir)
    return {
        "bits_per_byte": summary["val_bits_per_byte"],
        "training_rule": rule["bits_per_byte"],
        "max_over_mean_load": rule["max_over_mean_load_worst"],
        "dropped": rule["dropped"],
        "tokens_per_second": summary["tokens_per_second"],
        "parameters_total": summary["parameters_total"],
        "parameters_active": summary["parameters_active"],
        "experts_per_token": summary["kept_experts_per_token"],
    }


def table(runs: list[dict], *, steps: int, small: bool) -> str:
    size = "half the quickstart's width, 16 experts" if small else "the quickstart's model"
    routers = by_case(runs)
    header = (
        *("router", "bits per byte", "training rule better by", "max/mean load", "dropped"),
        *("kept per token", "parameters", "step over round robin's", "seeds"),
    )
    times = json.loads(OVERHEAD.read_text())["rows"] if OVERHEAD.exists() else {}
    body = []
    for router, own in routers.items():
        mean = {
            name: statistics.mean(run[name] for run in own)
            for name in ("max_over_mean_load", "dropped", "experts_per_token", "parameters_total")
        }
        bits = [run["bits_per_byte"] for run in own]
        line = (
            f"`{router}`",
            spread(bits),
            spread([run["bits_per_byte"] - run["training_rule"] for run in own]),
            f"{mean['max_over_mean_load']:.2f}",
            f"{mean['dropped']:.1%}",
            f"{mean['experts_per_token']:.2f}",
            f"{mean['parameters_total']:,.0f}",
            f"{times[router]['over_balanced']:.2f}" if router in times else "",
            len(own),
        )
        body.append((statistics.mean(bits), line))
    lines = [line for _, line in sorted(body)]
    title = f"Held-out bits per byte after {steps} steps of {BATCH} sequences, {size}, best first."
    return f"{title}\n\n{rows(header, lines)}"


def main():
    more = {"small": {"action": "store_true"}, "routers": {"nargs": "*", "default": ROUTERS}}
    given = arguments(__doc__, steps=300, **more)
    measure(given, given.routers, one, table, small=given.small)


if __name__ == "__main__":
    main()
