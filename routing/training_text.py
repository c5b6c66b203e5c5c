"""The training text, for routers that count token ids in it. V vocabulary, N tokens."""

from collections.abc import Iterator
import dataclasses
import functools
import typing

import numpy as np

PIECE = 1 << 22  # tokens that are counted at a time


@typing.runtime_checkable
class TokenSequence(typing.Protocol):
    """Token ids in order: an array (N,), or files that are read by slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """Statistics of the training text, token_N, for routers that are initialised from them."""

    token_N: TokenSequence
    vocab_size: int

    def _pieces(self) -> Iterator[np.ndarray]:
        """The tokens in pieces, each beginning with the last token of the one before."""
        for start in range(0, len(self.token_N) - 1, PIECE):
            yield self.token_N[start : start + PIECE + 1]

    @functools.cached_property
    def count_V(self) -> np.ndarray:
        """How often each token id occurs: int64 (V,)."""
        count_V = np.zeros(self.vocab_size, np.int64)
        for token_N in self._pieces():
            count_V += np.bincount(token_N[1:], minlength=self.vocab_size)
        count_V[self.token_N[:1]] += 1
        return count_V

    @functools.cached_property
    def next_V(self) -> np.ndarray:
        """The id that most often follows each id (ties: the lowest), int32 (V,)."""
        pairs, counts = np.zeros((2, 0), np.int64)
        for token_N in self._pieces():
            pair_N = token_N[:-1].astype(np.int64) * self.vocab_size + token_N[1:]
            found, found_counts = np.unique(pair_N, return_counts=True)
            union, place = np.unique(np.concatenate([pairs, found]), return_inverse=True)
            summed = np.concatenate([counts, found_counts])
            pairs, counts = union, np.bincount(place, summed).astype(np.int64)
        order = np.lexsort((pairs, -counts, pairs // self.vocab_size))
        first = pairs[order] // self.vocab_size
        seen, start = np.unique(first, return_index=True)
        next_V = np.zeros(self.vocab_size, np.int32)
        next_V[seen] = pairs[order][start] % self.vocab_size
        return next_V
