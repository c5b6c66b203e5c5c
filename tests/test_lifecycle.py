"""How a run ends, pauses, is made longer, and starts from another."""

import io
import json
import math
import re
import shutil
import signal
import sys
import types

import jax
import numpy as np
import pytest
from tiny import Runs, arrays, lines

from moe.cli import main as cli
from moe.data import compressors
from moe.machine import signals
from moe.runs.loop import Loop
from moe.runs.storage import checkpoint
from moe.runs.tracking import progress
from moe.training.optimizer import AdamW
from moe.training.train_step import TrainState

ADAMW = ("train.optimizer = @AdamW()", "train.steps = 6")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("lifecycle"))


@pytest.fixture(scope="module")
def base(runs):
    return runs.done("base", *ADAMW, "train.prompts = ('the',)")


def copied(base, name):
    """A folder to go on in."""
    return shutil.copytree(base, base.parent / name)


# The end.


@pytest.mark.thorough
def test_a_run_that_ends_before_its_first_logged_step_ends(runs, capsys):
    brief = ("train.steps = 1000", "train.log_every = 500", "train.max_seconds = 1e-6")
    run = runs.done("brief", *brief)
    step = json.loads((run / "summary.json").read_text())["step"]
    assert step < 10 and [line["step"] for line in lines(run / "metrics.jsonl")] == [step]
    assert (run / "picture.png").exists()
    assert runs("brief", *brief) == 0
    assert f"ended at step {step}" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["picture.png", "samples.txt"])
def test_results_do_not_hang_on_their_decoration(name, runs, base, capsys):
    """A folder stands where the file belongs."""
    run = runs.folder / f"undecorated {name}"
    (run / name).mkdir(parents=True)
    assert runs(run.name, *ADAMW, "train.prompts = ('the',)") == 0
    out = capsys.readouterr().out
    assert f"no {name.split('.')[0]}: IsADirectoryError" in out
    ours, theirs = (json.loads((r / "summary.json").read_text()) for r in (run, base))
    assert ours["val_loss"] == theirs["val_loss"]


@pytest.mark.thorough
def test_a_short_final_evaluation_says_what_it_scored_and_what_was_compiled(runs, capsys):
    run = runs.done("scored", "train.steps = 1", "train.final_eval_bytes = 500")
    summary = json.loads((run / "summary.json").read_text())
    assert 400 < summary["val_bytes"] <= 500 < summary["held_out_bytes"]
    out = capsys.readouterr().out
    scored, there = summary["val_bytes"], summary["held_out_bytes"]
    assert f"(this model on {scored:,} of {there:,} held-out bytes, the rest on all)" in out
    for what in ("training step", "evaluation"):
        assert re.search(rf"compiled the {what} in \d+\.\d s", out)


def test_the_summary_is_written_before_anything_that_decorates_it(runs, capsys):
    """A machine that dies while it compresses costs nothing: the run is complete."""

    def dies(*given):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressors, "baselines", dies)
        assert runs("compressing", *ADAMW) == cli.INTERRUPTED
    assert runs("compressing", *ADAMW) == 0
    out = capsys.readouterr().out
    assert "this run is complete at step 6" in out and "this model" in out


@pytest.mark.thorough
def test_compressors_that_fail_cost_nothing(runs, capsys):
    """A file stands where their figures are to be kept."""
    cache = runs.folder / "cache"
    cache.mkdir()
    (cache / "baselines").write_text("")
    run = runs.done("uncompressed", "train.steps = 1", f"TextData.cache_dir = {str(cache)!r}")
    assert "no compressors' figures: " in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["baselines"] == {}
    assert (run / "picture.png").exists()


def test_a_report_that_cannot_be_made_is_no_failure_of_the_run(runs, base, capsys):
    """The summary is of another version."""
    run = copied(base, "older")
    summary = json.loads((run / "summary.json").read_text())
    del summary["parameters_total"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert runs(run.name, *ADAMW, "train.prompts = ('the',)") == 0
    assert "no report: KeyError: 'parameters_total'" in capsys.readouterr().out


def test_text_is_printed_where_the_terminal_lacks_its_letters(base, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    given = ["--prompt=\u00e9t\u00e9", "--tokens=1", f"--workdir={base}"]
    assert cli.main(["generate", *given]) == 0
    shown.flush()
    assert b"?t?" in shown.buffer.getvalue()


def test_the_time_left_is_that_of_the_steps_or_of_the_limit(monkeypatch, capsys):
    """Ten seconds a step, 98 steps left: 16 minutes, or the 70 seconds that there may be."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    for limit, left in ((math.inf, "16 min left"), (70.0, "70 s left"), (9e9, "16 min left")):
        display = progress.Display(steps=100)
        display.update(1, "loss", limit)
        now[0] += 10
        display.update(2, "loss", limit)
        assert capsys.readouterr().out.splitlines()[-1] == f"step 2/100 loss {left}"


def test_an_evaluation_tells_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0)
    with progress.Display(steps=1).counting("evaluating", 3) as count:
        for done in (1, 2, 3):
            count(done, 3)
    assert capsys.readouterr().out.split("\n") == [*(f"evaluating {n}/3" for n in (1, 2, 3)), ""]


@pytest.mark.thorough
def test_numbers_of_ones_own_stand_beside_ours(runs, monkeypatch, capsys):
    """One of two functions fails: it is told of once, and the run goes on."""
    (runs.folder / "own_numbers.py").write_text(
        "import gin\n\n\n"
        "@gin.configurable\n"
        "def busiest(routing, scalars):\n"
        "    return {'own/busiest': int(routing.count_LE.sum(0).argmax())}\n\n\n"
        "@gin.configurable\n"
        "def broken(routing, scalars):\n"
        "    return {'own/ratio': 1 / (scalars['learning_rate'] * 0)}\n"
    )
    config = runs.folder / "own.gin"
    own = "train.metrics = [@busiest, @broken]"
    config.write_text(f"include 'tiny.gin'\nimport own_numbers\n{own}\ntrain.steps = 3\n")
    run = runs.done("own", config=config)
    assert all(0 <= line["own/busiest"] < 4 for line in lines(run / "metrics.jsonl"))
    assert capsys.readouterr().out.count("broken is left out: ZeroDivisionError") == 1


# Pausing.


@pytest.mark.thorough
def test_a_pause_says_how_to_go_on_and_a_pause_that_is_past_trains_nothing(runs, capsys):
    assert runs("paused", *ADAMW, "train.stop_at = 3") == 0
    assert "stopped after step 3 of 6; without train.stop_at it goes on" in capsys.readouterr().out
    for stop_at in (2, 3):
        assert runs("paused", *ADAMW, f"train.stop_at = {stop_at}") == 0
        out = capsys.readouterr().out
        assert f"train.stop_at={stop_at} is reached already: nothing is trained" in out
    steps = [path.name for path in (runs.folder / "paused" / "checkpoints").iterdir()]
    assert steps == ["3"]
    runs.done("paused", *ADAMW)


@pytest.mark.thorough
def test_a_run_that_was_stopped_before_its_first_step_goes_on(runs, base, capsys):
    """Twice, since what is saved of it is not to be saved again; it knows where it came from."""
    source = copied(base, "source of nothing")
    given = (*ADAMW, f"train.start_from = {str(source)!r}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals.Signals, "signal", signal.SIGTERM)  # it came while all was prepared
        for _ in range(2):
            assert runs("never began", *given) == 128 + signal.SIGTERM
    assert "stopped after step 0 of 6; the same command goes on" in capsys.readouterr().out
    shutil.rmtree(source)  # which is not read again
    run = runs.done("never began", *given)
    record = json.loads((run / "run.json").read_text())
    assert record["started_from"] == {"run": str(source), "step": 6}


# More steps.


def test_a_finished_run_is_made_longer(runs, base, capsys):
    run = copied(base, "longer")
    longer = (*ADAMW[:1], "train.steps = 9", "train.prompts = ('the',)")
    runs(run.name, *longer, "train.stop_at = 7")
    out = capsys.readouterr().out
    # The results of the first end are still there, and not taken for those of the run.
    assert json.loads((run / "summary-6.json").read_text())["step"] == 6
    assert not (run / "summary.json").exists()
    runs.done(run.name, *longer)
    assert "continuing at step 6 of 9" in out
    assert "train.steps was 6 and is 9: the schedule is built for all 9" in out
    logged = lines(run / "metrics.jsonl")
    assert [line["step"] for line in logged] == list(range(1, 10))
    rate = AdamW().rate(9)
    assert logged[6]["learning_rate"] == pytest.approx(float(rate(6)), rel=1e-5)
    assert json.loads((run / "summary.json").read_text())["step"] == 9
    # And never shorter.
    assert runs(run.name, *ADAMW, "train.prompts = ('the',)") == 2
    assert "train.steps: 9 are trained there, 6 here" in capsys.readouterr().err


def interrupted(loop, state):
    raise KeyboardInterrupt


def test_a_start_that_was_interrupted_before_its_first_step_may_be_given_other_settings(runs):
    """It has nothing to lose: no checkpoint and no number."""
    run = runs.folder / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "run", interrupted)
        assert runs(run.name, *ADAMW, "train.seed = 4", "train.artifacts = False") == 130
    assert (run / "config.gin").exists() and not list((run / "checkpoints").iterdir())
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert runs(run.name, *ADAMW, "train.seed = 5", "train.artifacts = False") == 2
    (run / "metrics.jsonl").unlink()
    runs.done(run.name, *ADAMW, "train.seed = 5", "train.artifacts = False")


# From another run.


def values(run, step, kinds=("params", "router_state")):
    return {n: v for n, v in arrays(run, step).items() if n.split(".")[0] in kinds}


STILL = ("train.optimizer = @AdamW()", "AdamW.learning_rate = 1e-30", "train.steps = 1")


def test_a_run_starts_from_anothers_parameters(runs, base, capsys):
    run = runs.done("from", *STILL, f"train.start_from = {str(base)!r}")
    assert f"starting from step 6 of {base}: params, router state" in capsys.readouterr().out
    ours, theirs = values(run, 1), values(base, 6)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, err_msg=name)
    record = json.loads((run / "run.json").read_text())
    assert record["started_from"] == {"run": str(base), "step": 6}


def test_masters_start_from_anothers_values_too(runs):
    """After a step that moves nothing, the parameters are still that run's, not the seed's."""
    kept = ("train.precision = @Precision()", "Precision.parameters = 'masters'")
    source = runs.done("masters", *kept, *ADAMW[:1], "train.steps = 1", "train.artifacts = False")
    given = (*kept, *STILL, "train.artifacts = False", "train.seed = 5")
    run = runs.done("from masters", *given, f"train.start_from = {str(source)!r}")
    ours, theirs = values(run, 1), values(source, 1)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.thorough
def test_a_run_starts_with_anothers_optimizer_and_a_schedule_of_its_own(runs, base):
    """One of its checkpoints is named, by its folder."""
    source = str(base / "checkpoints" / "6")
    given = (f"train.start_from = {source!r}", "train.start_from_optimizer = True")
    run = runs.done("from both", *ADAMW[:1], "train.steps = 2", *given)
    first = lines(run / "metrics.jsonl")[0]
    assert first["learning_rate"] == pytest.approx(float(AdamW().rate(2)(0)), rel=1e-5)
    saved = arrays(run, 2)
    counts = {n: int(v) for n, v in saved.items() if n.endswith("count")}
    # Adam's moments are 8 steps old, the schedule 2.
    assert sorted(counts.values()) == [2, 8]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("train.start_from = 'nowhere'",), "train.start_from='nowhere': no run with checkpoints"),
        (
            ("train.start_from_optimizer = True",),
            "train.start_from_optimizer=True needs train.start_from",
        ),
        (("MoELayer.num_experts = 8",), "other shapes: params."),
        (("Transformer.moe = None",), "missing there: params."),
        (
            ("TextData.tokenizer = @TrainedBPE()", "TrainedBPE.vocab_size = 260"),
            "another tokenizer; take its own: TextData.tokenizer = @TokenizerFile()",
        ),
    ],
)
def test_another_run_that_does_not_fit_is_told(settings, said, runs, base, capsys):
    given = settings if "start_from" in settings[0] else (f"train.start_from = {str(base)!r}",)
    config = runs.folder / "other.gin"  # from a file, where settings of experts may stay
    config.write_text("\n".join(["include 'tiny.gin'", *settings]) + "\n")
    name = f"misfit {abs(hash(settings))}"
    assert runs(name, "train.steps = 1", *given, config=config) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.thorough
def test_switch_is_fine_tuned_by_the_shipped_file(runs, tmp_path):
    switch = ("MoELayer.router = @Switch", "train.steps = 1")
    config = runs.folder / "switch.gin"
    config.write_text("\n".join(["include 'tiny.gin'", *switch]) + "\n")
    trained = runs.done("switch", config=config)
    tuning = runs.folder / "tuning.gin"
    tuning.write_text("include 'tiny.gin'\ninclude 'routers/switch_finetune.gin'\n")
    runs.done("tuned", "train.steps = 1", f"train.start_from = {str(trained)!r}", config=tuning)


# What is kept.


def state_of(step: int) -> TrainState:
    return TrainState(jax.numpy.int32(step), {"a": jax.numpy.ones(2)}, {}, ())


@pytest.mark.parametrize(
    ("before", "after", "keep", "kept"),
    [
        ({2: 1.0, 4: 2.0}, {6: 3.0, 8: 4.0}, 1, [2, 8]),  # the best was saved before the restart
        ({2: 3.0, 4: 2.0}, {6: 1.0, 8: None}, 1, [6, 8]),  # after it
        ({2: 2.0, 4: None}, {6: None, 8: float("nan")}, 1, [2, 8]),
        ({2: None, 4: None}, {6: None}, 1, [6]),
        ({2: 1.0, 4: 2.0}, {6: 3.0, 8: 4.0}, 2, [2, 6, 8]),
        ({2: None, 4: 2.0, 5: None}, {6: None}, 2, [4, 5, 6]),
    ],
)
def test_the_best_and_the_last_stay_across_a_restart(before, after, keep, kept, tmp_path):
    for losses in (before, after):
        with checkpoint.opened(tmp_path, keep=keep) as saves:
            for step, loss in losses.items():
                saves.save(state_of(step), {}, loss)
    with checkpoint.opened(tmp_path, read_only=True) as saves:
        assert saves.steps() == kept


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"val_loss": "low"}'])
def test_a_damaged_metric_does_not_close_the_folder(damage, tmp_path):
    """What it said is unknown; the checkpoint is as good as one without."""
    with checkpoint.opened(tmp_path, keep=2) as saves:
        for step, loss in {2: 1.0, 4: 2.0}.items():
            saves.save(state_of(step), {}, loss)
    (tmp_path / "2" / "metrics" / "metrics").write_text(damage)
    with checkpoint.opened(tmp_path, keep=1) as saves:
        saves.save(state_of(6), {}, 3.0)
    with checkpoint.opened(tmp_path, read_only=True) as saves:
        assert saves.steps() == [4, 6]
