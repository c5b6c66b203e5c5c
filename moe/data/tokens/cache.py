"""Token streams on disk: each split is tokenised once and memory-mapped ever after.

The stream of a split is `[document_id] + tokens` of each document, one after the other, written as
it is made: neither tokens nor documents are ever all in memory, and a long document is encoded in
passages. Files are written beside their final name and moved into place, so that processes which
build the same stream at the same time do no harm; a record of sizes and hashes, written last, shows
damage.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import hashlib
import io
import itertools
import json
import os
from pathlib import Path
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.errors import UserError

if TYPE_CHECKING:  # the tokenizer's module writes files by this one
    from moe.data.corpora.corpus import Document
    from moe.data.tokens.tokenizer import Tokenizer

Say = Callable[[str], None]

CHUNK_CHARACTERS = 1 << 21  # of text for one call of the tokenizer, which uses all cores
LONG = 1 << 20  # characters: a longer document is encoded in passages, of which each is shorter
LAYOUT = 3  # raise when the files' meaning changes


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that other processes see it whole or not at all."""
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
    """Which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """One split as tokens. N tokens, M documents.

    Attributes:
        token_N: uint16 or uint32, memory-mapped; each document starts with the document token.
        start_M: where each document's document token stands; one more entry at the end, N.
        num_bytes_M: UTF-8 bytes of each document's text.
    """

    token_N: np.ndarray
    start_M: np.ndarray
    num_bytes_M: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.num_bytes_M)

    @property
    def num_text_tokens(self) -> int:
        """Tokens of text: the document tokens are not counted."""
        return len(self.token_N) - self.num_documents


def token_stream(
    documents: Callable[[], Iterator["Document"]],
    tokenizer: "Tokenizer",
    *,
    key: tuple[str, ...],
    cache_dir: Path,
    say: Say = lambda line: None,
) -> TokenStream:
    """The stream of the documents, from the cache where it is whole, else built and kept there.

    `key` names everything that the stream depends on: the text's and the tokenizer's hashes. Every
    document is decoded again while it is built: what lies in the cache is known to be whole.

    Raises:
        UserError: a document that the tokenizer does not give back; it is named.
    """
    content = json.dumps([LAYOUT, tokenizer.document_id, tokenizer.vocab_size, *key])
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    folder = cache_dir / "tokens"
    if (cached := _load(folder, name)) is not None:
        return cached
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    with StreamWriter(folder, name, dtype) as stream:
        longest = LONG if joins(tokenizer) else sys.maxsize
        for chunk in chunks(documents(), longest):
            ids = encoded(chunk, tokenizer)
            check_lossless(chunk, ids, tokenizer)
            for passage, tokens in zip(chunk, ids, strict=True):
                num_bytes = len(passage.text.encode("utf-8"))
                if passage.start:
                    stream.extend(tokens, num_bytes)
                else:
                    stream.add([tokenizer.document_id, *tokens], num_bytes)
            say(f"tokenised {stream.num_bytes / 1e6:,.0f} MB")
    built = _load(folder, name)
    assert built is not None, f"{folder / name} cannot be read back"
    return built


class StreamWriter:
    """Writes a stream as it comes, in constant memory beyond a few numbers for each document."""

    def __init__(self, folder: Path, name: str, dtype: type):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name, self._dtype = folder, name, np.dtype(dtype)
        self._lengths, self._num_bytes = [], []
        self._digest, self.num_bytes = hashlib.sha256(), 0

    def __enter__(self) -> "StreamWriter":
        handle, self._temporary = tempfile.mkstemp(dir=self._folder, prefix=f".{self._name}.")
        self._file = os.fdopen(handle, "wb")
        return self

    def add(self, tokens: Sequence[int] | np.ndarray, num_bytes: int) -> None:
        """A document: its document token first, and the bytes of its text."""
        self._lengths.append(0)
        self._num_bytes.append(0)
        self.extend(tokens, num_bytes)

    def extend(self, tokens: Sequence[int] | np.ndarray, num_bytes: int) -> None:
        """More of the last document."""
        data = np.asarray(tokens, self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._lengths[-1] += len(tokens)
        self._num_bytes[-1] += num_bytes
        self.num_bytes += num_bytes

    def __exit__(self, kind, *_) -> None:
        """Move the tokens into place, then the rest; nothing stays of what failed."""
        with self._file:
            size = self._file.tell()
        if kind is not None:
            Path(self._temporary).unlink(missing_ok=True)
            return
        os.replace(self._temporary, self._folder / f"{self._name}.token_N.bin")
        start_M = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        record: dict[str, Any] = {
            "token_N": {"bytes": size, "sha256": self._digest.hexdigest(), "dtype": self._dtype.str}
        }
        arrays = {"start_M": start_M, "num_bytes_M": np.array(self._num_bytes, np.int64)}
        for part, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            data = buffer.getvalue()
            write_atomically(self._folder / f"{self._name}.{part}.npy", data)
            record[part] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        content = json.dumps(record, indent=1).encode()
        write_atomically(self._folder / f"{self._name}.json", content)


@dataclasses.dataclass(frozen=True)
class Passage:
    """A document's text from a character on: all of it, or as much as is encoded in one go."""

    name: str
    text: str
    start: int


def passages(text: str, longest: int = LONG) -> Iterator[tuple[int, str]]:
    """The text in pieces of at most so many characters that end with a line where they can."""
    start = 0
    while start < len(text) - longest:
        end = text.rfind("\n", start, start + longest) + 1 or start + longest
        yield start, text[start:end]
        start = end
    yield start, text[start:] if start else text


def joins(tokenizer: "Tokenizer") -> bool:
    """Whether tokens of two texts, one behind the other, are those of a text that is both.

    Not where a tokenizer writes a space before a text: it has to see all of a document at once.
    """
    texts = ["a b\n", "c d", " e\n", "f"]
    try:
        lists = tokenizer.encode_batch(texts)
    except UserError:  # it doesn't know these letters
        return False
    return tokenizer.decode_batch([list(itertools.chain(*lists))]) == ["".join(texts)]


def encoded(passages: Sequence[Passage], tokenizer: "Tokenizer") -> list[list[int]]:
    """The tokens of each; UserError for the first one that the tokenizer cannot encode."""
    try:
        return tokenizer.encode_batch([passage.text for passage in passages])
    except UserError:
        for passage in passages:
            try:
                tokenizer.encode_batch([passage.text])
            except UserError as error:
                raise UserError(f"document {passage.name}: {error}") from None
        raise


def check_lossless(
    passages: Sequence[Passage], ids: list[list[int]], tokenizer: "Tokenizer"
) -> None:
    """Raise UserError for the first passage that its tokens do not give back, text and bytes."""
    texts = tokenizer.decode_batch(ids)
    way_out = "use a byte-level tokenizer, such as TextData.tokenizer = @TrainedBPE()"
    for passage, tokens, back in zip(passages, ids, texts, strict=True):
        text = passage.text
        if back != text:
            pairs = enumerate(zip(text, back, strict=False))
            at = next((i for i, (ours, theirs) in pairs if ours != theirs), len(back))
            raise UserError(
                f"document {passage.name}: the tokenizer does not give back its text: from "
                f"character {passage.start + at} on {text[at : at + 20]!r} became "
                f"{back[at : at + 20]!r}, so that bits per byte would be wrong; {way_out}"
            )
        if not tokens:
            continue
        first_V, later_V = tokenizer.num_bytes_2V
        found = int((later_V if passage.start else first_V)[tokens[0]] + later_V[tokens[1:]].sum())
        if found != (size := len(text.encode("utf-8"))):
            raise UserError(
                f"document {passage.name}: its tokens give back {found} bytes one by one, and it "
                f"has {size}: with this tokenizer bits per byte would be wrong; {way_out}"
            )


def chunks(documents: Iterable["Document"], longest: int) -> Iterator[list[Passage]]:
    """Passages that together have about so much text as one call of the tokenizer takes."""
    chunk, size = [], 0
    for document in documents:
        for start, text in passages(document.text, longest):
            chunk.append(Passage(document.name, text, start))
            size += len(text)
            if size >= CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _load(folder: Path, name: str) -> TokenStream | None:
    """The cached stream, or None where a file is missing, cut or changed."""
    try:
        record = json.loads((folder / f"{name}.json").read_bytes())
        tokens = folder / f"{name}.token_N.bin"
        _check(tokens, record["token_N"])
        token_N = np.memmap(tokens, np.dtype(record["token_N"]["dtype"]), "r")
        arrays = {}
        for part in ("start_M", "num_bytes_M"):
            _check(path := folder / f"{name}.{part}.npy", record[part])
            arrays[part] = np.load(path, mmap_mode="r")
        return TokenStream(token_N, **arrays)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _check(path: Path, expected: dict) -> None:
    if path.stat().st_size != expected["bytes"]:
        raise ValueError(f"{path} was cut")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            raise ValueError(f"{path} was changed")
