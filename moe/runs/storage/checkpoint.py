"""Checkpoints by Orbax, asynchronous: the last few and the best are kept, the newest read."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import errno
import logging
import math
import os
from pathlib import Path
import re
import shutil
import sys
from typing import Any
import warnings

import jax

from moe.errors import UserError, first_line
from moe.machine import processes
from moe.runs.storage import manifest
from moe.runs.storage.manifest import Damaged
from moe.training.finite import TrainingDiverged, in_words, named, not_finite
from moe.training.train_step import TrainState

Say = Callable[[str], None]
_NEVER_READ = r"coroutine '(_read_array_index_and_device_put|\S*\bStore\.\w+)' was never awaited"


class NoOptimizer(UserError):
    """A checkpoint has no optimizer state, and it was asked for."""


class Checkpoints:
    """The checkpoints folder of a run.

    Beyond Orbax: a save that fails in the background raises in `wait` and in the next save; each
    checkpoint has a manifest, without which it is none, and no value is believed before all files
    agree with it; a damaged checkpoint is set aside and the one before it is read; arrays have the
    names, shapes and dtypes that were saved; and no value that is not finite is saved or restored.

    Args:
        folder: RUN/checkpoints.
        keep: how many of the newest checkpoints stay, beside the best one.
        read_only: never write, delete or set aside.
    """

    def __init__(self, folder: Path, keep: int = 2, read_only: bool = False):
        import absl.logging
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as keeping

        self.folder = folder.absolute()
        _hush_cancelled_tasks()
        absl.logging.set_verbosity(absl.logging.FATAL)  # we report what Orbax raises
        best = keeping.BestN(
            get_metric_fn=lambda m: m["val_loss"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,  # else all without an evaluation would stay
        )
        policy = keeping.AnyPreservationPolicy([keeping.LatestN(n=keep), best])
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            preservation_policy=None if read_only else policy,
            # Without it Orbax writes no metric, and a continued run would not know its best one.
            best_fn=lambda m: m["val_loss"],
            best_mode="min",
            temporary_path_class=_temporary_path_class(ocp),
            todelete_subdir=manifest.DELETED,
        )
        if not read_only and processes.is_first():
            shutil.rmtree(
                self.folder / manifest.DELETED, ignore_errors=True
            )  # of a start that was killed
        self._ocp = ocp
        self._options = options
        self._manager = _manager_class(ocp)(self.folder, options=options)

    def save(self, state: TrainState, extra: dict[str, Any], val_loss: float | None = None) -> None:
        """Start writing a checkpoint, and return before it is on disk.

        extra: JSON that is kept beside the state. val_loss: by which the best one is chosen.

        Raises:
            UserError: this save, or the one before it, can't be written.
            TrainingDiverged: the state holds a value that is not finite; nothing is written.
        """
        ocp = self._ocp
        tree = as_tree(state)
        if broken := not_finite(tree):
            raise TrainingDiverged(
                f"step {int(state.step)}: not finite: {in_words(broken)}; no checkpoint is made of "
                f"it; {self.last_good()}",
                int(state.step),
            )
        arrays = ocp.args.StandardSave(tree)
        known = val_loss is not None and math.isfinite(val_loss)
        metrics = {"val_loss": val_loss} if known else None
        composite = ocp.args.Composite(state=arrays, extra=ocp.args.JsonSave(extra))
        step = int(state.step)
        with self._disk_errors():
            if not self._manager.save(step, args=composite, metrics=metrics, force=True):
                raise UserError(f"the checkpoint of step {step} was not written")

    def wait(self) -> None:
        """Wait until every save is on disk; UserError where one can't be written."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn a full disk, say, into a UserError of one line; Orbax wraps it in other errors."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            causes = (os.strerror(n) for n in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO))
            first = first_line(error)[:160]
            reason = next((cause for cause in causes if cause in str(error)), first)
            raise UserError(
                f"a checkpoint can't be written to {self.folder} ({reason}); those before "
                f"it are whole: {self.steps()}"
            ) from None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def last_good(self, not_step: int | None = None) -> str:
        """Which checkpoint is the newest, in words; waits until every save is on disk.

        not_step: saved, perhaps, and found bad since.
        """
        self.wait()
        steps = [step for step in self.steps() if step != not_step]
        where = f"{self.folder} holds step {steps[-1]}" if steps else "there is no checkpoint yet"
        return f"the last good checkpoint: {where}"

    def restore(
        self, abstract: TrainState, step: int | None = None, say: Say = lambda line: None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest readable state, or that of `step`, and its `extra`; None without checkpoints.

        abstract: shapes, dtypes and shardings of the state; the mesh may be another than the one
            it was saved from.

        Raises:
            UserError: there are checkpoints, but none can be read; or `step` has none.
        """
        return self._newest(lambda candidate: self._read(candidate, abstract), step, say)

    def values(
        self, wanted: dict[str, jax.ShapeDtypeStruct], step: int | None = None, say: Say = print
    ) -> tuple[dict[str, jax.Array], int] | None:
        """Some arrays of the newest readable state, or of `step`, by name; and the state's step.

        wanted: shapes, dtypes and shardings by name, such as `params.embedding_VD`; only these are
            read. Not for an object whose `save` or `restore` was called: Orbax fixes the format.

        Raises:
            UserError: as `restore`; and for names or shapes that are not those of the checkpoint.
        """

        def read(candidate: int):
            self._refuse_other_arrays(candidate, wanted)
            ocp = self._ocp
            arguments = ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            )
            found = self._manager.restore(candidate, args=ocp.args.Composite(state=arguments))
            _refuse_not_finite(found["state"])
            return found["state"], candidate

        return self._newest(read, step, say)

    def arrays(self, step: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of a checkpoint's arrays, by name."""
        path = self.folder / str(step) / "state"
        content: Any = self._ocp.StandardCheckpointer().metadata(path)
        tree = content.item_metadata.tree
        return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in tree.items()}

    def _refuse_other_arrays(self, step: int, wanted: dict[str, Any]) -> None:
        """UserError unless the arrays are those wanted; Orbax would cast dtypes without a word."""
        there = self.arrays(step)
        if _has_optimizer(wanted) and not _has_optimizer(there):
            raise NoOptimizer(
                f"the checkpoint of step {step} in {self.folder} holds a model without optimizer "
                "state, as `moe prune` writes it: no run goes on from it, but a new one starts "
                f"from it, with train.start_from = {str(self.folder.parent)!r}"
            )
        if differs := _differences(wanted, there):
            raise UserError(f"the checkpoint holds another model: {differs}")

    def _verify(self, step: int) -> None:
        """Raise Damaged, in every process, unless the files of a checkpoint are its manifest's."""
        reason = None
        if processes.is_first():
            try:
                manifest.verify(self.folder / str(step))
            except Damaged as damaged:
                reason = str(damaged)
        if processes.any_process(reason is not None)[0]:
            raise Damaged(reason or "the first process says why")

    def _newest(self, read: Callable[[int], Any], step: int | None, say: Say) -> Any:
        """read(s) for the newest step s that can be read, or for `step`; None without any."""
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise UserError(f"{self.folder} has no checkpoint of step {step}; it has {steps}")
            steps = [step]
        damaged = []
        for candidate in reversed(steps):
            try:
                self._verify(candidate)
                found = read(candidate)
            except UserError:
                raise
            except Exception as error:  # damaged files raise errors of any kind
                reason = first_line(error)[:300]
                say(f"the checkpoint of step {candidate} can't be believed ({reason})")
                damaged.append(candidate)
                continue
            self._set_aside(damaged, say)
            return found
        if steps:  # not set aside, or the next start would train from the first step
            raise UserError(
                f"no checkpoint in {self.folder} can be believed; restore one from a copy, or "
                "choose another --workdir to start anew"
            )
        return None

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        ocp = self._ocp
        tree = as_tree(abstract)
        self._refuse_other_arrays(step, tree)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(tree, strict=True), extra=ocp.args.JsonRestore()
            ),
        )
        _refuse_not_finite(found["state"])
        # By name: a dict's leaves are sorted, those of a state are not.
        leaves = [found["state"][name] for name in tree]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), found["extra"]

    def _set_aside(self, steps: list[int], say: Say) -> None:
        """Move checkpoints out of Orbax's folder, without deleting them."""
        if self._options.read_only or not steps:
            return
        for step in steps:
            aside = self.folder.parent / f"damaged-checkpoint-{step}"
            count = 1
            while aside.exists():
                count += 1
                aside = aside.with_name(f"damaged-checkpoint-{step}-{count}")
            if processes.is_first():
                (self.folder / str(step)).rename(aside)
            say(f"it was set aside as {aside}; going on with the one before it")
        processes.any_process(False)  # until the first process has moved them
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()


def _manager_class(ocp: Any) -> Any:
    class Manager(ocp.CheckpointManager):
        def _finalize(self, step: int, steps_to_remove: list[int]) -> None:
            """As Orbax's, which renames old checkpoints into a folder; then they are deleted.

            Deleted in their place, they would be left in part by a kill, as if damaged.
            """
            super()._finalize(step, steps_to_remove)
            if processes.is_first():
                shutil.rmtree(Path(self.directory) / manifest.DELETED, ignore_errors=True)

        def metrics(self, step: int) -> dict[str, float] | None:
            """As Orbax's, but None for a damaged file, which would keep the folder from opening."""
            try:
                if found := super().metrics(step):
                    manifest.verify_file(Path(self.directory) / str(step), "metrics/metrics")
                return None if found is None else {"val_loss": float(found["val_loss"])}
            except (Damaged, ValueError, TypeError, KeyError):
                return None

    return Manager


def _temporary_path_class(ocp: Any) -> Any:
    class TemporaryPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            """As Orbax's, which renames the folder, but with a manifest of all files before."""
            final = Path(self.get_final())
            if not final.name.isdecimal():  # of one of a checkpoint's items
                return await super().finalize()
            if store := self._checkpoint_metadata_store:
                store.wait_until_finished()
                self._checkpoint_metadata_store = None  # it would write to a file that is listed
            manifest.write(Path(self.get()), int(final.name))
            await super().finalize()
            manifest.fsync_folder(final.parent)

    return TemporaryPath


def _has_optimizer(names: Iterable[str]) -> bool:
    return any(name.startswith("opt_state.") for name in names)


def _refuse_not_finite(arrays: dict[str, jax.Array]) -> None:
    """Raise Damaged where a restored value is not finite: `save` writes none."""
    if broken := not_finite(arrays):
        raise Damaged(f"not finite: {in_words(broken)}")


def _differences(wanted: dict[str, Any], there: dict[str, tuple[tuple[int, ...], str]]) -> str:
    """How the arrays of a checkpoint differ from those that are wanted, in a few words."""
    kinds = {name.split(".")[0] for name in wanted}
    missing = [name for name in wanted if name not in there]
    extra = [n for n in there if n.split(".")[0] in kinds and n not in wanted]
    both = [(name, there[name], want) for name, want in wanted.items() if name in there]
    other = [
        f"{name} is {shape} there, {tuple(want.shape)} here"
        for name, (shape, _), want in both
        if shape != tuple(want.shape)
    ]
    types = [
        f"{name} is {dtype} there, {want.dtype} here"
        for name, (_, dtype), want in both
        if dtype != str(want.dtype)
    ]
    kinds = {
        "missing there": missing,
        "only there": extra,
        "other shapes": other,
        "other dtypes": types,
    }
    return "; ".join(f"{kind}: {_few(names)}" for kind, names in kinds.items() if names)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def as_tree(state: TrainState) -> dict[str, Any]:
    """The state's arrays by name, in the order of its leaves."""
    return named(state)


@contextlib.contextmanager
def opened(folder: Path, keep: int = 2, read_only: bool = False) -> Iterator[Checkpoints]:
    """A folder's checkpoints; at the end of the block every save is on disk and they are closed."""
    checkpoints = Checkpoints(folder, keep, read_only)
    try:
        yield checkpoints
        checkpoints.wait()
    finally:
        checkpoints.close()


def _hush_cancelled_tasks() -> None:
    """Silence what cancelled tasks print after a failed save or restore, which we report ourselves.

    TensorStore prints an exception for each cancelled writer (its event loop is gone), Orbax one
    for each reader that is garbage-collected, and asyncio the results that nobody fetched: pages,
    at times in the middle of our own line.
    """
    before = sys.unraisablehook
    if getattr(before, "hushes_cancelled_tasks", False):
        return

    def hook(unraisable):
        error = unraisable.exc_value
        writer = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        reader = isinstance(getattr(error, "__cause__", None), GeneratorExit)
        reader = reader and "reading array index" in str(error)
        if not (writer or reader or re.match(_NEVER_READ, str(error))):
            before(unraisable)

    hook.hushes_cancelled_tasks = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", _NEVER_READ)
    theirs = ("orbax", "OCDBT")
    logging.getLogger("asyncio").addFilter(
        lambda record: not any(name in record.getMessage() for name in theirs)
    )
