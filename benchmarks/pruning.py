"""What taking experts out of a trained mixture costs, before and after a short fine-tuning.

    python benchmarks/pruning.py --json=OUT.json --plot=OUT.png

A mixture of 16 experts (`runs/micro.gin`, top-2, one seed) is trained once; then 8 or 4 of
each layer's experts are kept, by saliency, by load or by chance, pruned or merged. Each of these
models, and the whole one, is fine-tuned for equally many steps on the same batches. Some five
minutes on one core.
"""

import argparse
import json
from pathlib import Path
import tempfile

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from moe.cli import config
from moe.cli.prune import calibrated
from moe.machine import hardware
from moe.pruning.choose import How, choose
from moe.pruning.curve import draw_curve
from moe.pruning.shrink import shrunk
from moe.runs.restore import restore_run, stored
from moe.runs.setup import Setup
from moe.runs.train import train
from moe.training.evaluate import batch_scorer, evaluate
from moe.training.train_step import to_devices

WHOLE, STEPS, RATE = 16, 250, 0.03
TUNED, TUNED_RATE = 25, 0.01
SIZES = (8, 4)
WAYS = (How(), How("merge"), How(by="load"), How(by="random"))
QUIET = ["train.artifacts = False", "train.prompts = ()", "train.final_eval_bytes = 1_000"]
FILES = ["runs/micro.gin", "routers/mixtral.gin"]


class Tuner:
    """The training of models with so many experts, on the same text; compiled once."""

    def __init__(self, size: int):
        more = [f"MoELayer.num_experts = {size}", f"train.steps = {TUNED}", "train.seed = 1"]
        more += [f"AdamW.learning_rate = {TUNED_RATE}", "train.eval_bytes = 60_000"]
        self.setup = Setup.of(config.load(FILES, more), lambda line: None)
        self.model = stored(self.setup.spec, self.setup.model)
        self.score_batch = batch_scorer(self.model, self.setup.mesh)

    def bits(self, state) -> float:
        """Bits per byte of 60 KB of held-out text; no token is read twice."""
        setup = self.setup
        return evaluate(self.score_batch, state, setup.held_out, setup.mesh).bits_per_byte

    def measured(self, params, router_state) -> dict[str, float]:
        """The bits per byte of these values, and after the fine-tuning, which starts from them."""
        setup, program = self.setup, self.setup.program
        state = program.init(1)
        values = jax.tree.map(jnp.copy, (params, router_state))
        state = type(state)(state.step, *values, state.opt_state)
        found = {"bits_per_byte": self.bits(state)}
        for i in range(TUNED):
            batch = setup.train_batches.batch(i, setup.rows)
            placed = to_devices(batch, program.batch_sharding, setup.spec.batch_size)
            state, _ = program.step(state, placed)
        return {**found, "after_tuning": self.bits(state)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    given, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"train.steps = {STEPS}", f"AdamW.learning_rate = {RATE}"]
        train(config.load(FILES, [*changes, *QUIET]), folder)
        run = restore_run(folder, config.of_folder(folder))
    found, values = calibrated(run, 200_000, 0), (run.params, run.router_state)
    whole = {"experts": WHOLE, "method": "whole", "by": "whole", **Tuner(WHOLE).measured(*values)}
    print(whole, flush=True)
    for size in SIZES:
        tuner = Tuner(size)
        for how in WAYS:
            fewer = shrunk(run.model, tuner.model, values, choose(found, how, size))
            row = {"experts": size, "method": how.method, "by": how.by, **tuner.measured(*fewer)}
            rows.append(row)
            print(row, flush=True)
        settings = {"device": hardware.describe_device(), "steps": STEPS, "tuned_steps": TUNED}
        settings |= {"calibration_tokens": found.tokens}
        result = {**settings, "whole": whole, "rows": rows}
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if given.plot:
            draw(rows, whole, given.plot)


def draw(rows: list[dict], whole: dict, path: Path) -> None:
    """Two panels with one scale: as pruned, and after the fine-tuning."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    titles = "nothing trained after", f"after {TUNED} more steps of training"
    for axis, key, title in zip(axes, ("bits_per_byte", "after_tuning"), titles, strict=True):
        renamed = [{**row, "bits_per_byte": row[key]} for row in (whole, *rows)]
        draw_curve(axis, renamed[1:], renamed[0])
        axis.set_title(title, fontsize=11)
    figure.suptitle("Experts taken out of a mixture of 16 (top-2, 2 layers)", fontsize=12)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
