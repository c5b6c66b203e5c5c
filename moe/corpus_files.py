"""The files of a corpus: a walk that accounts for every entry, reading that names what is wrong.

Each entry is read, or left out for a reason that is told. Only regular files are opened, each once,
by whatever names it is reached; links to folders are followed, circles end.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import glob
import gzip
import io
import itertools
import os
from pathlib import Path
import stat
from typing import IO, Any
import zlib

from moe.errors import UserError, nearest

Paths = str | os.PathLike | Sequence[str | os.PathLike]
COMPRESSED = (".gz", ".zst")
GZIP, ZSTD, MARK = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf"
HIDDEN, LINK, CIRCLE, SPECIAL = "hidden", "a broken link", "a link in a circle", "no regular file"
SUFFIX, TWICE = "another suffix", "reached before by another name"


@dataclasses.dataclass
class Walk:
    """What was found: (name, path) sorted by name, and what was left out by reason."""

    files: list[tuple[str, Path]] = dataclasses.field(default_factory=list)
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    _seen: set[str] = dataclasses.field(default_factory=set)

    def leave_out(self, path: Path, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(str(path))

    def add(self, name: str, path: Path) -> None:
        """A regular file, unless it is one that was found already."""
        real = os.path.realpath(path)
        if real in self._seen:
            self.leave_out(path, TWICE)
            return
        self._seen.add(real)
        self.files.append((name, path))

    def told(self) -> list[str]:
        """A line for each reason but the usual ones: hidden files, other suffixes, and repeats."""
        return [
            f"left out, {reason}: {', '.join(paths[:3])}"
            + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
            for reason, paths in self.left_out.items()
            if reason not in (HIDDEN, SUFFIX, TWICE)
        ]


def find_files(paths: Paths, suffixes: tuple[str, ...] = ()) -> Walk:
    """The files that paths and globs name; of folders all below, with one of the suffixes if any.

    Names are relative to what was given.

    Raises:
        UserError: nothing there, a folder that can't be read, or no file with such a suffix.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    walk = Walk()
    for pattern in given:
        before = len(walk.files)
        _expand(str(pattern), suffixes, walk)
        if len(walk.files) == before and not walk.left_out.get(TWICE):
            raise UserError(f"{pattern}: no file{_why_none(walk, suffixes)}")
    walk.files.sort()
    return walk


def _expand(pattern: str, suffixes: tuple[str, ...], walk: Walk) -> None:
    path = Path(pattern).expanduser()
    kind = kind_of(path)
    if kind == "folder":
        for name, file in _below(path, path, suffixes, walk, above=()):
            walk.add(name, file)
    elif kind == "file":
        walk.add(path.name, path)
    elif kind:
        raise UserError(f"{pattern}: {kind}; name a file or a folder")
    elif not glob.has_magic(pattern):
        raise UserError(f"no file or folder {pattern!r}{nearest_path(path)}")
    else:
        _glob(pattern, path, walk)


def _glob(pattern: str, path: Path, walk: Walk) -> None:
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    # Of several names of one file the shortest stands.
    for match in sorted(matches, key=lambda match: (len(match.parts), str(match))):
        kind = kind_of(match)
        if kind == "file":
            walk.add(match.relative_to(root).as_posix(), match)
        elif kind != "folder":
            walk.leave_out(match, kind)
    if not matches:
        hint = "; in a pattern, [[] stands for a bracket" if "[" in pattern else ""
        raise UserError(f"no file matches {pattern!r}{hint}")


def kind_of(path: Path) -> str:
    """file, folder, or why it is neither; empty where there is nothing at all."""
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except OSError as error:
        if path.is_symlink():
            return CIRCLE if error.errno in (40, 62) else LINK
        return ""
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else SPECIAL


def _below(
    root: Path, folder: Path, suffixes: tuple[str, ...], walk: Walk, above: tuple[str, ...]
) -> Iterator[tuple[str, Path]]:
    """Files under a folder, by name; `above` are the real paths of the folders that hold it."""
    real = os.path.realpath(folder)
    if real in above:
        walk.leave_out(folder, CIRCLE)
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}: a corpus without it would be another one; make it "
            "readable, or name the files to read"
        ) from error
    for entry in entries:
        path = Path(entry.path)
        kind = HIDDEN if entry.name.startswith(".") else kind_of(path)
        if kind == "folder":
            yield from _below(root, path, suffixes, walk, (*above, real))
        elif kind == "file" and has_suffix(entry.name, suffixes):
            yield path.relative_to(root).as_posix(), path
        else:
            walk.leave_out(path, SUFFIX if kind == "file" else kind)


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether the name ends so, compressed or not; no suffixes: any name does."""
    endings = [ending + more for ending in suffixes for more in ("", *COMPRESSED)]
    return not suffixes or name.endswith(tuple(endings))


def _why_none(walk: Walk, suffixes: tuple[str, ...]) -> str:
    """What was looked for, and what is there instead."""
    found = [Path(path).suffix or "no suffix" for path in walk.left_out.get(SUFFIX, ())]
    others = [f"{len(paths)} {reason}" for reason, paths in walk.left_out.items() if paths]
    if suffixes:
        there = ", ".join(sorted(set(found))[:6]) or "nothing"
        return f" with one of the suffixes {', '.join(suffixes)}; there is {there}"
    return f" to read ({', '.join(others) or 'it is empty'})"


def nearest_path(path: Path) -> str:
    """A hint at an existing name, for the first part of a path that does not exist."""
    while not path.parent.exists():
        path = path.parent
    return nearest(path.name, (p.name for p in path.parent.iterdir())) if path.name else ""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file to read, unpacked where it is gzip or Zstandard; a UTF-8 mark is passed over.

    Raises:
        UserError: what is damaged, while it is read too.
    """
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        try:
            if start.startswith(GZIP):
                with gzip.open(file) as unpacked:
                    yield _without_mark(unpacked)
            elif start == ZSTD:
                with _zstandard().ZstdDecompressor().stream_reader(file) as unpacked:
                    yield _without_mark(unpacked)
            else:
                yield _without_mark(file)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: the gzip file is damaged: {error}") from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            raise UserError(f"{path}: the Zstandard file is damaged: {error}") from error


def _without_mark(file: Any) -> IO[bytes]:
    """The file behind a byte-order mark, where it has one."""
    buffered: Any = file if hasattr(file, "peek") else io.BufferedReader(file)
    if buffered.peek(3)[:3] == MARK:
        buffered.read(3)
    return buffered


def _zstandard():
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "reading Zstandard files needs a package: pip install 'moe-routing[zst]'"
        ) from None
    return zstandard


def told_nulls(places: list[str]) -> list[str]:
    """A line on the places whose text was null; none where there are none."""
    if not places:
        return []
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return [f"left out, null: {', '.join(places[:3])}{more}"]


def decoded(data: bytes, path: Path, encoding: str, way_out: str, offset: int = 0) -> str:
    """The text; UserError with the first byte that is none, and the way out."""
    try:
        return data.decode(encoding)
    except LookupError:
        raise UserError(f"encoding={encoding!r} is not an encoding that Python knows") from None
    except UnicodeDecodeError as error:
        where = f"{path}: byte {offset + error.start}"
        raise UserError(f"{where} is not {encoding.upper()}; {way_out}") from None


def checked_text(value: object, where: str) -> str:
    """The value, if it is text that UTF-8 can write (JSON may hold half of a surrogate pair)."""
    if not isinstance(value, str):
        raise UserError(f"{where} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds an unpaired surrogate at {error.start}") from None
    return value


def name_of(paths: Paths) -> str:
    """What a corpus of these paths is called."""
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    return "+".join(Path(path).name or str(path) for path in given)
