"""Whether the disk has room for the checkpoints that a run will keep, asked before it trains."""

from collections.abc import Callable
import dataclasses
import math
from pathlib import Path
import shutil

import jax

from moe.errors import UserError
from moe.training.run_spec import RunSpec
from moe.training.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class Room:
    """The room that a run's checkpoints take, and that there is.

    Attributes:
        each: bytes of a checkpoint. Orbax compresses arrays, but those in training hardly.
        count: how many there are at most at the same time, the one that is being written included:
            the one that it replaces is deleted afterwards.
        there: bytes of the checkpoints that there are.
        free: bytes that are free where they are written.
    """

    each: int
    count: int
    there: int
    free: int

    @property
    def enough(self) -> bool:
        return self.each * self.count - self.there <= self.free

    def __str__(self) -> str:
        return (
            f"the run keeps up to {self.count} checkpoints of {size(self.each)} at a time, "
            f"{size(max(self.each * self.count - self.there, 0))} more than there are, and "
            f"{size(self.free)} are free"
        )


def room(spec: RunSpec, abstract: TrainState, first: int, checkpoints: Path) -> Room:
    """The room for a run's checkpoints from step `first` on; its folder need not exist yet."""
    leaves = jax.tree.leaves(abstract)
    each = sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)
    every = [n for n in (spec.save_every, spec.eval_every) if n]
    saved = {step for n in every for step in range(n, spec.steps, n) if step > first}
    best = 1 if spec.eval_every else 0
    before = [path for path in checkpoints.glob("*") if path.name.isdecimal()]
    count = min(spec.keep + best + 1, len(saved | {spec.steps}) + len(before))
    there = sum(f.stat().st_size for path in before for f in path.rglob("*") if f.is_file())
    existing = next(p for p in (checkpoints, *checkpoints.absolute().parents) if p.is_dir())
    return Room(each, count, there, shutil.disk_usage(existing).free)


def check(found: Room, folder: Path, say: Callable[[str], None]) -> None:
    """Say that there may not be room for all of a run's checkpoints.

    Raises:
        UserError: there is none for a single one.
    """
    if found.free < found.each:
        raise UserError(
            f"{folder}: a checkpoint takes {size(found.each)}, and {size(found.free)} are free: "
            "nothing that is trained could be saved; make room, or choose another --workdir"
        )
    if not found.enough:
        say(f"the disk may get full: {found}; make room, or lower train.keep")


def size(count: int) -> str:
    """Bytes in words, such as 1.5 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count} bytes"
