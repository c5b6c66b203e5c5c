"""A cache of token streams on disk: each split is tokenised once, and then memory-mapped.

The stream of a split concatenates `[document_id] + tokens` of its documents. It is written in
pieces, and long documents are encoded in passages, so that neither all text nor all tokens are ever
in memory. Files are written under temporary names and moved into place, so that several processes
may build the same stream at once; a record of sizes and hashes, written last, reveals damage.
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
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.data.tokens.sealed import read_sealed, told_altered, write_atomically, write_sealed
from moe.errors import UserError

if TYPE_CHECKING:  # tokenizer.py imports this module
    from moe.data.corpora.corpus import Document
    from moe.data.tokens.tokenizer import Tokenizer

Say = Callable[[str], None]

CHUNK_CHARACTERS = 1 << 21  # in one call of the tokenizer, which uses all cores
LONG = 1 << 20  # characters: longer documents are encoded in passages of at most this length
LAYOUT = 4  # raise when the files' meaning changes


def seldom(say: Say, seconds: float = 10.0) -> Say:
    """A `say` that drops lines within `seconds` of the last one it has printed."""
    last = time.monotonic()

    def now_and_then(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(line)

    return now_and_then


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The tokens of a split. N tokens, M documents.

    Attributes:
        token_N: uint16 or uint32, memory-mapped; each document starts with the document token.
        start_M: position of each document's document token; and N as one more entry.
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
        """The number of tokens without document tokens."""
        return len(self.token_N) - self.num_documents


def token_stream(
    documents: Callable[[], Iterator["Document"]],
    tokenizer: "Tokenizer",
    *,
    key: tuple[str, ...],
    cache_dir: Path,
    say: Say = lambda line: None,
) -> TokenStream:
    """The documents' token stream, loaded from the cache or else made and cached.

    Each document is decoded again when it is tokenised, so that a cached stream is lossless.

    Args:
        documents: returns an iterator over the documents.
        tokenizer: encodes them.
        key: hashes of everything that the stream depends on: the text and the tokenizer.
        cache_dir: the cache folder.
        say: prints the progress.

    Raises:
        UserError: tokens of a document don't decode to its text; the document is named.
    """
    content = json.dumps([LAYOUT, tokenizer.document_id, tokenizer.vocab_size, *key])
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    folder = cache_dir / "tokens"
    if (cached := _load(folder, name, say)) is not None:
        return cached
    now_and_then = seldom(say)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    with StreamWriter(folder, name, dtype) as stream:
        longest = LONG if is_concatenative(tokenizer) else sys.maxsize
        for chunk in chunks(documents(), longest):
            ids = encoded(chunk, tokenizer)
            check_lossless(chunk, ids, tokenizer)
            for passage, tokens in zip(chunk, ids, strict=True):
                num_bytes = len(passage.text.encode("utf-8"))
                if passage.start:
                    stream.extend(tokens, num_bytes)
                else:
                    stream.add([tokenizer.document_id, *tokens], num_bytes)
            now_and_then(f"tokenised {stream.num_bytes / 1e6:,.0f} MB")
    written = _load(folder, name, say)
    assert written is not None, f"{folder / name} cannot be read back"
    return written


class StreamWriter:
    """Writes a token stream in pieces, with only a few numbers per document in memory.

    The files get their names at the end of the `with` block; after an error nothing is left.
    """

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
        """Add a document, starting with the document token; num_bytes: of its text."""
        self._lengths.append(0)
        self._num_bytes.append(0)
        self.extend(tokens, num_bytes)

    def extend(self, tokens: Sequence[int] | np.ndarray, num_bytes: int) -> None:
        """Add more of the last document."""
        data = np.asarray(tokens, self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._lengths[-1] += len(tokens)
        self._num_bytes[-1] += num_bytes
        self.num_bytes += num_bytes

    def __exit__(self, kind, *_) -> None:
        """Move the tokens into place, then write the other arrays, then the record."""
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
        for field, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            data = buffer.getvalue()
            write_atomically(self._folder / f"{self._name}.{field}.npy", data)
            record[field] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        content = json.dumps(record, indent=1).encode()
        write_sealed(self._folder / f"{self._name}.record", content)


@dataclasses.dataclass(frozen=True)
class Passage:
    """A document's text, or a part of it that is encoded in one call.

    name: the document's. start: of the text in the document, in characters.
    """

    name: str
    text: str
    start: int


def passages(text: str, longest: int = LONG) -> Iterator[tuple[int, str]]:
    """(start, text) of passages of at most `longest` characters, cut at line ends if possible."""
    start = 0
    while start < len(text) - longest:
        end = text.rfind("\n", start, start + longest) + 1 or start + longest
        yield start, text[start:end]
        start = end
    yield start, text[start:] if start else text


def is_concatenative(tokenizer: "Tokenizer") -> bool:
    """Whether the concatenated tokens of several texts decode to the concatenated texts.

    Not so for a tokenizer that puts a space before each text: it has to encode a whole document.
    """
    texts = ["a b\n", "c d", " e\n", "f"]
    try:
        lists = tokenizer.encode_batch(texts)
    except UserError:  # some letters have no token
        return False
    return tokenizer.decode_batch([list(itertools.chain(*lists))]) == ["".join(texts)]


def encoded(passages: Sequence[Passage], tokenizer: "Tokenizer") -> list[list[int]]:
    """The tokens of each passage; UserError names the first one that can't be encoded."""
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
    """Raise UserError for the first passage whose tokens don't decode to its text and bytes."""
    texts = tokenizer.decode_batch(ids)
    way_out = "use a byte-level tokenizer, such as TextData.tokenizer = @TrainedBPE()"
    for passage, tokens, back in zip(passages, ids, texts, strict=True):
        text = passage.text
        if back != text:
            pairs = enumerate(zip(text, back, strict=False))
            at = next((i for i, (ours, theirs) in pairs if ours != theirs), len(back))
            raise UserError(
                f"document {passage.name}: its tokens don't decode to its text: from "
                f"character {passage.start + at} on {text[at : at + 20]!r} became "
                f"{back[at : at + 20]!r}, so that bits per byte would be wrong; {way_out}"
            )
        if not tokens:
            continue
        first_V, later_V = tokenizer.num_bytes_2V
        found = int((later_V if passage.start else first_V)[tokens[0]] + later_V[tokens[1:]].sum())
        if found != (size := len(text.encode("utf-8"))):
            raise UserError(
                f"document {passage.name}: its tokens decode to {found} bytes one by one, and it "
                f"has {size}: with this tokenizer bits per byte would be wrong; {way_out}"
            )


def chunks(documents: Iterable["Document"], longest: int) -> Iterator[list[Passage]]:
    """Lists of passages, each list with about `CHUNK_CHARACTERS` of text.

    longest: characters of a passage at most.
    """
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


def _load(folder: Path, name: str, say: Say) -> TokenStream | None:
    """The cached stream; None where there is none, or, with a line told, where it was altered."""
    content = read_sealed(folder / f"{name}.record", say)
    if content is None:
        return None
    record = json.loads(content)
    paths = {field: folder / f"{name}.{field}.npy" for field in ("start_M", "num_bytes_M")}
    paths["token_N"] = folder / f"{name}.token_N.bin"
    for field, path in paths.items():
        if not _is_intact(path, record[field]):
            told_altered(path, say)
            return None
    token_N = np.memmap(paths.pop("token_N"), np.dtype(record["token_N"]["dtype"]), "r")
    arrays = {field: np.load(path, mmap_mode="r") for field, path in paths.items()}
    return TokenStream(token_N, **arrays)


def _is_intact(path: Path, expected: dict[str, Any]) -> bool:
    """Whether a file has the size and checksum of its record."""
    try:
        with path.open("rb") as file:
            same_size = os.fstat(file.fileno()).st_size == expected["bytes"]
            return (
                same_size and hashlib.file_digest(file, "sha256").hexdigest() == expected["sha256"]
            )
    except OSError:
        return False
