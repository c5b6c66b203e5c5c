"""A run that stops and goes on is the run that never stopped; damaged checkpoints are skipped."""

import dataclasses
import gc
import json
from pathlib import Path
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Runs, arrays, lines, measured

from moe.errors import UserError
from moe.model.sharding import MeshShape
from moe.model.transformer import Transformer
from moe.runs.storage import checkpoint
from moe.training import evaluate
from moe.training.abstract_model import Vocabulary
from moe.training.optimizer import Adafactor, AdamW
from moe.training.run_spec import RunSpec
from moe.training.train_step import TrainState, to_devices

STATEFUL = (
    "train.optimizer = @Muon()",
    "TopK.balancer = @BiasBalancer",
    "TopK.losses = ()",
    "train.steps = 8",
)


def equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(runs):
    """Never interrupted; a checkpoint at every second step, written while training goes on."""
    return runs.done("whole", *STATEFUL, "train.save_every = 2", "train.keep = 4")


def test_a_run_that_was_stopped_ends_as_if_it_never_was(runs, whole):
    assert runs("stopped", *STATEFUL, "train.stop_at = 3") == 0
    run = runs.folder / "stopped"
    assert [line["step"] for line in measured(run)] == [1, 2, 3]
    assert not (run / "summary.json").exists()
    # What a crash leaves: a line of a step that is not saved, and half a line.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    runs.done("stopped", *STATEFUL)
    assert measured(run) == measured(whole)
    assert lines(run / "routing.jsonl") == lines(whole / "routing.jsonl")
    equal(arrays(run, 8), arrays(whole, 8))
    assert any("balancer.bias_E" in name and value.any() for name, value in arrays(run, 8).items())
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, whole)]
    assert summaries[0]["val_loss"] == summaries[1]["val_loss"]
    assert summaries[0]["train_seconds"] > 0


def test_checkpoints_written_while_training_goes_on_hold_their_own_step(runs, whole):
    """The buffers that a save reads are donated to the next step at once."""
    for step in (2, 4, 6):
        name = f"to step {step}"
        assert runs(name, *STATEFUL, f"train.stop_at = {step}") == 0
        equal(arrays(whole, step), arrays(runs.folder / name, step))


def copy_of(run: Path, name: str) -> Path:
    return Path(shutil.copytree(run, run.parent / name))


def cut_short(folder: Path) -> None:
    """Half of the largest file."""
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def without_metadata(folder: Path) -> None:
    """What describes the arrays, and the index of their database."""
    for path in [*folder.rglob("_METADATA"), *folder.rglob("manifest.ocdbt")]:
        path.unlink()


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [cut_short, without_metadata, emptied])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(damage, runs, whole, capsys):
    run = copy_of(whole, f"damaged {damage.__name__}")
    damage(run / "checkpoints" / "8")
    (run / "summary.json").unlink()
    assert runs(run.name, *STATEFUL) == 0
    out = capsys.readouterr().out
    assert "the checkpoint of step 8 can't be believed" in out
    assert "continuing at step 6 of 8" in out
    assert (run / "damaged-checkpoint-8").is_dir()
    assert measured(run) == measured(whole)
    equal(arrays(run, 8), arrays(whole, 8))


def test_where_no_checkpoint_can_be_read_it_says_so_and_keeps_them(runs, whole, capsys):
    run = copy_of(whole, "all damaged")
    (run / "summary.json").unlink()
    steps = [path.name for path in (run / "checkpoints").iterdir()]
    for step in steps:
        cut_short(run / "checkpoints" / step)
    metrics = (run / "metrics.jsonl").read_text()
    assert runs(run.name, *STATEFUL) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and f"no checkpoint in {run / 'checkpoints'} can be believed" in error
    )
    assert (run / "metrics.jsonl").read_text() == metrics
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted(steps)
    assert runs(run.name, *STATEFUL) == 2  # and again: it never starts from the first step


def test_the_checkpoint_itself_says_whose_it_is(runs, whole, capsys):
    """Where config.gin was changed nothing else tells another seed from the run's."""
    run = copy_of(whole, "another config")
    for name in ("run.json", "summary.json"):
        (run / name).unlink()
    config = (run / "config.gin").read_text()
    (run / "config.gin").write_text(config.replace("train.seed = 0", "train.seed = 7"))
    assert "train.seed = 0" in config
    metrics = (run / "metrics.jsonl").read_text()
    assert runs(run.name, *STATEFUL, "train.seed = 7") == 2
    error = capsys.readouterr().err
    assert "holds the checkpoints of another run" in error and "seed: 0 there, 7 here" in error
    assert (run / "metrics.jsonl").read_text() == metrics


def poisoned(evaluate):
    def at_step_2(score_batch, state, *given):
        result = evaluate(score_batch, state, *given)
        return dataclasses.replace(result, loss=np.nan) if int(state.step) == 2 else result

    return at_step_2


@pytest.mark.thorough
def test_a_held_out_loss_that_is_not_finite_is_not_saved_as_good(runs, capsys):
    every = ("train.steps = 3", "train.eval_every = 1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate", poisoned(evaluate.evaluate))
        assert runs("poisoned", *every) == 2
    assert "step 2: the held-out loss is nan" in capsys.readouterr().err
    run = runs.folder / "poisoned"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]
    assert '"val/loss": null' in (run / "metrics.jsonl").read_text()


def test_a_reader_that_orbax_gives_up_says_nothing_whenever_it_is_collected(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    with checkpoint.opened(tmp_path):
        pass

    class Never:
        def __await__(self):
            yield

    async def reader(message):
        try:
            await Never()
        except BaseException as error:
            raise Exception(message) from error

    for message in ("Encountered error while reading array index: (slice(0, 2, 1),)", "another's"):
        given_up = reader(message)
        given_up.send(None)
        del given_up
        gc.collect()
    assert [str(error) for error in told] == ["another's"]

    class Store:  # Orbax's has a coroutine of this name, which a damaged checkpoint leaves behind
        async def _get_array_metadatas(self):
            """Never awaited."""

    told.clear()
    Store()._get_array_metadatas()
    gc.collect()
    assert not told

    async def anothers():
        """Somebody else's mistake."""

    anothers()
    gc.collect()
    assert ["anothers" in str(error) for error in told] == [True]


ONE = MeshShape(data=1)


def programs(mesh: MeshShape, optimizer):
    sizes_of_run = {"steps": 6, "batch_size": 8, "sequence_length": 16}
    spec = RunSpec(None, Transformer, None, optimizer, mesh=mesh, **sizes_of_run)
    sizes = dataclasses.astuple(mesh)
    devices = jax.devices()[: np.prod(sizes)]
    return spec.build(Vocabulary(257), spec.build_mesh(devices))[1]


@pytest.fixture(scope="module")
def made():
    """Programs by their mesh, compiled once."""
    return {}


@pytest.fixture
def sparse(runs):
    """The tiny model from gin, with router state."""
    from moe.cli import config

    balanced = ("TopK.balancer = @BiasBalancer", "TopK.losses = ()", "Transformer.num_layers = 1")
    config.bind([str(runs.config)], ["train.sequence_length = 16", *balanced])


def batch_of(program, seed=0):
    from moe.data.batch import Batch

    draw = np.random.default_rng(seed).integers(0, 256, (8, 17)).astype(np.int32)
    ones = np.ones((8, 16), np.int32)
    place = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    rows = Batch(draw[:, :-1], draw[:, 1:], ones, place, ones > 0, np.arange(8, dtype=np.int32))
    return to_devices(rows, program.batch_sharding, 8)


def next_step(program, state):
    """The state after the next step, and its loss; each step has a batch of its own."""
    state, measured = program.step(state, batch_of(program, int(state.step)))
    return state, float(measured.loss)


EIGHT = MeshShape(data=1, fsdp=2, expert=2, tensor=2)


def test_a_checkpoint_moves_between_meshes(sparse, made, tmp_path):
    """8 devices, 1 and 8 again: the same bits, and the next step's loss but for rounding.

    The short form of benchmarks/faults_resume.py.
    """
    for mesh in (EIGHT, ONE):
        made[mesh] = made.get(mesh) or programs(mesh, AdamW())
    state, _ = next_step(made[EIGHT], made[EIGHT].init(0))
    for number, (there, here) in enumerate([(EIGHT, ONE), (ONE, EIGHT)]):
        program, folder = made[here], tmp_path / str(number) / "checkpoints"
        saved = checkpoint.as_tree(jax.device_get(state))
        with checkpoint.opened(folder) as saves:
            saves.save(state, {"a": 1})
        _, expected = next_step(made[there], state)
        with checkpoint.opened(folder) as saves:
            found, extra = saves.restore(program.abstract_state)
        assert extra == {"a": 1}
        equal(checkpoint.as_tree(jax.device_get(found)), saved)
        for leaf, wanted in zip(
            jax.tree.leaves(found), jax.tree.leaves(program.abstract_state), strict=True
        ):
            assert leaf.sharding == wanted.sharding and leaf.dtype == wanted.dtype
        state, loss = next_step(program, found)
        assert loss == pytest.approx(expected, rel=1e-6, abs=0)
    assert any(value.any() for value in state.router_state.values())


def test_a_run_goes_on_from_every_step(sparse, made, tmp_path):
    """Losses and final arrays are those of the steps that never stopped."""
    program = made[ONE] = made.get(ONE) or programs(ONE, AdamW())
    state, losses = program.init(0), []
    with checkpoint.opened(tmp_path / "checkpoints", keep=6) as saves:
        while len(losses) < 6:
            state, loss = next_step(program, state)
            losses.append(loss)
            saves.save(state, {})
    last = jax.device_get(state)
    for step in range(1, 6):
        with checkpoint.opened(tmp_path / "checkpoints", read_only=True) as saves:
            state, _ = saves.restore(program.abstract_state, step)
        found = []
        while int(state.step) < 6:
            state, loss = next_step(program, state)
            found.append(loss)
        assert found == losses[step:]
        equal(checkpoint.as_tree(jax.device_get(state)), checkpoint.as_tree(last))


@pytest.mark.thorough
def test_fields_of_an_optimizer_in_any_order_come_back_in_their_places(sparse, tmp_path):
    """Adafactor's v_row stands before v, which sorts before it."""
    program = programs(ONE, Adafactor())
    state, _ = program.step(program.init(0), batch_of(program))
    saved = checkpoint.as_tree(jax.device_get(state))
    with checkpoint.opened(tmp_path / "checkpoints") as saves:
        saves.save(state, {})
        saves.wait()
        found, _ = saves.restore(program.abstract_state)
    equal(checkpoint.as_tree(jax.device_get(found)), saved)


def test_a_step_that_is_not_there_is_named(whole):
    with checkpoint.opened(whole / "checkpoints", read_only=True) as saves:
        with pytest.raises(UserError, match=r"no checkpoint of step 5; it has \[2, 4, 6, 8\]"):
            saves.restore(TrainState(jnp.int32(0), {}, {}, ()), step=5)


def test_a_run_that_diverges_stops_and_keeps_the_good_checkpoint(runs, capsys):
    assert runs("diverged", "train.stop_at = 2") == 0
    good = arrays(runs.folder / "diverged", 2)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_read", with_a_nan(checkpoint.Checkpoints._read))
        assert runs("diverged", "train.save_every = 1") == 2
    error = capsys.readouterr().err
    assert "step 3: not finite: loss" in error and "Traceback" not in error
    assert "checkpoints holds step 2" in error
    assert "layer 0: load" in error and "layer 1: load" in error
    run = runs.folder / "diverged"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["2"]
    equal(arrays(run, 2), good)
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2]


def test_an_update_that_is_not_finite_is_not_saved(runs, capsys):
    """The loss of the step that breaks the parameters is still a number."""
    huge = ("train.optimizer = @AdamW()", "AdamW.learning_rate = 1e30", "train.save_every = 1")
    assert runs("huge rate", *huge) == 2
    error = capsys.readouterr().err
    assert "step 1: not finite: update norm" in error
    assert "there is no checkpoint yet" in error and "Lower the learning rate" in error
    assert not list((runs.folder / "huge rate" / "checkpoints").iterdir())


def with_a_nan(read):
    """Restoring that breaks one weight, as a bit that flips in memory would."""

    def broken(self, step, abstract):
        state, extra = read(self, step, abstract)
        name = "final_norm.scale_D"
        scale_D = state.params[name].at[3].set(np.nan)
        return dataclasses.replace(state, params=state.params | {name: scale_D}), extra

    return broken
