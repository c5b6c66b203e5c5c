"""Token streams on disk: each split is tokenised once and memory-mapped ever after.

The stream of a split is `[document_id] + tokens` of each document, one after the other. Files are
written beside their final name and moved into place, so that processes which build the same
stream at the same time do no harm; a record of sizes and hashes, written last, shows damage.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path
import tempfile

import numpy as np

CHUNK_CHARACTERS = 1 << 21  # of text for one call of the tokenizer, which uses all cores
LAYOUT = 1  # raise when the files' meaning changes


def default_cache_dir() -> Path:
    """`$MOE_CACHE`, or `~/.cache/moe`."""
    return Path(os.environ.get("MOE_CACHE") or "~/.cache/moe").expanduser()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that other processes see it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    texts: Callable[[], Iterator[str]],
    *,
    encode_batch: Callable[[list[str]], list[list[int]]],
    document_id: int,
    vocab_size: int,
    key: tuple[str, ...],
    cache_dir: Path,
) -> TokenStream:
    """The stream of the texts, from the cache where it is whole, else built and kept there.

    `key` names everything that the stream depends on: the text's and the tokenizer's hashes.
    """
    content = json.dumps([LAYOUT, document_id, vocab_size, *key])
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    folder = cache_dir / "tokens"
    if (cached := _load(folder, name)) is not None:
        return cached
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    _save(folder, name, _build(texts(), encode_batch, document_id, dtype))
    built = _load(folder, name)
    assert built is not None, f"{folder / name} cannot be read back"
    return built


def _build(texts: Iterable[str], encode_batch, document_id: int, dtype) -> TokenStream:
    pieces, lengths, num_bytes = [], [], []
    for chunk in _chunks(texts):
        num_bytes += [len(text.encode("utf-8")) for text in chunk]
        for ids in encode_batch(chunk):
            pieces.append(np.array([document_id, *ids], dtype))
            lengths.append(len(ids) + 1)
    start_M = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return TokenStream(np.concatenate(pieces), start_M, np.array(num_bytes, np.int64))


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _save(folder: Path, name: str, stream: TokenStream) -> None:
    record = {}
    for part in ("token_N", "start_M", "num_bytes_M"):
        buffer = io.BytesIO()
        np.save(buffer, getattr(stream, part))
        data = buffer.getvalue()
        write_atomically(folder / f"{name}.{part}.npy", data)
        record[part] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_atomically(folder / f"{name}.json", json.dumps(record, indent=1).encode())


def _load(folder: Path, name: str) -> TokenStream | None:
    """The cached stream, or None where a file is missing, cut or changed."""
    try:
        record = json.loads((folder / f"{name}.json").read_bytes())
        arrays = {part: _checked(folder / f"{name}.{part}.npy", record[part]) for part in record}
        return TokenStream(**arrays)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _checked(path: Path, expected: dict) -> np.ndarray:
    if path.stat().st_size != expected["bytes"]:
        raise ValueError(f"{path} was cut")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            raise ValueError(f"{path} was changed")
    return np.load(path, mmap_mode="r")
