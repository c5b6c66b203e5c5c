"""Loads configs for commands and notebooks, checked against every configurable."""

from collections.abc import Sequence
from typing import Any

from moe import settings
from moe.cli import configurables
from moe.errors import UserError
from moe.runs.storage.folder import RunFolder
from moe.training.run_spec import RunSpec

assert configurables  # imported to be registered


bind = settings.load  # under this name, every configurable is imported


def load(gin_files: Sequence[str], gin_bindings: Sequence[str] = ()) -> RunSpec:
    """The run that config files and further settings describe; raises as `settings.load`."""
    bind(gin_files, gin_bindings)
    return RunSpec()


def of_flags(flags: Any) -> RunSpec:
    """The run that a command's flags name: in a folder, or by config files."""
    if flags.workdir:
        return of_folder(flags.workdir, flags.gin_bindings, vars(flags)["import"])
    return load(flags.gin_file, flags.gin_bindings)


def of_folder(
    workdir: str, gin_bindings: Sequence[str] = (), imports: Sequence[str] = ()
) -> RunSpec:
    """The run in a folder, with further settings on top.

    The folder may come from elsewhere: its config imports only our modules and those of `imports`,
    and what it says of `cache_dir` is ignored.

    Raises:
        UserError: there is no run, or a setting is wrong.
    """
    folder = RunFolder(workdir)
    if not folder.config.exists():
        run, step = folder.path.parent.parent, folder.path.name
        inside = folder.path.parent.name == "checkpoints"
        hint = f"; use --workdir={run} --step={step}" if inside else ""
        raise UserError(f"{workdir} holds no run: there is no config.gin in it{hint}")
    bind([str(folder.config)], gin_bindings, received=True, imports=imports)
    return RunSpec()
