"""The training text, for routers that count in it before a model starts. V vocabulary, N tokens."""

from collections.abc import Iterator
import dataclasses
import functools
import typing

import numpy as np

PIECE = 1 << 22  # tokens that are counted at a time, in int64


@typing.runtime_checkable
class TokenSequence(typing.Protocol):
    """Token ids in order: an array (N,), or files that are read where they are sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """What routers may count in the training text before they start: its tokens in order (N,)."""

    token_N: TokenSequence
    vocab_size: int

    def _pieces(self) -> Iterator[np.ndarray]:
        """The tokens in pieces, each from the last token before it on; a whole file is large."""
        for start in range(0, len(self.token_N) - 1, PIECE):
            yield self.token_N[start : start + PIECE + 1]

    @functools.cached_property
    def count_V(self) -> np.ndarray:
        """How often each token id occurs: int64."""
        count_V = np.zeros(self.vocab_size, np.int64)
        for token_N in self._pieces():
            count_V += np.bincount(token_N[1:], minlength=self.vocab_size)
        count_V[self.token_N[:1]] += 1
        return count_V

    @functools.cached_property
    def next_V(self) -> np.ndarray:
        """The id that follows each id most often (ties: the lowest); a bigram model's guess."""
        pair_P, count_P = np.zeros((2, 0), np.int64)
        for token_N in self._pieces():
            pair_N = token_N[:-1].astype(np.int64) * self.vocab_size + token_N[1:]
            found_P, found_count_P = np.unique(pair_N, return_counts=True)
            both_P, place_P = np.unique(np.concatenate([pair_P, found_P]), return_inverse=True)
            both_count_P = np.concatenate([count_P, found_count_P])
            pair_P, count_P = both_P, np.bincount(place_P, both_count_P).astype(np.int64)
        first_P = np.lexsort((pair_P, -count_P, pair_P // self.vocab_size))
        before_P = pair_P[first_P] // self.vocab_size
        seen, place = np.unique(before_P, return_index=True)
        next_V = np.zeros(self.vocab_size, np.int32)
        next_V[seen] = pair_P[first_P][place] % self.vocab_size
        return next_V
