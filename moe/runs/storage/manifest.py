"""A checkpoint's manifest: the step that it holds, and size and checksum of each of its files.

Orbax checks no checksum of array data, and believes the name of a folder. The manifest is written
into the temporary folder, after all other files, and made durable before Orbax renames the folder:
a folder without one is no checkpoint, at whatever moment a run is killed.

Checksums are CRC-32: they find every flipped bit and all damage by accident, at 2 to 3 GB/s and
core; they are no signature.
"""

from concurrent.futures import ThreadPoolExecutor
import hashlib
import json
import os
from pathlib import Path
from typing import Any
import zlib

from moe import received
from moe.errors import UserError

NAME = "manifest.json"
# Orbax writes it after the manifest, and nobody reads it.
UNLISTED = {NAME, "commit_success.txt"}
# Beside the checkpoints: where old ones are moved to be deleted.
DELETED = "being-deleted"
CHUNK = 4 * 2**20
MOST_BYTES = 2**28  # of a manifest: a million files
THREADS = 4


class Damaged(Exception):
    """A checkpoint that can't be believed; the message names the file, or what else is wrong."""


def write(folder: Path, step: int) -> None:
    """List the files of a checkpoint in its manifest, and make all of them durable."""
    paths = _files(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        sums = list(pool.map(lambda path: _checksum(path, durable=True), paths))
    files = {_name(path, folder): found for path, found in zip(paths, sums, strict=True)}
    with (folder / NAME).open("wb") as file:
        file.write(_text({"step": step, "files": files}))
        file.flush()
        os.fsync(file.fileno())
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        fsync_folder(path)


def verify(folder: Path) -> None:
    """Raise Damaged unless a checkpoint's files are those of its manifest, which names its step."""
    for fault in faults(folder):
        raise Damaged(fault)


def faults(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, a line for each file at fault; empty where it is sound."""
    try:
        listed = _read(folder / NAME)
    except Damaged as damaged:
        return [str(damaged)]
    paths = {_name(path, folder): path for path in _files(folder)}
    found = [f"{name} is missing" for name in listed["files"] if name not in paths]
    found += [f"{name} is no file of it" for name in paths if name not in listed["files"]]
    both = {name: path for name, path in paths.items() if name in listed["files"]}
    with ThreadPoolExecutor(THREADS) as pool:
        each = pool.map(_fault, both.items(), [listed["files"][name] for name in both])
        found += [fault for fault in each if fault]
    if folder.name != str(listed["step"]):
        found.append(f"it holds step {listed['step']}: the folder was renamed")
    return found


def _fault(file: tuple[str, Path], expected: list[int]) -> str | None:
    """How a file (name, path) differs from its size and checksum; None where it doesn't."""
    name, path = file
    try:
        if path.is_file() and (size := path.stat().st_size) != expected[0]:  # maybe a terabyte
            return f"{name} has {size:,} bytes instead of {expected[0]:,}"
        size, checksum = _checksum(path)
    except Damaged as damaged:
        return str(damaged)
    if size != expected[0]:
        return f"{name} has {size:,} bytes instead of {expected[0]:,}"
    return None if checksum == expected[1] else f"{name} was altered: its checksum is another"


def size(folder: Path) -> tuple[int, int]:
    """The number of a checkpoint's files, and their bytes, by its manifest; Damaged without one."""
    files = _read(folder / NAME)["files"]
    return len(files), sum(size for size, _ in files.values())


def fingerprint(folder: Path) -> str:
    """A hash of the sizes and checksums of a checkpoint's files; Damaged without a manifest."""
    listed = json.dumps(_read(folder / NAME)["files"], sort_keys=True)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def verify_file(folder: Path, name: str) -> None:
    """Raise Damaged unless one file of a checkpoint is that of its manifest."""
    if _read(folder / NAME)["files"].get(name) != _checksum(folder / name):
        raise Damaged(f"{name} was altered")


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's manifest names; None without a sound manifest."""
    try:
        return _read(folder / NAME)["step"]
    except Damaged:
        return None


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _text(content: dict) -> bytes:
    """The manifest, with a checksum of itself."""
    body = json.dumps(content, indent=1, sort_keys=True).encode()
    return json.dumps({**content, "checksum": zlib.crc32(body)}, indent=1).encode() + b"\n"


def _read(path: Path) -> dict:
    try:
        text = received.read(path, MOST_BYTES)
        found = received.parsed(text, NAME)
        content = {"step": found["step"], "files": found["files"]}
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except (OSError, UserError, KeyError, TypeError):
        raise Damaged(f"{NAME} can't be read") from None
    if text != _text(content) or not _is_sane(**content):
        raise Damaged(f"{NAME} was altered")
    return content


def _is_sane(step: Any, files: Any) -> bool:
    """Whether a manifest's values are of the kinds that `write` writes."""
    return (
        received.is_of(step, int)
        and isinstance(files, dict)
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(received.is_of(n, int) for n in pair)
            for pair in files.values()
        )
    )


def _files(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if not path.is_dir()]
    return sorted(path for path in found if _name(path, folder) not in UNLISTED)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _checksum(path: Path, durable: bool = False) -> list[int]:
    """A file's size and CRC-32."""
    size = checksum = 0
    if not path.is_file():  # a pipe would wait for ever
        raise Damaged(f"{path.name} is no file")
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
            if durable:
                os.fsync(file.fileno())
    except OSError as error:
        raise Damaged(f"{path.name} can't be read: {error.strerror}") from None
    return [size, checksum]
