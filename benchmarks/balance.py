"""Without a balancing loss the load collapses; does either CV^2 loss, or a bias, repair it?

    python benchmarks/balance.py --json=benchmarks/results/balance.json

`moe train` at half the quickstart's width with 16 experts, for each way of balancing (Shazeer et
al. 2017, table 6; Wang et al. 2024). The load is max over mean of what the routers chose in the
last logged step, the mean over layers. The violation is that of Wang et al. (MaxVio_global): max
over mean less 1 of what they choose in all held-out documents; here of the most crowded layer.
"""

import json
import shutil
import statistics

from runs import QUICKSTART, SMALL, Place, arguments, by_case, measure, rows, spread

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
    "sigmoid top-2, loss-free bias, rate 0.01": (*SIGMOID, EASY, "BiasBalancer.rate = 0.01"),
}


def one(way: str, seed: int, place: Place, steps: int) -> dict:
    """The last load of one run, and its load and bits per byte in the held-out documents."""
    config, *bindings = WAYS[way]
    workdir = place.folder / f"{list(WAYS).index(way)}-{seed}"
    settings = (*QUICKSTART, *SMALL, "MoELayer.num_experts = 16", f"train.seed = {seed}")
    files = ("--gin_file=quickstart.gin", f"--gin_file={config}")
    settings = (*settings, f"train.steps = {steps}", *bindings)
    summary = place.moe("train", *files, f"--workdir={workdir}", bindings=settings)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    held_out = place.moe("eval", f"--workdir={workdir}")
    shutil.rmtree(workdir)
    return {
        "bits_per_byte": summary["val_bits_per_byte"],
        "max_over_mean_load": last["load/max_over_mean"],
        "violation": held_out["max_over_mean_load"] - 1,
        "dead_experts": last["load/dead_experts"],
    }


def table(runs: list[dict], steps: int) -> str:
    body = []
    for way, own in by_case(runs).items():
        dead = statistics.mean(run["dead_experts"] for run in own)
        names = ("max_over_mean_load", "violation", "bits_per_byte")
        load, violation, bits = (spread([run[name] for run in own]) for name in names)
        body.append((way, load, violation, f"{dead:.1f}", bits, len(own)))
    header = (
        *("balancing", "max/mean load", "held-out violation", "dead of 64", "bits per byte"),
        "seeds",
    )
    return f"After {steps} steps; 16 experts in each of 4 layers.\n\n{rows(header, body)}"


if __name__ == "__main__":
    measure(arguments(__doc__, steps=300), tuple(WAYS), one, table)
