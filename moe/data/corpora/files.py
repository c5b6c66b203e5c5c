"""Opens, unpacks and decodes the files of a corpus, which moe/data/corpora/walk.py finds.

Errors name the file and the place.
"""

import bz2
from collections.abc import Iterator
import contextlib
import gzip
import io
import lzma
import os
from pathlib import Path
from typing import IO, Any
import zlib

from moe.data.corpora.walk import Paths
from moe.errors import UserError

# The first bytes of a compressed file, and the function that opens it.
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
ZSTANDARD = (b"\x28\xb5\x2f\xfd", *(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60)))
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed if it is gzip, bzip2, xz or Zstandard.

    Raises:
        UserError: the file can't be opened, or reading it shows that it is damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(10)
            file.seek(0)
            with _unpacked(start)(file) as unpacked:
                yield unpacked
    except DAMAGED as error:
        raise UserError(f"{path}: the compressed file is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _unpacked(start: bytes) -> Any:
    """A function from an open file to its decompressed content, chosen by the first bytes."""
    if start.startswith(ZSTANDARD):
        return lambda file: io.BufferedReader(_Pieces(_zstandard_pieces(file)))
    if start.startswith(b"BZh") and start[4:] != b"1AY&SY":  # a text may start with BZh
        return contextlib.nullcontext
    kinds = (call for first, call in PACKED.items() if start.startswith(first))
    return next(kinds, contextlib.nullcontext)


class _Pieces(io.RawIOBase):
    """A readable file made of pieces of bytes."""

    def __init__(self, pieces: Iterator[bytes]):
        self.pieces, self.rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.rest = memoryview(piece)
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def _zstandard_pieces(file: IO[bytes]) -> Iterator[bytes]:
    """The decompressed frames; EOFError where one is cut off, which the library ignores."""
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "reading Zstandard files needs a package: pip install 'moe-routing[zst]'"
        ) from None
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as `zstd --long=31` writes
    frame, packed = None, b""
    while packed := packed or file.read(1 << 16):
        frame = frame or unpacker.decompressobj()
        try:
            yield frame.decompress(packed)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        packed = b""
        if frame.eof:
            packed, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends within a frame")


def decoded(data: bytes, path: Path, encoding: str, way_out: str, offset: int = 0) -> str:
    """The text, without a byte-order mark; UserError with the place of the first invalid byte.

    way_out: how the user may mend it. offset: of the data in the file.
    """
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        where = f"{path}: byte {offset + error.start}"
        raise UserError(f"{where} is not {encoding.upper()}; {way_out}") from None
    except (LookupError, ValueError):
        raise UserError(f"encoding={encoding!r} is not an encoding that Python knows") from None


def checked_text(value: object, where: str) -> str:
    """The value, if it is text that UTF-8 can encode (JSON may hold half of a surrogate pair)."""
    if not isinstance(value, str):
        raise UserError(f"{where} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds an unpaired surrogate at {error.start}") from None
    return value


def name_of(paths: Paths) -> str:
    """The name of a corpus of these paths."""
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    return "+".join(Path(path).name or str(path) for path in given)
