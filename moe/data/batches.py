"""Batches of token windows: the shuffled training stream, and the held-out documents.

B sequences a batch, T tokens each; N tokens in a stream.
"""

import bisect
import collections
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING

import numpy as np

from moe.data.corpora.corpus import hash_position

if TYPE_CHECKING:  # it imports JAX, without which a config loads quickly
    from moe.data.batch import Batch
    from routing.training_text import TokenSequence


@dataclasses.dataclass(frozen=True)
class Share:
    """A range of the token stream, from `start` to `end`, whose windows are drawn by `weight`."""

    start: int
    end: int
    weight: float = 1.0
    name: str = ""


class TrainBatches:
    """Endless batches of shuffled windows of T + 1 tokens; each epoch has its own order and offset.

    Args:
        token_N: the training stream.
        batch_size: B.
        sequence_length: T.
        seed: of the order and the offsets.
        document_id: the token that starts a document, to isolate documents; None to not do so.
        shares: ranges of the stream whose windows are mixed by weight; all of it where None.
    """

    def __init__(
        self,
        token_N: "TokenSequence",
        batch_size: int,
        sequence_length: int,
        seed: int,
        document_id: int | None,
        shares: Sequence[Share] | None = None,
    ):
        import grain

        self._token_N, self._seed, self._document_id = token_N, seed, document_id
        self._batch_size, self._length = batch_size, sequence_length
        shares = shares or (Share(0, len(token_N)),)
        made, self.windows_per_epoch = [], 0
        for number, share in enumerate(shares):
            count = (share.end - share.start - 1) // sequence_length
            windows = grain.MapDataset.range(count).seed((seed + number) % 2**32)
            window = functools.partial(self._window, share, count)
            self.windows_per_epoch += count
            made.append(windows.shuffle().repeat().map_with_index(window))
        weights = [share.weight for share in shares]
        self._windows = made[0] if len(made) == 1 else grain.MapDataset.mix(made, weights)

    def batch(self, i: int, rows: slice | None = None) -> "Batch":
        """Batch i; of its rows only `rows`, those that a process reads."""
        index_B = np.arange(self._batch_size, dtype=np.int32)[rows or slice(None)]
        first = i * self._batch_size
        window_BW = np.stack([np.asarray(self._windows[first + int(row)]) for row in index_B])
        return train_batch(window_BW.astype(np.int32), index_B, self._document_id)

    def batches(
        self, start: int = 0, rows: slice | None = None, depth: int = 4
    ) -> Generator["Batch", None, None]:
        """Batches `start`, `start` + 1, ... without end, made by a thread `depth` batches ahead."""
        with ThreadPoolExecutor(1, "train-batches") as thread:
            made = collections.deque(
                thread.submit(self.batch, i, rows) for i in range(start, start + depth)
            )
            for i in itertools.count(start + depth):
                batch = made.popleft().result()
                made.append(thread.submit(self.batch, i, rows))
                yield batch

    def _window(self, share: Share, count: int, index: int, window: int) -> np.ndarray:
        start = share.start + window * self._length + self._offset(index // count)
        end = start + self._length + 1
        if end <= share.end:
            return self._token_N[start:end]
        over = slice(share.start, share.start + end - share.end)  # wraps to the share's start
        return np.concatenate([self._token_N[start : share.end], self._token_N[over]])

    def _offset(self, epoch: int) -> int:
        """Tokens before an epoch's first window, so that each epoch cuts documents elsewhere."""
        return int(hash_position(f"epoch {epoch}", self._seed) * self._length)


def train_batch(
    window_BW: np.ndarray, index_B: np.ndarray, document_id: int | None = None
) -> "Batch":
    """The batch of windows (B, W) of W = T + 1 tokens.

    index_B: the number of each row in the global batch. document_id: the token that starts a new
        segment; None for one segment per row.
    """
    from moe.data.batch import Batch

    token_BT, target_BT = window_BW[:, :-1], window_BW[:, 1:]
    position_BT = np.broadcast_to(np.arange(token_BT.shape[1], dtype=np.int32), token_BT.shape)
    segment_BT = np.ones_like(token_BT)
    if document_id is not None:
        starts_BT = token_BT == document_id
        start_BT = np.maximum.accumulate(np.where(starts_BT, position_BT, 0), axis=1)
        starts_BT[:, 0] = True
        segment_BT = np.cumsum(starts_BT, axis=1, dtype=np.int32)
        position_BT = position_BT - start_BT
    scored_BT = np.ones(token_BT.shape, bool)
    return Batch(token_BT, target_BT, segment_BT, position_BT, scored_BT, index_B)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A range of the stream in a validation window: `length` inputs from `start`.

    The first `context` and the last `after` inputs are not scored.
    """

    start: int
    length: int
    context: int
    after: int = 0

    @property
    def scored(self) -> int:
        """The number of inputs that are scored."""
        return self.length - self.context - self.after


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """A fixed list of batches of held-out documents, in which no token is scored twice.

    Attributes:
        token_N: the held-out stream.
        rows: the pieces that are packed into each row.
        num_bytes: bytes of the text that is scored.
        start_M: first token of each document that is scored, the last one perhaps in part.
        shift: targets are this many tokens after their inputs: 1 for the next token, 0 for the
            token itself.
    """

    token_N: np.ndarray
    rows: Sequence[Sequence[Piece]]
    batch_size: int
    sequence_length: int
    num_bytes: int
    start_M: Sequence[int]
    shift: int = 1

    @property
    def num_documents(self) -> int:
        return len(self.start_M)

    @property
    def num_tokens(self) -> int:
        """Inputs that are scored, in all batches; a masked objective scores only hidden ones."""
        return sum(piece.scored for row in self.rows for piece in row)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator["Batch"]:
        return (self.batch(i) for i in range(len(self)))

    def places(self, i: int) -> Iterator[tuple[int, int, int, int]]:
        """(row in the batch, first, end, document) of each piece of batch i.

        Inputs first to end of the row are of this document, by its number in `start_M`.
        """
        first = i * self.batch_size
        for b, row in enumerate(self.rows[first : first + self.batch_size]):
            at = 0
            for piece in row:
                document = int(np.searchsorted(self.start_M, piece.start, side="right")) - 1
                yield b, at, at + piece.length, document
                at += piece.length

    def batch(self, i: int, rows: slice | None = None) -> "Batch":
        """Batch i; of its rows only `rows`. The last batch is padded with empty rows."""
        from moe.data.batch import Batch

        if not 0 <= i < len(self):
            raise IndexError(f"there are {len(self)} validation batches, not {i + 1}")
        index_B = np.arange(self.batch_size, dtype=np.int32)[rows or slice(None)]
        shape = (len(index_B), self.sequence_length)
        token_BT, target_BT, segment_BT, position_BT = np.zeros((4, *shape), np.int32)
        scored_BT = np.zeros(shape, bool)
        for b, row in enumerate(i * self.batch_size + index_B):
            at = 0
            for segment, piece in enumerate(self.rows[row] if row < len(self.rows) else ()):
                end, stop = at + piece.length, piece.start + piece.length
                token_BT[b, at:end] = self.token_N[piece.start : stop]
                target_BT[b, at:end] = self.token_N[piece.start + self.shift : stop + self.shift]
                segment_BT[b, at:end] = segment + 1
                position_BT[b, at:end] = np.arange(piece.length)
                scored_BT[b, at + piece.context : end - piece.after] = True
                at = end
        index_B += i * self.batch_size  # so that masks don't depend on the batch size
        return Batch(token_BT, target_BT, segment_BT, position_BT, scored_BT, index_B)


def bytes_of(token_N: np.ndarray, start_M: np.ndarray, num_bytes_2V: np.ndarray) -> np.ndarray:
    """Bytes of text that each token decodes to, (N,).

    start_M: positions of the document tokens. num_bytes_2V: as of `Tokenizer`.
    """
    bytes_N = num_bytes_2V[1, token_N]
    first_M = start_M[start_M + 1 < len(token_N)] + 1
    bytes_N[first_M] = num_bytes_2V[0, token_N[first_M]]
    return bytes_N


def choose_spans(
    token_N: np.ndarray,
    start_M: np.ndarray,
    num_bytes_M: np.ndarray,
    num_bytes_2V: np.ndarray,
    max_bytes: int | None,
) -> list[tuple[int, int, int]]:
    """Spans (first token, end, bytes of text) of the documents to score, in the stream's order.

    Without max_bytes these are all documents with text. Else documents are taken in a fixed random
    order until max_bytes are full, and the last one is cut after its last token that fits; but for
    that cut, the text is the same for every tokenizer.

    Args:
        token_N: the stream.
        start_M: start of each document in it, and its end.
        num_bytes_M: bytes of each document's text.
        num_bytes_2V: as of `Tokenizer`.
        max_bytes: of text in all; None for all of it.
    """
    texts = np.flatnonzero(num_bytes_M)
    if max_bytes is None:
        return [(int(start_M[m]), int(start_M[m + 1]), int(num_bytes_M[m])) for m in texts]
    chosen, left = [], max_bytes
    for m in np.random.default_rng(0).permutation(texts):
        start, end = int(start_M[m]), int(start_M[m + 1])
        if num_bytes_M[m] <= left:
            chosen.append((start, end, int(num_bytes_M[m])))
            left -= int(num_bytes_M[m])
            continue
        # An upper bound of the tokens that fit: after the first of text, each has a byte or more.
        fitting_N = token_N[start : min(end, start + left + 2)]
        total_N = np.cumsum(bytes_of(fitting_N, np.zeros(1, int), num_bytes_2V))
        kept = int(np.searchsorted(total_N, left, side="right"))
        if total_N[kept - 1]:
            chosen.append((start, start + kept, int(total_N[kept - 1])))
        break
    return sorted(chosen)


def pieces_of(start: int, end: int, sequence_length: int, stride: int) -> list[Piece]:
    """A document's windows for next-token prediction; its last token is no input.

    start, end: of the document in the stream. stride: tokens from one window to the next.
    """
    end -= 1
    pieces = [Piece(start, min(sequence_length, end - start), context=0)]
    for scored in range(start + sequence_length, end, stride):  # inputs before this one are scored
        new = min(stride, end - scored)
        context = sequence_length - stride
        pieces.append(Piece(scored - context, context + new, context))
    return pieces


def masked_pieces_of(start: int, end: int, sequence_length: int, stride: int) -> list[Piece]:
    """A document's windows for masked tokens: each of its tokens is scored in exactly one.

    A window scores the `stride` tokens in its middle; the first one also scores those before, the
    last one those after.
    """
    context = (sequence_length - stride) // 2
    pieces, scored = [], start
    while scored < end:
        first = max(start, min(scored - context, end - sequence_length))
        stop = min(first + sequence_length, end)
        last = end if stop == end else max(scored, first + context) + stride
        pieces.append(Piece(first, stop - first, scored - first, stop - last))
        scored = last
    return pieces


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Packs lengths into rows of at most `room` by best fit, longest first.

    Returns the indices of the lengths in each row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(free, (lengths[i], 0))
        left, row = free.pop(at) if at < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return sorted(sorted(row) for row in rows)
