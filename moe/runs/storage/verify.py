"""Whether a run's folder is sound: its checkpoints by their manifests, its other files by reading.

Nothing is written, and no device is asked for.
"""

import dataclasses
import json
from pathlib import Path

from moe.errors import UserError
from moe.received import MOST_BYTES
from moe.runs.storage import manifest
from moe.runs.storage.folder import RunFolder
from moe.settings.read import bindings_of

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a save that did not end


@dataclasses.dataclass(frozen=True)
class Part:
    """A checkpoint or a file of a run.

    Attributes:
        name: `step 10`, or the file's.
        faults: what is damaged, a line each.
        note: its size, or what else is to be told.
    """

    name: str
    faults: list[str]
    note: str = ""


def parts(path: Path) -> list[Part]:
    """All parts of a run's folder, of its folder of checkpoints, or of a single checkpoint.

    Raises:
        UserError: there is none of these.
    """
    if (path / "checkpoints").is_dir() or (path / "config.gin").exists():
        return [*checkpoints(path / "checkpoints"), *set_aside(path), *files(RunFolder(path))]
    if (path / manifest.NAME).exists() or (path.name.isdecimal() and path.is_dir()):
        return [checkpoint(path.absolute())]
    if found := checkpoints(path):
        return found
    what = "holds no run and no checkpoint" if path.is_dir() else "is no folder"
    raise UserError(f"{path} {what}; give RUN, RUN/checkpoints or RUN/checkpoints/STEP")


def checkpoints(folder: Path) -> list[Part]:
    """The checkpoints of a folder, oldest first, and the saves that did not end."""
    there = list(folder.iterdir()) if folder.is_dir() else []
    steps = sorted((path for path in there if path.name.isdecimal()), key=lambda p: int(p.name))
    notes = {
        UNFINISHED: "a save that did not end: no checkpoint, and no damage",
        manifest.DELETED: "old checkpoints that a kill has kept from being deleted",
    }
    others = [
        Part(path.name, [], note)
        for path in sorted(there)
        for n, note in notes.items()
        if n in path.name
    ]
    return [*map(checkpoint, steps), *others]


def checkpoint(folder: Path) -> Part:
    """One checkpoint, held to its manifest."""
    if found := manifest.faults(folder):
        return Part(f"step {folder.name}", found)
    count, size = manifest.size(folder)
    return Part(f"step {folder.name}", [], f"{count} files, {size:,} bytes")


def set_aside(folder: Path) -> list[Part]:
    """The damaged checkpoints that earlier starts of the run have set aside."""
    names = sorted(path.name for path in folder.glob("damaged-checkpoint-*"))
    return [
        Part(name, [], "set aside by an earlier start; the run does not use it") for name in names
    ]


def files(folder: RunFolder) -> list[Part]:
    """The other files of a run that it needs, and those of its results that are there."""
    read = {
        folder.config: lambda: bindings_of(folder.config_text()),
        folder.run: lambda: folder.read_json(folder.run, data=dict, tokenizer=str),
        folder.tokenizer / "tokenizer.json": folder.own_tokenizer,
    }
    needed = [_part(path, folder, call) for path, call in read.items()]
    logs = [folder.metrics, folder.routing, folder.documents]
    logs = [path for path in logs if path.exists() or path == folder.metrics]
    results = [folder.summary] if folder.summary.exists() else []
    return [
        *needed,
        *(_log(path) for path in logs),
        *(
            _part(path, folder, lambda: folder.read_json(folder.summary, step=int))
            for path in results
        ),
    ]


def _part(path: Path, folder: RunFolder, call) -> Part:
    name = path.relative_to(folder.path).as_posix()
    if not path.is_file():
        return Part(name, ["it is missing" if not path.exists() else "it is no file"])
    try:
        call()
    except (UserError, OSError) as error:
        return Part(name, [str(error).splitlines()[0]])
    return Part(name, [])


def _log(path: Path) -> Part:
    """A file of JSON lines."""
    if not path.is_file():
        return Part(path.name, ["it is missing" if not path.exists() else "it is no file"])
    count, broken, last = 0, [], b"\n"
    with path.open("rb") as file:
        while line := file.readline(MOST_BYTES):
            count += last.endswith(b"\n")
            last = line
            if line.endswith(b"\n") and not _is_json(line):
                broken.append(count)
    cut = "" if last.endswith(b"\n") else ", the last one cut off, as a kill may leave it"
    fault = f"{len(broken)} of {count} lines are no JSON, the first in line {[*broken, 0][0]}"
    return Part(path.name, [fault] if broken else [], f"{count} lines{cut}")


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
