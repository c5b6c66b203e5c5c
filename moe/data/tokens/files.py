"""Token files: memory-mapped arrays that are read as one sequence. N tokens."""

from collections.abc import Iterator, Sequence
import glob
import os
from pathlib import Path

import numpy as np

from moe.data.corpora.walk import nearest_path
from moe.errors import UserError

PIECE = 1 << 22  # tokens that are read at a time
Paths = str | os.PathLike | Sequence[str | os.PathLike]


class ShardedTokens:
    """Arrays of tokens, one behind the other, as one: a slice is an array, everything else maps."""

    def __init__(self, shards: Sequence[np.ndarray]):
        self._shards = shards
        self._end_S = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._end_S[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        assert step == 1, "tokens are read in their order"
        parts = []
        for s in range(int(np.searchsorted(self._end_S, start, side="right")), len(self._shards)):
            first = int(self._end_S[s]) - len(self._shards[s])
            if first >= stop:
                break
            parts.append(self._shards[s][max(0, start - first) : stop - first])
        return np.concatenate(parts) if parts else self._shards[0][:0]

    def pieces(self) -> Iterator[np.ndarray]:
        """All tokens in arrays of at most `PIECE`."""
        return (self[start : start + PIECE] for start in range(0, len(self), PIECE))

    def documents(self, document_id: int) -> Iterator[np.ndarray]:
        """The tokens between two document tokens, where there are any."""
        held: list[np.ndarray] = []
        for piece in self.pieces():
            first, *others = np.split(piece, np.flatnonzero(piece == document_id))
            held.append(first)
            for other in others:
                yield np.concatenate(held)
                held = [other[1:]]
        yield np.concatenate(held)


def name_of(files: Sequence[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].name}..{files[-1].name}"


def files_of(paths: Paths) -> list[Path]:
    """Each file once, in the order given, those of a glob by name."""
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
    """The tokens of one file, memory-mapped; UserError for what is no such file."""
    if not path.is_file() or path.suffix not in (".npy", ".bin"):
        raise UserError(f"{path}: a token file is a .npy or a .bin")
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
        else:
            array = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a file of tokens: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "ui" or not len(array):
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}; it must be tokens (N,), integers"
        )
    return array
