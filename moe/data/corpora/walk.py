"""Finds the files that a corpus's paths name: each entry once, or left out for a stated reason.

Only regular files are found, also through links. Links to folders are followed, but not in circles;
a folder that can't be listed is an error.
"""

import collections
from collections.abc import Iterable, Sequence
import dataclasses
import errno
import fnmatch
import glob
import itertools
import os
from pathlib import Path
import stat

from moe.errors import UserError, nearest

Paths = str | os.PathLike | Sequence[str | os.PathLike]
LeftOut = dict[str, list[str]]  # paths, by the reason why they are left out
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
HIDDEN, LINK, CIRCLE, SPECIAL = "hidden", "a broken link", "a link in a circle", "no regular file"
SUFFIX, TWICE, NULL = "another suffix", "reached before by another name", "null"


def find_files(
    paths: Paths, suffixes: tuple[str, ...] = (), left_out: LeftOut | None = None
) -> list[tuple[str, Path]]:
    """(name, path) of all files that paths and globs name, sorted by name.

    Names are relative to the given path; a file with several names has its shortest one.

    Args:
        paths: files, globs, and folders, which stand for all files below them.
        suffixes: which files of a folder are taken; all where empty.
        left_out: receives the entries that are not taken, by reason.

    Raises:
        UserError: a path names nothing, a folder can't be read, or no file has such a suffix.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    left_out = {} if left_out is None else left_out
    found, seen = [], set()
    for pattern in given:
        walk = _Walk(suffixes, seen)
        walk.expand(os.fspath(pattern))
        found += walk.found
        for reason, places in walk.left_out.items():
            left_out.setdefault(reason, []).extend(places)
    if not given:
        raise UserError("paths is empty: name a file, a folder or a pattern")
    return sorted(found)


def left_out_lines(left_out: LeftOut) -> list[str]:
    """A line for each reason, with the first three paths and the number of the others."""
    return [
        f"left out, {reason}: {', '.join(places[:3])}"
        + (f" and {len(places) - 3:,} more" if len(places) > 3 else "")
        for reason, places in left_out.items()
    ]


@dataclasses.dataclass
class _Walk:
    """The files that one path or glob names.

    suffixes: which files of a folder are taken. seen: real paths of the files found before.
    """

    suffixes: tuple[str, ...]
    seen: set[str]
    found: list[tuple[str, Path]] = dataclasses.field(default_factory=list)
    left_out: LeftOut = dataclasses.field(default_factory=dict)

    def expand(self, pattern: str) -> None:
        if not pattern or "\0" in pattern:
            raise UserError(f"paths holds {pattern!r}: name a file, a folder or a pattern")
        path = Path(os.path.expanduser(pattern))
        kind = kind_of(path)
        if kind == "folder":
            self._below(path, ["**", "*"], self.suffixes)
        elif kind == "file":
            self._add(path.name, path, os.path.realpath(path))
        elif kind:
            raise UserError(f"{pattern}: {kind}; name a file or a folder")
        elif not glob.has_magic(pattern):
            raise UserError(f"no file or folder {pattern!r}{nearest_path(path)}")
        else:
            fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            if kind_of(Path(*fixed)) == "folder":
                self._below(Path(*fixed), path.parts[len(fixed) :], ())
        if not self.found and TWICE not in self.left_out:
            raise UserError(self._why_none(pattern, kind))

    def _below(self, root: Path, parts: Sequence[str], suffixes: tuple[str, ...]) -> None:
        """Add the files whose path below root matches the parts of a pattern, as in glob.glob.

        A folder is listed once for each set of positions in the pattern at which it is reached.
        Links may give it infinitely many names, but only finitely many such sets.
        """
        parts = [*parts, "*"] if parts[-1] == "**" else list(parts)
        queue = collections.deque([(root, os.path.realpath(root), _closed({0}, parts))])
        visited = set()
        while queue:  # breadth first: the shortest names come first
            folder, real, positions = queue.popleft()
            if (real, positions) in visited:
                above = os.path.realpath(folder.parent)
                in_circle = os.path.commonpath([above, real]) == real
                self._leave_out(folder, CIRCLE if in_circle else TWICE)
                continue
            visited.add((real, positions))
            for entry in _entries(folder):
                path, after = folder / entry.name, _after(entry.name, positions, parts)
                if not after:
                    if len(parts) - 1 in positions and fnmatch.fnmatch(entry.name, parts[-1]):
                        self._leave_out(path, HIDDEN)
                    continue
                linked = entry.is_symlink()
                there = os.path.realpath(path) if linked else os.path.join(real, entry.name)
                if not (kind := kind_of(path)):
                    raise UserError(f"{path}: gone while it was listed, or its path is too long")
                if kind == "folder" and (further := after - {len(parts)}):
                    queue.append((path, there, _closed(further, parts)))
                elif kind == "file" and len(parts) in after and has_suffix(path.name, suffixes):
                    self._add(path.relative_to(root).as_posix(), path, there)
                elif kind != "folder" and len(parts) in after:
                    self._leave_out(path, SUFFIX if kind == "file" else kind)

    def _add(self, name: str, path: Path, real: str) -> None:
        if real in self.seen:
            self._leave_out(path, TWICE)
        else:
            self.seen.add(real)
            self.found.append((name, path))

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(str(path))

    def _why_none(self, pattern: str, kind: str) -> str:
        """A message on what was looked for, and what is there instead."""
        others = "; ".join(left_out_lines({r: p for r, p in self.left_out.items() if r != SUFFIX}))
        if kind != "folder":
            hint = "; in a pattern, [[] stands for a bracket" if "[" in pattern else ""
            return f"no file matches {pattern!r}{hint}{others and '; ' + others}"
        if not self.suffixes:
            return f"{pattern}: no file to read ({others or 'it is empty'})"
        found = {Path(path).suffix or "no suffix" for path in self.left_out.get(SUFFIX, ())}
        there = ", ".join(sorted(found)[:6]) or "nothing"
        looked_for = f"no file with one of the suffixes {', '.join(self.suffixes)}"
        return f"{pattern}: {looked_for}; there is {there}{others and '; ' + others}"


def kind_of(path: Path) -> str:
    """ "file", "folder", or why the path is neither; empty where nothing is there."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            return CIRCLE
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return LINK if path.is_symlink() else ""
        if error.errno == errno.ENAMETOOLONG:
            return ""
        raise UserError(f"{path}: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else SPECIAL


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a name has one of the suffixes, before that of a compression; true without any."""
    endings = [ending + more for ending in suffixes for more in ("", *COMPRESSED)]
    return not suffixes or name.endswith(tuple(endings))


def nearest_path(path: Path) -> str:
    """A hint at similar names, for the first part of a path that does not exist."""
    try:
        while not path.parent.exists():
            path = path.parent
        return nearest(path.name, os.listdir(path.parent)) if path.name else ""
    except OSError:  # too long, not a folder, or not readable
        return ""


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}: without it the corpus would be another one; make it "
            "readable, or name the files to read"
        ) from error


def _after(name: str, positions: Iterable[int], parts: Sequence[str]) -> frozenset[int]:
    """The positions in a pattern after matching an entry's name from the given positions.

    A leading dot is matched only by a dot.
    """
    hidden, after = name.startswith("."), set()
    for i in positions:
        if parts[i] == "**":
            after |= set() if hidden else {i}
        elif fnmatch.fnmatch(name, parts[i]) and (not hidden or parts[i].startswith(".")):
            after.add(i + 1)
    return frozenset(after)


def _closed(positions: Iterable[int], parts: Sequence[str]) -> frozenset[int]:
    """The positions, and those after each ** at them, which may match no folder at all."""
    found = set()
    for i in positions:
        found.add(i)
        while parts[i] == "**":
            i += 1
            found.add(i)
    return frozenset(found)
