"""A run from the command line: what it writes, that it repeats, and how it ends."""

import json
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
from marks import mainly
import numpy as np
import pytest
from tiny import Runs, arrays, environment, lines, measured

from moe.settings.read import bindings_of
from moe.training import evaluate

SUMMARY = """
    val_bits_per_byte val_loss train_seconds tokens_per_second parameters_total parameters_active
    flops_per_token utilisation effective_utilisation peak_memory_bytes baselines corpus
""".split()

PROMPTS = ("train.prompts = ('ab', '')",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def base(runs):
    return runs.done("base", *PROMPTS)


def test_a_run_writes_all_it_promises(base):
    names = {path.name for path in base.iterdir()}
    expected = "config.gin run.json metrics.jsonl routing.jsonl summary.json samples.txt"
    assert names >= {*expected.split(), "tensorboard", "checkpoints", "tokenizer"}
    assert list((base / "tensorboard").iterdir())
    assert [path.name for path in (base / "checkpoints").iterdir()] == ["12"]
    assert (base / "samples.txt").read_text().strip()
    summary = json.loads((base / "summary.json").read_text())
    assert set(SUMMARY) <= set(summary)
    assert set(summary["baselines"]) == {"unigram", "gzip", "xz"}
    assert summary["corpus"]["name"] == "text" and len(summary["corpus"]["sha256"]) == 64
    assert summary["corpus"]["bytes"] == sum(
        path.stat().st_size for path in (base.parent / "text").iterdir()
    )
    documents = lines(base / "documents.jsonl")
    held_out = {path.name for path in (base.parent / "text").iterdir()}
    assert len({row["name"] for row in documents} & held_out) == summary["val_documents"]
    for row in documents:  # each with its own bytes
        assert row["bytes"] == (base.parent / "text" / row["name"]).stat().st_size
    bits, size = (sum(row[name] for row in documents) for name in ("bits", "bytes"))
    assert size == summary["val_bytes"]
    assert bits / size == pytest.approx(summary["val_bits_per_byte"], rel=1e-12)
    run = json.loads((base / "run.json").read_text())
    assert run["seed"] == 0 and "jax" in run["versions"] and run["device"]
    assert run["router_losses"] == {"balance": 0.01, "z": 0.001}


def test_a_line_of_metrics_is_short_and_routing_is_whole(base):
    written = lines(base / "metrics.jsonl")
    assert [line["step"] for line in written] == list(range(1, 13))
    assert all(len(line) - 1 <= 40 for line in written)
    routing = lines(base / "routing.jsonl")
    assert [line["step"] for line in routing] == list(range(1, 13))
    assert np.shape(routing[0]["count"]) == (2, 4)
    # 4 sequences of 32 tokens with 2 choices each
    assert np.sum(routing[0]["count"], axis=1).tolist() == [256, 256]


@pytest.mark.thorough
def test_more_layers_and_experts_make_no_more_scalars(runs, base):
    large = runs.done(
        "large", "Transformer.num_layers = 5", "MoELayer.num_experts = 9", "train.steps = 2"
    )
    assert set(lines(large / "metrics.jsonl")[0]) == set(lines(base / "metrics.jsonl")[0])


def test_the_reported_loss_is_the_tasks_alone(runs, base):
    """Whatever the routers' losses weigh: before the first update the model is the same."""
    heavy = runs.done("heavy", "BalanceLoss.coefficient = 100.0", "train.steps = 1")
    (line,) = lines(heavy / "metrics.jsonl")
    first = lines(base / "metrics.jsonl")[0]
    name = "router_loss/balance"
    assert line["loss"] == first["loss"] and line[name] == first[name] > 0.9


def test_the_recorded_config_repeats_the_run_bit_for_bit(runs, base):
    again = runs.done("again", config=base / "config.gin")
    assert measured(again) == measured(base)
    ours, theirs = (bindings_of((run / "config.gin").read_text()) for run in (again, base))
    assert ours == theirs
    assert (again / "routing.jsonl").read_text() == (base / "routing.jsonl").read_text()
    assert (again / "samples.txt").read_text() == (base / "samples.txt").read_text()
    ours, theirs = arrays(again, 12), arrays(base, 12)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    keys = ("val_loss", "val_bits_per_byte", "baselines", "corpus", "flops_per_token")
    first, second = (json.loads((run / "summary.json").read_text()) for run in (base, again))
    assert {key: first[key] for key in keys} == {key: second[key] for key in keys}


def test_another_seed_is_another_run(runs, base):
    other = runs.done("seed", "train.seed = 1", "train.steps = 12")
    assert measured(other)[0]["loss"] != measured(base)[0]["loss"]
    assert measured(other)[-1]["loss"] != measured(base)[-1]["loss"]


def test_a_finished_run_is_not_trained_again(runs, base, capsys):
    before = {p: p.read_bytes() for p in base.rglob("*") if p.is_file() and p.name != ".lock"}
    start = time.monotonic()
    assert runs("base", *PROMPTS) == 0
    assert time.monotonic() - start < 3
    assert "complete at step 12" in capsys.readouterr().out
    after = {p: p.read_bytes() for p in base.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before


KINDS = {
    "expert choice": (
        "train.objective = @MaskedToken()",
        "MaskedToken.rate = 0.3",
        "MoELayer.router = @ExpertChoice",
    ),
    "soft": ("train.objective = @MaskedToken()", "MoELayer.router = @SoftMoE"),
    "dense": ("Transformer.moe = None",),
    "bfloat16": ("Transformer.compute_dtype = 'bfloat16'",),
}


@pytest.mark.parametrize("kind", mainly(["soft"], KINDS))
def test_other_kinds_of_run_learn(kind, runs):
    bindings = ("train.steps = 25", "AdamW.learning_rate = 0.01", "train.optimizer = @AdamW()")
    config = runs.folder / f"{kind}.gin"
    # From a file, where settings of the router that was swapped may stay.
    config.write_text("\n".join(["include 'tiny.gin'", *KINDS[kind], *bindings]) + "\n")
    run = runs.done(f"run of {kind}", config=config)
    loss = [line["loss"] for line in measured(run)]
    assert np.isfinite(loss).all()
    assert np.mean(loss[-3:]) < 0.8 * loss[0]
    routed = [line for line in lines(run / "routing.jsonl")]
    assert bool(routed) == (kind != "dense")
    if kind == "bfloat16":
        values = arrays(run, 25)
        kinds = {str(jnp.asarray(value).dtype) for value in values.values()}
        assert kinds == {"float32", "int32"}


def test_the_final_checkpoint_precedes_the_final_evaluation(runs, base, monkeypatch):
    """A machine that dies in the evaluation costs the run nothing: the same command ends it."""

    def dies(*given):
        raise MemoryError

    run = runs.folder / "no evaluation"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", dies)
        with pytest.raises(MemoryError):
            runs(run.name, *PROMPTS)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["12"]
    assert not (run / "summary.json").exists()
    runs.done(run.name, *PROMPTS)
    ended, whole = (json.loads((r / "summary.json").read_text()) for r in (run, base))
    assert ended["val_loss"] == whole["val_loss"]


def test_a_stride_that_cannot_be_is_told_before_training(runs, capsys):
    assert runs("stride", "train.eval_stride = 99") == 2
    assert (
        "train.eval_stride=99 must lie in 1 to train.sequence_length=32" in capsys.readouterr().err
    )
    assert not (runs.folder / "stride" / "metrics.jsonl").exists()


@pytest.mark.thorough
def test_the_first_lines_say_what_multiplies_rows_and_why(runs, capsys):
    assert not runs("sorted", "MoELayer.dispatcher = @Sorted()", "train.steps = 1")
    assert "experts' matmuls: loop (blocks that fit a CPU's cache)" in "".join(capsys.readouterr())


def test_evaluations_and_checkpoints_on_the_way(runs, base):
    """The last two and the best stay; what is evaluated and saved changes no number."""
    bindings = ("train.eval_every = 3", "train.save_every = 2", "train.keep = 2")
    run = runs.done("on the way", *bindings)
    held_out = {line["step"]: line["val/loss"] for line in measured(run) if "val/loss" in line}
    assert list(held_out) == [3, 6, 9]
    steps = {int(path.name) for path in (run / "checkpoints").iterdir()}
    assert steps == {10, 12, min(held_out, key=held_out.__getitem__)}
    assert [line for line in measured(run) if "loss" in line] == measured(base)


@pytest.mark.thorough
def test_the_time_may_be_limited(runs, capsys):
    bindings = ("train.steps = 100000", "train.max_seconds = 0.5")
    run = runs.done("limited", *bindings)
    assert "max_seconds=0.5 is over" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert 1 <= summary["step"] < 100000
    assert runs("limited", *bindings) == 0
    assert (
        f"ended at step {summary['step']} of 100000, when train.max_seconds=0.5 was over"
        in capsys.readouterr().out
    )


@pytest.mark.thorough
def test_steps_are_fitted_into_the_time_with_the_schedules_end(runs, capsys):
    """And stay when the run goes on, however fast the machine is by then."""
    bindings = ["train.steps = 100000", "train.max_seconds = 10.0", "train.fit_steps = True"]
    assert runs("fitted", *bindings, "train.stop_at = 2") == 0
    folder = runs.folder / "fitted"
    steps = json.loads((folder / "run.json").read_text())["fitted_steps"]["100000"]
    assert 2 < steps < 100_000
    assert f"has room for {steps} of train.steps=100000" in capsys.readouterr().out
    bindings[1] = "train.max_seconds = 1000.0"
    assert runs.done("fitted", *bindings) == folder
    assert f"continuing at step 2 of {steps}" in capsys.readouterr().out
    last = lines(folder / "metrics.jsonl")[-1]
    assert last["step"] == steps
    # Near a tenth of the peak, the nearer the more steps there were time for.
    assert last["learning_rate"] == pytest.approx(1e-4, rel=0.5)
    assert bindings_of((folder / "config.gin").read_text())["train.steps"] == str(steps)
    told = re.search(r"^train:.*(\n .*)*", (folder / "settings.txt").read_text(), re.MULTILINE)[0]
    assert told.startswith("train: data=@TextData(), model=@Transformer, ")
    assert re.search(rf"\bsteps={steps}\b", told)
    assert runs("fitted", *bindings) == 0
    assert f"complete at step {steps}" in capsys.readouterr().out


@pytest.mark.thorough
def test_a_run_whose_time_is_spent_says_what_more_steps_take(runs, capsys):
    run = runs.done("spent", "train.max_seconds = 100.0", "train.fit_steps = True")
    step = json.loads((run / "summary.json").read_text())["step"]
    before = (run / "config.gin").read_text()
    spent = json.loads((run / "summary.json").read_text())["train_seconds"]
    bindings = (f"train.max_seconds = {1.001 * spent}", "train.fit_steps = True")
    assert runs("spent", "train.steps = 200000", *bindings) == 2
    error = capsys.readouterr().err
    assert f"are spent on {step} steps" in error and "train.steps=200000 would take about" in error
    assert (run / "config.gin").read_text() == before


@pytest.mark.thorough
def test_a_run_that_fits_is_left_alone(runs, base):
    """Timing the first steps changes nothing."""
    run = runs.done("roomy", "train.max_seconds = 1000.0", "train.fit_steps = True")
    assert measured(run) == measured(base)
    assert "fitted_steps" not in json.loads((run / "run.json").read_text())


def test_sigterm_saves_and_leaves_a_run_that_goes_on(runs, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    given = ["train", f"--gin_file={runs.config}", workdir, "--gin_bindings=train.steps = 1000000"]
    child = subprocess.Popen(
        [sys.executable, "-m", "moe", *given],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", child)
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate(timeout=60)
    finally:
        child.kill()
        child.communicate()  # closes its pipe, too
    assert child.returncode == 128 + signal.SIGTERM, out
    assert "the same command goes on" in out and "Traceback" not in out
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert steps == [last]
    assert not (tmp_path / "run" / "summary.json").exists()


def wait_for_lines(path: Path, child: subprocess.Popen, seconds: float = 300) -> None:
    """Until the run has logged some steps."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and child.poll() is None:
        if path.exists() and path.read_text().count("\n") >= 3:
            return
        time.sleep(0.05)
    pytest.fail(f"no step was logged: {child.communicate()[0] if child.poll() else 'still going'}")


def test_the_last_screen_names_the_marks(runs, base, capsys):
    assert runs("base", *PROMPTS) == 0
    out = capsys.readouterr().out
    for word in ("this model", "gzip", "xz", "unigram", "tokens/s", "utilisation", "MiB"):
        assert word in out
