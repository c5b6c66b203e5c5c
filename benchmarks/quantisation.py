"""Loss against bytes of weights: rounded after training, by their inputs, or in training.

    python benchmarks/quantisation.py --json=OUT.json --plot=OUT.png

A dense model and a mixture of its active size (`runs/micro.gin`, one seed) are trained, and their
weights rounded to the nearest values of each format, and by second order (GPTQ) with 200,000 bytes
of their training text. Both are then trained anew with rounded weights, straight through. At last
the training step is timed with and without rounding. Ten minutes of one core.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path
import statistics
import tempfile
import time

import jax
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from moe.cli import config
from moe.cli.weights import with_second_order
from moe.machine import hardware
from moe.runs.restore import Restored, restore_run
from moe.runs.setup import Setup
from moe.runs.train import train
from moe.training.evaluate import batch_scorer, evaluate
from moe.training.quantisation import Quantisation
from moe.training.train_step import to_devices

STEPS, RATE, EVAL_BYTES = 200, 0.05, 500_000
MODELS = {
    "dense": ("models/dense.gin", "FeedForward.d_ff = 128"),
    "16 experts": ("MoELayer.num_experts = 16",),
}
FORMATS = ("int8:32", "int4:32", "int4", "int2:32")
TRAINED = ("int4:32", "int2:32")  # these in training, too
MARKERS = {"float32": "o", "int8:32": "P", "int4:32": "s", "int4": "D", "int2:32": "X"}


def spec_of(name: str, weights: str | None = None):
    """The run of a model, whose weights are rounded in training where a format is given."""
    changes = [c for c in MODELS[name] if c.endswith(".gin")]
    bindings = [c for c in MODELS[name] if not c.endswith(".gin")]
    bindings += [f"train.steps = {STEPS}", f"AdamW.learning_rate = {RATE}"]
    bindings += ["train.artifacts = False", "train.prompts = ()", "train.final_eval_bytes = 10_000"]
    if weights:
        how = Quantisation.read(weights)
        bindings += ["train.weights = @Quantisation()", f"Quantisation.format = {how.format!r}"]
        bindings.append(f"Quantisation.block = {how.block}")
    return config.load(["runs/micro.gin", "routers/top_k.gin", *changes], bindings)


@dataclasses.dataclass(frozen=True)
class Scored:
    """Bits per byte of a run's held-out text, with any values; compiled once."""

    run: Restored

    @functools.cached_property
    def _given(self):
        length, causal = self.run.spec.sequence_length, self.run.model.objective.causal
        batches = self.run.spec.prepare_data().validation_batches(
            32, length, length, EVAL_BYTES, causal
        )
        return batch_scorer(self.run.model, self.run.mesh), batches

    def __call__(self, run: Restored) -> float:
        score, batches = self._given
        return evaluate(score, run, batches, run.mesh).bits_per_byte


def rows_of(name: str, workdir: str) -> list[dict]:
    """A row for each format and way of rounding a model that is trained here."""
    train(spec_of(name), workdir)
    run = restore_run(workdir, config.of_folder(workdir))
    scored, rows = Scored(run), []
    size = sum(a.size * a.dtype.itemsize for a in run.params.values())
    row = {"model": name, "weights": "float32", "rounding": "none", "bits_per_weight": 32.0}
    rows.append(row | {"parameter_bytes": size, "bits_per_byte": scored(run)})
    print(rows[-1], flush=True)
    for text in FORMATS:
        how = Quantisation.read(text)
        nearest = dataclasses.replace(run, params=how(run.params, run.model.graph.declared))
        start = time.process_time()
        second, _ = with_second_order(run, how)
        seconds = time.process_time() - start
        for way, rounded in (("nearest", nearest), ("gptq", second)):
            rows.append(row_of(name, text, way, run, scored(rounded)))
        print(rows[-2], rows[-1], f"{seconds:.0f} s of processor time", sep="\n", flush=True)
    return rows


def row_of(name: str, text: str, way: str, run: Restored, loss: float) -> dict:
    size = Quantisation.read(text).size(run.params, run.model.graph.declared)
    row = {"model": name, "weights": text, "rounding": way}
    row |= {"bits_per_weight": size.bits_per_weight, "parameter_bytes": size.bytes}
    return row | {"bits_per_byte": loss}


def trained_row(name: str, text: str, workdir: str) -> dict:
    """The row of a model that was trained with rounded weights."""
    train(spec_of(name, text), workdir)
    run = restore_run(workdir, config.of_folder(workdir))
    row = row_of(name, text, "in training", run, Scored(run)(run))
    print(row, flush=True)
    return row


def step_costs(name: str = "16 experts", rounds: int = 5, steps: int = 4) -> list[dict]:
    """Processor seconds of compiling a training step and of a step, in turns, by format."""
    found, timed = [], []
    for text in (None, "int4:32"):
        setup = Setup.of(spec_of(name, text), lambda line: None)
        state = setup.program.init(0)
        batch = setup.train_batches.batch(0)
        batch = to_devices(batch, setup.program.batch_sharding, setup.spec.batch_size)
        start = time.process_time()
        program = setup.program.step.lower(state, batch).compile()
        found.append({"weights": text or "float32", "compile_s": time.process_time() - start})
        timed.append([program, setup.program.step.given, state, batch, []])
    for _ in range(rounds):
        for turn in timed:
            program, given, state, batch, seconds = turn
            start = time.process_time()
            for _ in range(steps):
                state, _ = program(given, state, batch)
            jax.block_until_ready(state)
            seconds.append((time.process_time() - start) / steps)
            turn[2] = state
    for row, turn in zip(found, timed, strict=True):
        row["step_s"] = statistics.median(turn[-1][1:])
        print(row, flush=True)
    return found


def draw(rows: list[dict], path: Path) -> None:
    """Loss over bytes, and beside it what each way of rounding adds to the loss."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.5), layout="constrained")
    ways = {"none": "full", "nearest": "none", "gptq": "full"}
    for i, name in enumerate(MODELS):
        own = [row for row in rows if row["model"] == name]
        best = [row for row in own if row["rounding"] in ("none", "gptq")]
        x, y = ([row[key] for row in best] for key in ("parameter_bytes", "bits_per_byte"))
        left.plot(x, y, color=f"C{i}", linewidth=0.8, label=name)
        for row in own:
            place = row["parameter_bytes"], row["bits_per_byte"]
            if fill := ways.get(row["rounding"]):
                left.plot(*place, MARKERS[row["weights"]], color=f"C{i}", fillstyle=fill)
        for row in own[1:]:
            more = row["bits_per_byte"] - own[0]["bits_per_byte"]
            place = FORMATS.index(row["weights"]) + 0.3 * (i - 0.5)
            shift, marker = {"nearest": (-1, "o"), "gptq": (0, "v"), "in training": (1, "*")}[
                row["rounding"]
            ]
            place += 0.08 * shift
            right.plot(place, more, marker, color=f"C{i}", markersize=7)
    for weights, marker in MARKERS.items():
        left.plot([], [], marker, color="grey", label=weights)
    left.set(xscale="log", xlabel="bytes of parameters", ylabel="held-out bits per byte")
    left.xaxis.set_minor_formatter(NullFormatter())  # they would cover each other
    left.set_xticks([2e5, 5e5, 1e6], ["200k", "500k", "1M"])
    left.set_title("Rounded after training: hollow to the nearest, full by GPTQ", fontsize=10)
    left.legend(frameon=False, ncols=2, fontsize=8)
    for label, marker in (("nearest", "o"), ("GPTQ", "v"), ("in training", "*")):
        right.plot([], [], marker, color="grey", label=label)
    right.axhline(0, color="grey", linewidth=0.8)
    right.set_yscale("symlog", linthresh=0.001)
    right.set_ylim(-0.05, 0.2)
    right.set_xticks(range(len(FORMATS)), ["int8:32", "int4:32", "int4", "int2:32"])
    right.set_ylabel("bits per byte more than float32")
    right.set_title("What rounding costs (same colours)", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    given, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            rows += rows_of(name, str(Path(folder, name)))
            for text in TRAINED:
                rows.append(trained_row(name, text, str(Path(folder, name + text))))
    found = {"device": hardware.describe_device(), "steps": STEPS, "eval_bytes": EVAL_BYTES}
    found |= {"rows": rows, "step": step_costs()}
    given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if given.plot:
        draw(rows, given.plot)


if __name__ == "__main__":
    main()
