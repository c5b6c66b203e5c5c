"""Token files: memory-mapped arrays that are read as one stream. N tokens."""

from collections.abc import Iterator, Sequence
import glob
import os
from pathlib import Path

import numpy as np

from moe.data.corpora.walk import nearest_path
from moe.errors import UserError, first_line

PIECE = 1 << 22  # tokens that are read at a time
Paths = str | os.PathLike | Sequence[str | os.PathLike]


class ShardedTokens:
    """Several token arrays as one stream; a slice of it is an array, nothing else is in memory."""

    def __init__(self, shards: Sequence[np.ndarray]):
        self._shards = shards
        self._end_S = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._end_S[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, stride = where.indices(len(self))
        assert stride == 1, "tokens are read in their order"
        pieces = []
        for s in range(int(np.searchsorted(self._end_S, start, side="right")), len(self._shards)):
            first = int(self._end_S[s]) - len(self._shards[s])
            if first >= stop:
                break
            pieces.append(self._shards[s][max(0, start - first) : stop - first])
        return np.concatenate(pieces) if pieces else self._shards[0][:0]

    def pieces(self) -> Iterator[np.ndarray]:
        """All tokens, in arrays of at most `PIECE`."""
        return (self[start : start + PIECE] for start in range(0, len(self), PIECE))

    def documents(self, document_id: int) -> Iterator[np.ndarray]:
        """The tokens of each document, without its document token; some may be empty."""
        held: list[np.ndarray] = []
        for piece in self.pieces():
            first, *others = np.split(piece, np.flatnonzero(piece == document_id))
            held.append(first)
            for other in others:
                yield np.concatenate(held)
                held = [other[1:]]
        yield np.concatenate(held)


def name_of(files: Sequence[Path]) -> str:
    """The name of a corpus of these files: that of the first and of the last."""
    return files[0].name if len(files) == 1 else f"{files[0].name}..{files[-1].name}"


def files_of(paths: Paths) -> list[Path]:
    """The files that paths and globs name, each once, in the given order; of a glob, by name."""
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    found: dict[Path, None] = {}
    for pattern in (os.path.expanduser(pattern) for pattern in given):
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not matches:
            raise UserError(f"no token file {pattern!r}{nearest_path(Path(pattern))}")
        found |= dict.fromkeys(map(Path, matches))
    if not found:
        raise UserError("TokenShards: no paths are given")
    return list(found)


def mapped(path: Path, dtype: str) -> np.ndarray:
    """The tokens of a file (N,), memory-mapped; UserError where it is no token file."""
    if not path.is_file() or path.suffix not in (".npy", ".bin"):
        raise UserError(f"{path}: a token file is a .npy or a .bin")
    try:
        if path.suffix == ".npy":  # not np.load, which unpickles and unzips by the first bytes
            array = np.lib.format.open_memmap(path, mode="r")
        else:
            array = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r")
    except Exception as error:  # a header is an expression: it fails in many ways
        raise UserError(f"{path}: not a file of tokens: {first_line(error)[:160]}") from None
    if array.ndim != 1 or array.dtype.kind not in "ui" or not len(array):
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}; it must be tokens (N,), integers"
        )
    return array
