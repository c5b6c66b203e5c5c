"""`moe launch`: `moe train` in several processes of this machine, started again when one dies."""

import sys

from moe.cli.commands import TRAIN
from moe.cli.main import parse
from moe.errors import UserError, printable
from moe.runs.launch import launch
from moe.runs.storage.folder import RunFolder

OURS = ("processes", "coordinator", "process")  # set for each process


def run(flags) -> int:
    """Run the processes to the end of the run; returns the exit status."""
    name, *given = flags.command
    if name != "train":
        raise UserError(f"moe launch runs train, not {name!r}, as: moe launch ... -- train ...")
    train = parse(TRAIN, given)
    if set_there := [f"--{flag}" for flag in OURS if getattr(train, flag) is not None]:
        raise UserError(f"moe launch sets {', '.join(set_there)} itself; leave it out after train")

    def command(address: str, process: int) -> list[str]:
        own = [f"--processes={flags.processes}", f"--coordinator={address}", f"--process={process}"]
        alone = flags.processes == 1
        return [sys.executable, "-m", "moe", "train", *given, *([] if alone else own)]

    def say(line: str) -> None:
        print(f"moe launch: {printable(line)}", file=sys.stderr, flush=True)

    return launch(command, flags.processes, RunFolder(train.workdir), flags.restarts, say)
