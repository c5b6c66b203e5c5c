"""What watches a run: its watchdog and its peers, and what they say when they end it."""

from collections.abc import Iterator
import contextlib
import faulthandler
from pathlib import Path

from moe.machine import exits, processes
from moe.machine.watchdog import Watchdog
from moe.runs.storage import manifest
from moe.runs.storage.folder import RunFolder
from moe.training.run_spec import RunSpec

# A step that hangs takes at least so long, where `train.hang_seconds` gives no bound.
LEAST_ALONE, LEAST_TOGETHER = 600.0, 60.0


@contextlib.contextmanager
def guarded(spec: RunSpec, folder: RunFolder, process: int) -> Iterator[Watchdog]:
    """Watch the block's steps, and end the program where one hangs.

    process: the index of this one.
    """
    peers = processes.peers

    def bark(line: str) -> None:
        stacks = exits.briefly(lambda: write_stacks(folder.path / f"stacks-{process}.txt"))
        line = f"{line}; stacks in {stacks}" if stacks else line
        if peers is None:
            exits.end(f"moe: {line}; {exits.briefly(lambda: way_on(folder))}", exits.HUNG)
        else:
            peers.hung(line)

    least = LEAST_ALONE if peers is None else LEAST_TOGETHER
    watchdog = Watchdog(bark, spec.hang_seconds, least)
    if peers is not None:
        peers.patience = spec.heartbeat_seconds
        peers.at = lambda: watchdog.at
        peers.saved = lambda: way_on(folder)
    with watchdog:
        yield watchdog


def newest_step(folder: RunFolder) -> int | None:
    """The newest step with a checkpoint, by the checkpoints' manifests; None without any."""
    paths = folder.checkpoints.iterdir() if folder.checkpoints.is_dir() else ()
    steps = (manifest.step_of(path) for path in paths if path.name.isdecimal())
    return max((step for step in steps if step is not None), default=None)


def saved(folder: RunFolder) -> str:
    """What the run can go on from."""
    step = newest_step(folder)
    return "nothing is saved yet" if step is None else f"step {step} is saved"


def way_on(folder: RunFolder) -> str:
    """What the run can go on from, and how."""
    return f"{saved(folder)}; the same command goes on"


def write_stacks(path: Path) -> Path:
    """Write what every thread of this process is doing."""
    with path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    return path
