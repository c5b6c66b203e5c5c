"""A checkpoint is believed only as it was written: whole, under its own name, and finite."""

from collections.abc import Callable
import json
from pathlib import Path
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import environment

from moe.errors import UserError
from moe.runs.loop import require_finite_loss
from moe.runs.storage import checkpoint, manifest
from moe.runs.storage.folder import RunFolder
from moe.runs.tracking.logs import Logs
from moe.training.evaluate import Evaluation
from moe.training.finite import TrainingDiverged, not_finite
from moe.training.train_step import TrainState

KILLS = Path(__file__).with_name("kills.py")


def state_of(step: int) -> TrainState:
    draw = np.random.default_rng(step)
    weight_VD = jnp.asarray(draw.normal(size=(50, 8)), jnp.float32)
    up = jnp.asarray(draw.normal(size=(2, 8, 16)), jnp.bfloat16)
    params = {"embedding_VD": weight_VD, "stacks.0.unit.up_DF": up}
    moments = {name: jnp.zeros_like(a) for name, a in params.items()}
    return TrainState(jnp.int32(step), params, {"bias_E": jnp.arange(4.0) + step}, moments)


def abstract() -> TrainState:
    def shape(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)

    return jax.tree.map(shape, state_of(0))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("sound") / "checkpoints"
    with checkpoint.opened(folder) as saves:
        for step in (1, 2):
            saves.save(state_of(step), {"seed": 0}, val_loss=3.0 - step)
    return folder


def restored(folder: Path) -> tuple[int, str]:
    """The step that is restored, bit for bit as it was saved, and what was said."""
    said = []
    with checkpoint.opened(folder) as saves:
        state, extra = saves.restore(abstract(), say=said.append)
    step = int(state.step)
    assert extra == {"seed": 0}
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
    return step, " ".join(said)


def flipped(path: Path) -> None:
    """One bit, of any byte."""
    content = bytearray(path.read_bytes())
    draw = random.Random(path.name)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def renamed(path: Path) -> None:
    path.rename(path.with_name(path.name + "0"))


def swapped(path: Path) -> None:
    """The largest file of the other step's folder that hold the same kind of thing."""
    other = path.parents[len(path.parts) - path.parts.index("2") - 2].parent / "1"
    there = other / path.relative_to(other.with_name("2")).parent
    named = [p for p in there.iterdir() if p.is_file() and p.read_bytes() != path.read_bytes()]
    path.write_bytes((named[0] if named else other / manifest.NAME).read_bytes())


def files_of(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder) for path in found if path.name != "commit_success.txt")


@pytest.mark.parametrize("damage", [flipped, cut, emptied, Path.unlink, renamed, swapped])
def test_no_damage_to_a_file_is_silent(damage: Callable[[Path], None], sound, tmp_path):
    """Of each file in turn; the manifest names it, without a value being read."""
    names = files_of(sound / "2")
    assert len(names) > 8
    for name in names:
        folder = Path(shutil.copytree(sound / "2", tmp_path / "2", dirs_exist_ok=True))
        shutil.copytree(sound / "1", tmp_path / "1", dirs_exist_ok=True)
        manifest.verify(folder)
        damage(folder / name)
        with pytest.raises(manifest.Damaged, match=name.name.replace(".", r"\.")):
            manifest.verify(folder)
        shutil.rmtree(tmp_path / "2")


def largest(folder: Path) -> Path:
    return folder / max(files_of(folder), key=lambda name: (folder / name).stat().st_size)


def test_what_is_damaged_is_named_and_set_aside_for_the_one_before(sound, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "checkpoints"))
    assert restored(folder) == (2, "")
    flipped(largest(folder / "2"))
    altered = largest(folder / "2").read_bytes()
    step, said = restored(folder)
    assert step == 1
    assert f"{largest(folder.parent / 'damaged-checkpoint-2').name} was altered" in said
    assert largest(folder.parent / "damaged-checkpoint-2").read_bytes() == altered
    assert restored(folder) == (1, "")


def test_a_folders_name_is_not_believed(sound, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "checkpoints"))
    (folder / "1").rename(folder / "99")
    (folder / "100").mkdir()
    step, said = restored(folder)
    assert step == 2
    assert "step 99 can't be believed (it holds step 1: the folder was renamed)" in said
    assert "step 100 can't be believed (manifest.json is missing)" in said


def test_steps_that_changed_places_are_both_refused(sound, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "checkpoints"))
    (folder / "1").rename(folder / "x")
    (folder / "2").rename(folder / "1")
    (folder / "x").rename(folder / "2")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be believed"):
        restored(folder)
    assert {path.name for path in folder.iterdir()} == {"1", "2"}


def test_every_reader_verifies(sound, tmp_path):
    """`moe eval` and `train.start_from` read some arrays; no file has to be one of those."""
    folder = Path(shutil.copytree(sound, tmp_path / "checkpoints"))
    flipped(folder / "2" / "extra" / "metadata")
    said = []
    wanted = {"params.embedding_VD": checkpoint.as_tree(abstract())["params.embedding_VD"]}
    wanted["params.stacks.0.unit.up_DF"] = checkpoint.as_tree(abstract())[
        "params.stacks.0.unit.up_DF"
    ]
    with checkpoint.opened(folder, read_only=True) as saves:
        _, step = saves.values(wanted, say=said.append)
    assert step == 1 and "extra/metadata was altered" in said[0]


def test_another_dtype_is_named_and_never_cast(sound):
    other = abstract()
    name = "embedding_VD"
    half = jax.ShapeDtypeStruct((50, 8), jnp.float16, sharding=other.params[name].sharding)
    other.params[name] = half
    with checkpoint.opened(sound, read_only=True) as saves:
        with pytest.raises(UserError, match="embedding_VD is float32 there, float16 here"):
            saves.restore(other)


def with_nan(step: int) -> TrainState:
    state = state_of(step)
    name = "stacks.0.unit.up_DF"
    state.params[name] = state.params[name].at[1, 2, 3].set(jnp.nan)
    state.params["embedding_VD"] = state.params["embedding_VD"].at[17, :2].set(jnp.inf)
    return state


def test_arrays_that_are_not_finite_are_named_with_layer_or_row():
    assert not not_finite(checkpoint.as_tree(state_of(1)))
    assert not_finite(checkpoint.as_tree(with_nan(1))) == [
        "params.embedding_VD: 2 of 400 values, the first in row 17",
        "params.stacks.0.unit.up_DF: 1 of 256 values, the first in layer 1",
    ]
    assert not_finite({"count": jnp.float32(jnp.nan)}) == ["count: 1 of 1 values"]


def test_no_checkpoint_is_made_of_values_that_are_not_finite(tmp_path):
    with checkpoint.opened(tmp_path / "checkpoints") as saves:
        saves.save(state_of(1), {"seed": 0})
        with pytest.raises(
            TrainingDiverged, match=r"step 2: not finite: params\.embedding_VD"
        ) as e:
            saves.save(with_nan(2), {"seed": 0})
        assert "holds step 1" in str(e.value)
    assert restored(tmp_path / "checkpoints") == (1, "")


def test_values_that_are_not_finite_are_not_restored(tmp_path, monkeypatch):
    """As an older program, or memory that failed while it was saved, would have left it."""
    with checkpoint.opened(tmp_path / "checkpoints") as saves:
        saves.save(state_of(1), {"seed": 0})
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "not_finite", lambda arrays: [])
            saves.save(with_nan(2), {"seed": 0})
    step, said = restored(tmp_path / "checkpoints")
    assert step == 1
    assert "not finite: params.embedding_VD: 2 of 400 values, the first in row 17" in said


def test_a_held_out_loss_that_is_not_finite_ends_the_run_with_the_arrays_at_fault(sound):
    result = Evaluation(
        *[float("nan")] * 2, 1, 1, 1, None, np.full(1, np.nan), np.ones(1, np.int64)
    )
    with checkpoint.opened(sound, read_only=True) as saves:
        with pytest.raises(TrainingDiverged, match=r"step 3: the held-out loss is nan") as error:
            require_finite_loss(result, with_nan(3), 3, saves)
        assert "layer 1" in str(error.value) and "holds step 2" in str(error.value)
        # By the final evaluation, which comes after the last save: that step is none of the good.
        with pytest.raises(TrainingDiverged, match="holds step 1"):
            require_finite_loss(result, with_nan(2), 2, saves)


def test_metrics_are_json_where_a_number_is_none(tmp_path):
    logs = Logs(RunFolder(tmp_path))
    logs.scalars(1, {"loss": float("nan"), "speed": 2.0})
    logs.routing({"step": 1, "load": [[1.0, float("inf")]]})
    logs.close()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    read = [
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
        for name in ("metrics.jsonl", "routing.jsonl")
    ]
    assert read == [
        {"step": 1, "loss": None, "speed": 2.0},
        {"step": 1, "load": [[1.0, None]]},
    ]


@pytest.mark.thorough
def test_a_kill_at_any_moment_leaves_the_checkpoints_whole(tmp_path):
    """At named points and at random: what goes on is what a run without kills would be."""
    command = [sys.executable, str(KILLS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["killed"] >= 10 and result["lost"] == 0
    assert set(result["points"]) == {"before manifest", "before rename", "after rename"}


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_damage(tmp_path, monkeypatch):
    """Moved away first, and then deleted; what a kill left is deleted by the next start."""
    folder, removed = tmp_path / "checkpoints", []
    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: removed.append(path))
        with checkpoint.opened(folder, keep=1) as saves:
            for step in (1, 2):
                saves.save(state_of(step), {"seed": 0})
                saves.wait()
    trash = folder / manifest.DELETED
    assert removed[-1] == trash and (trash / "1" / manifest.NAME).exists()
    assert sorted(path.name for path in folder.iterdir()) == ["2", manifest.DELETED]
    rmtree(trash / "1" / "state")  # half done
    assert restored(folder) == (2, "")
    assert [path.name for path in folder.iterdir()] == ["2"]
