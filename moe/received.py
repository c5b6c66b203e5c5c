"""Small files that may come from elsewhere: regular ones only, of bounded size, and JSON in words.

A pipe would wait for ever, a device would never end, and a sparse file of a terabyte takes no room
in an archive.
"""

from collections.abc import Iterator, Mapping
import json
import os
from pathlib import Path
import stat
from typing import IO, Any

from moe.errors import UserError

MOST_BYTES = 2**24  # of a small file, or of a line of a table
MOST_NUMBER = 1e30
Kind = type | tuple[type, ...]


def opened(path: Path) -> IO[bytes]:
    """A regular file, open for reading.

    Raises:
        UserError: it is no regular file.
        OSError: it can't be opened.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path}: a regular file is expected, and this is none")
    return os.fdopen(handle, "rb")


def read(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file of at most so many bytes; raises as `opened`, or for a larger one."""
    with opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path}: above {most:,} bytes, the most that is expected")
    return content


def parsed(content: bytes | str, where: str) -> Any:
    """The value of a JSON text; UserError with the place where it is none, or nested too deeply."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{where}: {why}") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file; UserError where it is damaged or can't be read."""
    try:
        content = read(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return parsed(content, f"{path}: damaged")


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line of a file of JSON lines, those aside that are empty.

    Raises:
        UserError: a line is no JSON, or longer than MOST_BYTES; the file can't be read.
    """
    try:
        with opened(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b""), 1):
                if len(line) > MOST_BYTES:
                    raise UserError(f"{path}: damaged, line {number}: above {MOST_BYTES:,} bytes")
                if line.strip():
                    yield number, parsed(line, f"{path}: damaged, line {number}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def check(row: Any, kinds: Mapping[str, Kind], where: str) -> None:
    """UserError unless a JSON value is an object with these fields, each of its kind.

    A bool is no number; an int stands for a float; a number lies within 1e30.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: damaged: {shown(row)} where an object is expected")
    for name, kind in kinds.items():
        if name not in row:
            raise UserError(f"{where}: damaged: no {name!r} in {shown(row)}")
        if not is_of(row[name], kind):
            expected = [one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,))]
            words = " or ".join("null" if one == "NoneType" else one for one in expected)
            raise UserError(f"{where}: damaged: {name!r} is {shown(row[name])}, expected {words}")


def is_of(value: Any, kind: Kind) -> bool:
    """Whether a JSON value is of a kind."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int | float) and float in kinds:
        return abs(value) < MOST_NUMBER  # which no infinity is, and no NaN
    return isinstance(value, kinds)


def shown(value: Any, most: int = 40) -> str:
    """A value in a few letters; of a long text or list only the beginning is written out."""
    if isinstance(value, str):
        value = value[: most + 1]
    elif isinstance(value, list):
        value = value[:most]
    elif isinstance(value, dict):
        value = dict(list(value.items())[:most])
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes
        text = type(value).__name__
    return text if len(text) <= most else f"{text[:most]}..."
