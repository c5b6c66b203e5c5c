"""The folder of a run whose experts were taken away: written whole or not at all."""

import os
from pathlib import Path
import shutil
from typing import Any

import jax.numpy as jnp

from moe.errors import UserError
from moe.runs.restore import Restored
from moe.runs.storage import checkpoint, manifest
from moe.runs.storage.folder import RunFolder, versions
from moe.runs.summary import costs_of
from moe.settings import resolved
from moe.training.train_step import TrainState

ABOUT_THE_SOURCE = ("fitted_steps", "started_from")  # entries of its run.json that end with it


def refuse_existing(path: Path) -> None:
    """Raise UserError where there is something already."""
    if path.exists() or path.is_symlink():
        raise UserError(f"--to={path} exists already; name a folder that doesn't")


def write_run(
    path: Path, run: Restored, config: str, source: RunFolder, pruned: dict[str, Any]
) -> None:
    """Write a run's folder, with one checkpoint, under a hidden name beside it; then rename it.

    A kill leaves the hidden folder, which the next call with the same name replaces. The checkpoint
    holds parameters and router state and nothing of the optimizer: `moe train` can't go on in the
    folder, and says so, but starts from it (`train.start_from`).

    Args:
        path: the new folder.
        run: the smaller model with its values, and the step that the source had trained.
        config: the text of its config.gin.
        source: the run that it was made from, whose run.json says what trained it.
        pruned: what run.json and the checkpoint say of how it was made.

    Raises:
        UserError: the folder exists.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = RunFolder(path.parent / f".{path.name}.unfinished")
    with hidden.locked("wait for it, or choose another --to"):
        _clear(hidden.path)
        table = resolved.rows(run.spec, *run.spec.in_force, run.model.module)
        theirs = source.read_json(source.run) if source.run.exists() else {}
        theirs = {name: v for name, v in theirs.items() if name not in ABOUT_THE_SOURCE}
        losses = {"router_losses": run.model.loss_coefficients}
        about = {**theirs, "versions": versions(), **losses, **costs_of(run.model)}
        about |= {"tokenizer": run.tokenizer.fingerprint, "pruned": pruned}
        hidden.begin(config, resolved.text(table), about, run.tokenizer, run.step)
        hidden.metrics.touch()  # a run has it: nothing was trained here
        step = jnp.asarray(run.step, jnp.int32)
        state = TrainState(step, run.params, run.router_state, opt_state=())
        with checkpoint.opened(hidden.checkpoints) as saves:
            saves.save(state, {"pruned": pruned})
        refuse_existing(path)
        os.rename(hidden.path, path)
        manifest.fsync_folder(path.parent)


def _clear(folder: Path) -> None:
    """Delete what a kill has left, but for the lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
