"""The teacher of a run that distils: another run's config and the values of its checkpoint."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from moe import settings
from moe.data.tokens.tokenizer import Tokenizer
from moe.errors import Problems, UserError, first_line
from moe.runs.restore import read_values, stored_model
from moe.runs.storage import manifest
from moe.runs.storage.folder import AnotherRun, RunFolder
from moe.training.distillation import Distillation, Teacher
from moe.training.run_spec import RunSpec

Say = Callable[[str], None]


class Taught(NamedTuple):
    """A teacher with its values, and which checkpoint they are of, for the run's records."""

    teacher: Teacher
    record: dict[str, Any]


def find(spec: RunSpec, tokenizer: Tokenizer, mesh: Mesh, say: Say) -> Teacher:
    """The teacher of `train.distil` without its values: its config read, and held against the run.

    Its config may import what any received config may, and the modules that this run imports.

    Raises:
        UserError: no run there; another tokenizer or objective; a model that can't read sequences
            of this length.
    """
    distil = spec.distil
    assert distil is not None
    with named(distil):
        folder = folder_of(distil)
        if folder.own_tokenizer().fingerprint != tokenizer.fingerprint:
            raise UserError(
                "that run has another tokenizer; take its own: TextData.tokenizer = "
                f"@TokenizerFile() and TokenizerFile.path = {str(folder.tokenizer)!r}"
            )
        imports = settings.imported()
        with settings.aside():
            settings.load(
                [str(folder.config)],
                say=say,
                received=True,
                imports=imports,
                trusting="import it in this run's config: import {module}",
            )
            # Objects that only training needs are not made.
            theirs = RunSpec(data=None, distil=None, loggers=(), metrics=())
            ours, other = (type(one.in_force.objective).__name__ for one in (spec, theirs))
            if ours != other:
                raise UserError(
                    f"that run's train.objective is @{other}(), this run's @{ours}(); they must "
                    "be the same"
                )
            shape = {"batch_size": spec.batch_size, "sequence_length": spec.sequence_length}
            model = stored_model(dataclasses.replace(theirs, **shape), tokenizer)
    return Teacher.of(model, distil, mesh)


def folder_of(distil: Distillation) -> RunFolder:
    """The teacher's folder; UserError where it is not a run's, with checkpoints."""
    path = Path(distil.teacher).expanduser()
    folder = RunFolder(path)
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        raise UserError(
            f"this is a checkpoint; set Distillation.teacher = {str(path.parent.parent)!r} and "
            f"Distillation.step = {path.name}"
        )
    if not folder.config.exists():
        raise UserError("no run there: it has no config.gin")
    if not (folder.checkpoints.is_dir() and folder.tokenizer.is_dir()):
        raise UserError("no run with checkpoints there")
    return folder


def read(
    distil: Distillation, teacher: Teacher, mesh: Mesh, before: dict[str, Any] | None, say: Say
) -> Taught:
    """The teacher with its values on a mesh.

    before: the record of the run's own checkpoint, whose teacher is read again; None for a run
        that begins.

    Raises:
        UserError: no such checkpoint, or none that can be read.
        AnotherRun: it is not the checkpoint that the run began with, or that is gone.
    """
    with named(distil):
        folder = folder_of(distil)
        step = before["step"] if before else distil.step
        if before and not (folder.checkpoints / str(step)).is_dir():
            raise AnotherRun(
                f"this run began with the checkpoint of step {step}, which that run has no more "
                "(train.keep of the teacher says how many stay); put it back from a copy, or "
                "choose another --workdir"
            )
        *arrays, step = read_values(folder, teacher.model, mesh, step, say)
        found = manifest.fingerprint(folder.checkpoints / str(step))
        record = {"run": distil.teacher, "step": step, "fingerprint": found}
        if before and before != record:
            raise AnotherRun(
                f"the checkpoint of step {step} is not the one that this run began with: "
                f"{before['fingerprint']} then, {found} now; put that one back, or choose another "
                "--workdir"
            )
    costs = teacher.model.costs
    say(
        f"teacher: {distil.teacher}, step {step}: {costs.parameters_total:,} parameters, "
        f"{costs.parameters_active:,} active; its passes are in the run's time, not in its FLOPs"
        "; this run needs that checkpoint until it is finished"
    )
    return Taught(teacher.with_values(*arrays), record)


@contextlib.contextmanager
def named(distil: Distillation) -> Iterator[None]:
    """Errors of the block say that they are about the teacher, in lines of their own."""
    where = f"Distillation.teacher={distil.teacher!r}"
    try:
        yield
    except Problems as problems:
        raise Problems([f"{where}: {line}" for line in problems.lines]) from problems
    except UserError as error:
        raise type(error)(f"{where}: {first_line(error)}") from error
