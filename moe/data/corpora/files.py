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
# A compressed text may unpack to so many bytes, or to so many times its own size.
MOST_UNPACKED, MOST_RATIO = 2**28, 200
MOST_DOCUMENT = 2**32  # bytes
MOST_LINE = 2**26  # bytes of a line of JSON, whose values take twenty times the memory


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
            size = os.fstat(file.fileno()).st_size
            with _unpacked(start)(file) as unpacked:
                yield unpacked if unpacked is file else _counted(unpacked, path, size)
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


def _counted(unpacked: Any, path: Path, packed: int) -> IO[bytes]:
    """An unpacked file that refuses to grow beyond what a text can be packed to."""

    def pieces() -> Iterator[bytes]:
        size = 0
        while piece := unpacked.read(1 << 20):
            size += len(piece)
            refuse_bomb(path, packed, size)
            yield piece

    return io.BufferedReader(_Pieces(pieces()))  # pyright: ignore[reportArgumentType]


def refuse_bomb(path: Path, packed: int, unpacked: int) -> None:
    """UserError where so many bytes unpack to more than any text's would."""
    if unpacked > max(MOST_UNPACKED, MOST_RATIO * packed):
        raise UserError(
            f"{path}: its {packed:,} bytes unpack to more than {unpacked:,}, above {MOST_RATIO} "
            "times as many, which no text's do; unpack it yourself if it is what it should be"
        )


def document(file: IO[bytes], path: Path) -> bytes:
    """All of an open file; UserError where it is longer than MOST_DOCUMENT."""
    # A sparse file of a terabyte takes no room: it is not read to find out.
    longer = _size_of(file) > MOST_DOCUMENT
    if longer or len(data := file.read(MOST_DOCUMENT + 1)) > MOST_DOCUMENT:
        raise UserError(f"{path}: a document has at most {MOST_DOCUMENT:,} bytes; split it")
    return data


def _size_of(file: IO[bytes]) -> int:
    """The size of an open file on disk; 0 of one that is unpacked."""
    try:
        return os.fstat(file.fileno()).st_size
    except OSError:
        return 0


def lines_of(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines of an open file; UserError where one is longer than MOST_LINE."""
    for number, line in enumerate(iter(lambda: file.readline(MOST_LINE + 1), b""), 1):
        if len(line) > MOST_LINE:
            raise UserError(f"{path}:{number}: a line of JSON has at most {MOST_LINE:,} bytes")
        yield line


class _Pieces(io.RawIOBase):
    """A readable file made of pieces of bytes."""

    mode, name = "rb", ""

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
    while packed := packed or file.read(1 << 10):  # which may unpack to 30,000 times as much
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
