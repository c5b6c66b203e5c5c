"""Cached files with their checksum in front: one that was altered is told, and made anew.

A checksum finds accidents and edits by hand; who writes another checksum as well is believed.
"""

from collections.abc import Callable
import hashlib
import os
from pathlib import Path
import tempfile

Say = Callable[[str], None]
MARK = b"sha256 "


def write_sealed(path: Path, data: bytes) -> None:
    """Write a cached file, whole or not at all."""
    write_atomically(path, _seal(data) + data)


def read_sealed(path: Path, say: Say) -> bytes | None:
    """The content of a cached file; None, with a line told, where it was altered, or without it."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    seal, data = content[: len(_seal(b""))], content[len(_seal(b"")) :]
    if seal == _seal(data):
        return data
    told_altered(path, say)
    return None


def told_altered(path: Path, say: Say) -> None:
    """Say that a cached file can't be trusted."""
    say(f"the cached file {path} was altered or cut; it is made anew")


def _seal(data: bytes) -> bytes:
    return MARK + hashlib.sha256(data).hexdigest().encode() + b"\n"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file; other processes see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets nobody else read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
