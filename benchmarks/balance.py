"""Without balancing the load collapses onto few experts; do the CV^2 losses, or a bias, repair it?

    python benchmarks/balance.py --json=benchmarks/results/balance.json

`moe train` at half the quickstart's width with 16 experts, for each variant of balancing (Shazeer
et al. 2017, table 6; Wang et al. 2024). A violation is the maximum over the mean of the experts'
loads, less 1: once in training batches (mean over layers and the logged ones of the last hundred
steps), and once in all held-out documents, whose topics differ (the layer with the largest).
"""

import json
import shutil
import statistics

from runs import QUICKSTART, SMALL, Place, arguments, by_case, measure, rows, spread

NOISY = ("routers/noisy_top_k.gin", "NoisyTopK.k = 2", "MoELayer.capacity = @Capacity()")
SIGMOID = ("routers/loss_free.gin", "MoELayer.capacity = @Capacity()")
EASY = "Capacity.factor = 2.0"  # so that dropping doesn't stand in for balancing
LONGER = "sigmoid top-2, loss-free bias, three times the steps"
VARIANTS = {
    "noisy top-2, no loss": (*NOISY, EASY, "NoisyTopK.losses = ()"),
    "noisy top-2, importance": (*NOISY, EASY, "NoisyTopK.losses = [@ImportanceLoss()]"),
    "noisy top-2, load": (*NOISY, EASY, "NoisyTopK.losses = [@LoadLoss()]"),
    "noisy top-2, both": (*NOISY, EASY),
    "sigmoid top-2, no loss": (*SIGMOID, EASY, "TopK.balancer = None"),
    "sigmoid top-2, loss-free bias": (*SIGMOID, EASY),
    "sigmoid top-2, loss-free bias, rate 0.01": (*SIGMOID, EASY, "BiasBalancer.rate = 0.01"),
    LONGER: (*SIGMOID, EASY),
}


def one(variant: str, seed: int, place: Place, steps: int) -> dict:
    """Load of one run's last steps, and load and bits per byte in the held-out documents."""
    steps *= 3 if variant == LONGER else 1
    config, *bindings = VARIANTS[variant]
    workdir = place.folder / f"{list(VARIANTS).index(variant)}-{seed}"
    settings = (*QUICKSTART, *SMALL, "MoELayer.num_experts = 16", f"train.seed = {seed}")
    files = ("--gin_file=quickstart.gin", f"--gin_file={config}")
    settings = (*settings, f"train.steps = {steps}", *bindings)
    summary = place.moe("train", *files, f"--workdir={workdir}", bindings=settings)
    logged = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    late = [row for row in logged if row["step"] > steps - 100 and "load/max_over_mean" in row]
    held_out = place.moe("eval", f"--workdir={workdir}")
    shutil.rmtree(workdir)
    return {
        "bits_per_byte": summary["val_bits_per_byte"],
        "batch_violation": statistics.mean(row["load/max_over_mean"] for row in late) - 1,
        "held_out_violation": held_out["max_over_mean_load_worst"] - 1,
        "dead_experts": late[-1]["load/dead_experts"],
    }


def table(runs: list[dict], steps: int) -> str:
    body = []
    for variant, own in by_case(runs).items():
        dead = statistics.mean(run["dead_experts"] for run in own)
        names = ("batch_violation", "held_out_violation")
        violations = [spread([run[name] for run in own], 2) for name in names]
        bits = spread([run["bits_per_byte"] for run in own])
        body.append((variant, *violations, f"{dead:.1f}", bits, len(own)))
    header = (
        *("balancing", "violation", "held-out violation", "dead of 64", "bits per byte"),
        "seeds",
    )
    return f"After {steps} steps; 16 experts in each of 4 layers.\n\n{rows(header, body)}"


if __name__ == "__main__":
    measure(arguments(__doc__, steps=300), tuple(VARIANTS), one, table)
