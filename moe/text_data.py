"""Text as batches of token windows: the training stream and the held-out documents.

B sequences a batch, T tokens each; N tokens in a stream. Training batch i is a pure function of
the seed and i, so that a run resumes exactly, on any number of hosts. Validation scores every
token of every held-out document exactly once.
"""

import bisect
import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gin
import numpy as np

from moe.corpus import Corpus, Part, digest_of, hash_position, split, whole
from moe.errors import UserError
from moe.token_cache import TokenStream, default_cache_dir, token_stream
from moe.tokenizer import Tokenizer, TokenizerSpec, TrainedBPE

if TYPE_CHECKING:  # it brings in JAX, and a config that names this file should load quickly
    import moe.batch

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a run records of its text. Tokens are those of text, without document tokens."""

    name: str
    sha256: str
    bytes: int
    documents: int
    train_documents: int
    train_bytes: int
    train_tokens: int
    validation_documents: int
    validation_bytes: int
    validation_tokens: int
    bytes_per_token: float


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Both splits as token streams, with their tokenizer."""

    info: DataInfo
    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream
    train_part: Part
    validation_part: Part
    isolate_documents: bool
    cache_dir: Path

    def fingerprint(self) -> dict[str, Any]:
        """What has to be equal for a run to go on: the text, its split, tokens and isolation."""
        return {
            "train_sha256": self.train_part.sha256,
            "validation_sha256": self.validation_part.sha256,
            "tokenizer": self.tokenizer.fingerprint,
            "isolate_documents": self.isolate_documents,
        }

    def train_batches(self, batch_size: int, sequence_length: int, seed: int) -> "TrainBatches":
        """Endless shuffled windows of the training stream; UserError where it is too short."""
        _check_sizes(batch_size, sequence_length)
        have, need = len(self.train.token_N), sequence_length + 1
        if have < need:
            raise UserError(
                f"the training split holds {have} tokens, but sequence_length={sequence_length} "
                f"needs {need}; give more text or a shorter sequence"
            )
        document_id = self.tokenizer.document_id if self.isolate_documents else None
        return TrainBatches(self.train.token_N, batch_size, sequence_length, seed, document_id)

    def validation_batches(
        self,
        batch_size: int,
        sequence_length: int,
        stride: int | None = None,
        max_bytes: int | None = None,
    ) -> "ValidationBatches":
        """The held-out documents, every token scored once.

        Args:
            stride: by how much the windows of a long document advance; each scored token but the
                document's first `sequence_length` has at least `sequence_length - stride` tokens
                before it. The default is half the sequence.
            max_bytes: score only some whole documents, which hold at most this much text. They
                are the same ones for every tokenizer, batch size and sequence length.
        """
        _check_sizes(batch_size, sequence_length)
        stride = sequence_length // 2 if stride is None else stride
        if not 1 <= stride <= sequence_length:
            raise UserError(f"stride={stride} must lie in 1 to sequence_length={sequence_length}")
        chosen = _choose_documents(self.validation.num_bytes_M, max_bytes)
        pieces = _pieces(self.validation.start_M, chosen, sequence_length, stride)
        lengths = [piece.length for piece in pieces]
        alone = [[i] for i in range(len(pieces))]
        rows = pack(lengths, sequence_length) if self.isolate_documents else alone
        return ValidationBatches(
            token_N=self.validation.token_N,
            rows=[[pieces[i] for i in row] for row in rows],
            batch_size=batch_size,
            sequence_length=sequence_length,
            num_bytes=int(self.validation.num_bytes_M[chosen].sum()),
            num_documents=len(chosen),
        )


class TrainBatches:
    """Shuffled windows of T tokens and their successors; another order and offset each epoch."""

    def __init__(
        self,
        token_N: np.ndarray,
        batch_size: int,
        sequence_length: int,
        seed: int,
        document_id: int | None,
    ):
        import grain

        self._token_N, self._seed, self._document_id = token_N, seed, document_id
        self._batch_size, self._length = batch_size, sequence_length
        self.windows_per_epoch = (len(token_N) - 1) // sequence_length
        windows = grain.MapDataset.range(self.windows_per_epoch).seed(seed % 2**32)
        self._windows = windows.shuffle().repeat().map_with_index(self._window)

    def batch(self, i: int, rows: slice | None = None) -> "moe.batch.Batch":
        """Batch i, or this host's rows of it."""
        index_B = np.arange(self._batch_size, dtype=np.int32)[rows or slice(None)]
        first = i * self._batch_size
        window_BW = np.stack([np.asarray(self._windows[first + int(row)]) for row in index_B])
        return _train_batch(window_BW.astype(np.int32), index_B, self._document_id)

    def batches(
        self, start: int = 0, rows: slice | None = None, depth: int = 4
    ) -> Iterator["moe.batch.Batch"]:
        """Batches start, start + 1, ... for ever, made by a thread that is `depth` ahead."""
        with ThreadPoolExecutor(1, "train-batches") as thread:
            made = collections.deque(
                thread.submit(self.batch, i, rows) for i in range(start, start + depth)
            )
            for i in itertools.count(start + depth):
                batch = made.popleft().result()
                made.append(thread.submit(self.batch, i, rows))
                yield batch

    def _window(self, index: int, window: int) -> np.ndarray:
        start = window * self._length + self._offset(index // self.windows_per_epoch)
        end = start + self._length + 1
        if end <= len(self._token_N):
            return self._token_N[start:end]
        return self._token_N.take(np.arange(start, end), mode="wrap")  # on to the first document

    def _offset(self, epoch: int) -> int:
        """Where the epoch's first window starts, so that documents are cut elsewhere each time."""
        return int(hash_position(f"epoch {epoch}", self._seed) * self._length)


def _train_batch(
    window_BW: np.ndarray, index_B: np.ndarray, document_id: int | None
) -> "moe.batch.Batch":
    """Inputs and targets of windows of W = T + 1 tokens; no document_id: one segment a row."""
    from moe.batch import Batch

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
    """`length` inputs from `start` in the stream, of which the first `context` are not scored."""

    start: int
    length: int
    context: int


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """A fixed list of batches. `num_bytes` is the text behind all scored tokens together."""

    token_N: np.ndarray
    rows: Sequence[Sequence[Piece]]
    batch_size: int
    sequence_length: int
    num_bytes: int
    num_documents: int

    @property
    def num_tokens(self) -> int:
        """Scored tokens in all batches."""
        return sum(piece.length - piece.context for row in self.rows for piece in row)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator["moe.batch.Batch"]:
        return (self.batch(i) for i in range(len(self)))

    def batch(self, i: int, rows: slice | None = None) -> "moe.batch.Batch":
        """Batch i, or this host's rows of it; the last one is filled up with padding."""
        from moe.batch import Batch

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
                target_BT[b, at:end] = self.token_N[piece.start + 1 : stop + 1]
                segment_BT[b, at:end] = segment + 1
                position_BT[b, at:end] = np.arange(piece.length)
                scored_BT[b, at + piece.context : end] = True
                at = end
        index_B += i * self.batch_size  # so that what is hidden doesn't depend on the batch size
        return Batch(token_BT, target_BT, segment_BT, position_BT, scored_BT, index_B)


def _choose_documents(num_bytes_M: np.ndarray, max_bytes: int | None) -> np.ndarray:
    """All documents, or those that fit the limit in a fixed random order; at least one."""
    texts = np.flatnonzero(num_bytes_M)
    if max_bytes is None:
        return texts
    chosen, total = [], 0
    for document in np.random.default_rng(0).permutation(texts):
        if total + num_bytes_M[document] <= max_bytes:
            chosen.append(document)
            total += num_bytes_M[document]
    smallest = texts[np.argmin(num_bytes_M[texts])]
    return np.sort(chosen or [smallest])


def _pieces(
    start_M: np.ndarray, chosen: np.ndarray, sequence_length: int, stride: int
) -> list[Piece]:
    """The windows of each document. Its inputs are all of its tokens but the last."""
    pieces = []
    for document in chosen:
        start, end = int(start_M[document]), int(start_M[document + 1]) - 1
        pieces.append(Piece(start, min(sequence_length, end - start), context=0))
        for scored in range(start + sequence_length, end, stride):  # up to here all is scored
            new = min(stride, end - scored)
            context = sequence_length - stride
            pieces.append(Piece(scored - context, context + new, context))
    return pieces


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of the lengths by row, no row longer than `room`: longest first, best fit."""
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


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if sequence_length < 2:
        raise UserError(f"sequence_length={sequence_length} must be at least 2")


@gin.configurable
class TextData:
    """Settings of a run's text; nothing is read before `prepare`.

    Args:
        corpus: where the text comes from, such as `StandardLibrary()`.
        tokenizer: a spec such as `Bytes()`; the default is `TrainedBPE()`.
        validation_fraction: about how many of the documents are held out.
        validation_corpus: where given, all of it is held out and none of `corpus`.
        split_seed: another seed holds out other documents.
        isolate_documents: attention and positions start anew at each document.
        cache_dir: the default is `$MOE_CACHE` or `~/.cache/moe`.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: TokenizerSpec | None = None,
        validation_fraction: float = 0.05,
        validation_corpus: Corpus | None = None,
        split_seed: int = 0,
        isolate_documents: bool = True,
        cache_dir: str | Path | None = None,
    ):
        for name, value in {"corpus": corpus, "tokenizer": tokenizer}.items():
            if isinstance(value, type):
                known = value.__name__
                raise UserError(f"TextData.{name} is a class: write @{known}(), not @{known}")
        self.corpus = corpus
        self.tokenizer = TrainedBPE() if tokenizer is None else tokenizer
        self.validation_fraction = validation_fraction
        self.validation_corpus = validation_corpus
        self.split_seed = split_seed
        self.isolate_documents = isolate_documents
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()

    def prepare(self, say: Say = lambda line: None) -> PreparedData:
        """Read, split and tokenise the text, or find it in the cache; `say` tells of each phase.

        Raises:
            UserError: for text that is missing, empty, not UTF-8 or cannot be split.
        """
        say(f"reading the corpus {self.corpus.name}")
        train, validation = self._parts()
        say(f"fitting the tokenizer to {train.num_bytes:,} bytes")
        tokenizer = self.tokenizer.fit(train.texts, self.cache_dir, train.sha256)
        say(f"tokenising {train.num_bytes + validation.num_bytes:,} bytes")
        train_stream = self._stream(train, tokenizer)
        validation_stream = self._stream(validation, tokenizer)
        return PreparedData(
            info=self._info(train, validation, train_stream, validation_stream),
            tokenizer=tokenizer,
            train=train_stream,
            validation=validation_stream,
            train_part=train,
            validation_part=validation,
            isolate_documents=self.isolate_documents,
            cache_dir=self.cache_dir,
        )

    def _parts(self) -> tuple[Part, Part]:
        if self.validation_corpus is None:
            return split(self.corpus, self.validation_fraction, self.split_seed)
        return whole(self.corpus), whole(self.validation_corpus)

    def _stream(self, part: Part, tokenizer: Tokenizer) -> TokenStream:
        return token_stream(
            part.texts,
            encode_batch=tokenizer.encode_batch,
            document_id=tokenizer.document_id,
            vocab_size=tokenizer.vocab_size,
            key=(part.sha256, tokenizer.fingerprint),
            cache_dir=self.cache_dir,
        )

    def _info(
        self, train: Part, validation: Part, train_tokens: TokenStream, held_out: TokenStream
    ) -> DataInfo:
        sha256, name, documents = digest_of(train.entries), train.corpus.name, len(train.entries)
        if self.validation_corpus is not None:
            both = json.dumps([sha256, digest_of(validation.entries)])
            sha256 = hashlib.sha256(both.encode()).hexdigest()
            documents += len(validation.entries)
        return DataInfo(
            name=name,
            sha256=sha256,
            bytes=train.num_bytes + validation.num_bytes,
            documents=documents,
            train_documents=train.num_documents,
            train_bytes=train.num_bytes,
            train_tokens=train_tokens.num_text_tokens,
            validation_documents=validation.num_documents,
            validation_bytes=validation.num_bytes,
            validation_tokens=held_out.num_text_tokens,
            bytes_per_token=train.num_bytes / train_tokens.num_text_tokens,
        )
