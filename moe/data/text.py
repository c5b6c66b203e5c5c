"""A run's text, prepared: a training stream and held-out documents, as batches of token windows.

B sequences per batch, T tokens each; N tokens in a stream. Training batch i is a pure function of
the seed and i, so that a run resumes exactly, on any number of processes. Validation scores every
token of every held-out document exactly once.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gin
import numpy as np

from moe.data.batches import (
    Share,
    TrainBatches,
    ValidationBatches,
    bytes_of,
    choose_spans,
    masked_pieces_of,
    pack,
    pieces_of,
)
from moe.data.corpora.corpus import Corpus
from moe.data.corpora.split import Split, digest_of, in_both, left_out_of, split, whole
from moe.data.mixture import shares_of
from moe.data.tokens.cache import TokenStream, token_stream
from moe.data.tokens.tokenizer import Tokenizer, TokenizerSpec, TrainedBPE
from moe.errors import UserError
from moe.machine.user_cache import default_cache_dir
from routing.ranges import Natural, OpenShare

if TYPE_CHECKING:
    from moe.data.shards import ShardSplit

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """The size and hash of a run's text, for its records. Document tokens are not counted."""

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
    """Both splits as token streams, with their tokenizer.

    Attributes:
        train_split, validation_split: the documents behind the streams.
        shares: ranges and weights of a mixture's corpora in the training stream; else empty.
        shuffled: whether each document's tokens are in a random order.
    """

    info: DataInfo
    tokenizer: Tokenizer
    train: "TokenStream | ShardSplit"
    validation: TokenStream
    train_split: "Split | ShardSplit"
    validation_split: Split
    isolate_documents: bool
    cache_dir: Path
    shares: tuple[Share, ...] = ()
    shuffled: bool = False

    def fingerprint(self) -> dict[str, Any]:
        """Hashes and settings that have to stay equal for a run to continue with this text."""
        return {
            "train_sha256": self.train_split.sha256,
            "validation_sha256": self.validation_split.sha256,
            "tokenizer": self.tokenizer.fingerprint,
            "isolate_documents": self.isolate_documents,
            **({"mixture": [share.weight for share in self.shares]} if self.shares else {}),
            **({"shuffled": True} if self.shuffled else {}),
        }

    def names_of(self, batches: ValidationBatches) -> list[str]:
        """The names of the documents that these batches score, in the order of `start_M`."""
        split, stream = self.validation_split, self.validation
        names = [entry.name for entry in itertools.compress(split.entries, split.chosen)]
        return [names[m] for m in np.searchsorted(stream.start_M, batches.start_M)]

    def train_batches(self, batch_size: int, sequence_length: int, seed: int) -> TrainBatches:
        """Endless batches of shuffled training windows; UserError where the text is too short."""
        _check_sizes(batch_size, sequence_length)
        have, need = len(self.train.token_N), sequence_length + 1
        if have < need:
            raise UserError(
                f"the training split holds {have} tokens, but sequence_length={sequence_length} "
                f"needs {need}; give more text or a shorter sequence"
            )
        document_id = self.tokenizer.document_id if self.isolate_documents else None
        shares = self.shares or (Share(0, have),)
        short = [share for share in shares if share.end - share.start < need]
        if short:
            raise UserError(
                f"Mixture: {short[0].name} has {short[0].end - short[0].start} tokens to train on, "
                f"but sequence_length={sequence_length} needs {need}"
            )
        sizes = batch_size, sequence_length
        return TrainBatches(self.train.token_N, *sizes, seed, document_id, shares)

    def validation_batches(
        self,
        batch_size: int,
        sequence_length: int,
        stride: int | None = None,
        max_bytes: int | None = None,
        causal: bool = True,
    ) -> ValidationBatches:
        """Batches of the held-out documents, in which every token is scored once.

        Args:
            batch_size: B.
            sequence_length: T.
            stride: tokens from one window of a long document to the next. Each scored token, those
                of the document's first window aside, has at least T - stride tokens before it.
                The default is T // 2.
            max_bytes: bytes of text to score at most: documents in a fixed random order, the last
                one cut. The text is the same for every batch size and sequence length and, but for
                the place of the cut, for every tokenizer.
            causal: whether targets are the next tokens, or the tokens themselves (masked ones).

        Raises:
            UserError: a stride or max_bytes out of range; no text to score.
        """
        _check_sizes(batch_size, sequence_length)
        stride = sequence_length // 2 if stride is None else stride
        if not 1 <= stride <= sequence_length:
            raise UserError(f"stride={stride} must lie in 1 to sequence_length={sequence_length}")
        if max_bytes is not None and max_bytes < 1:
            raise UserError(f"max_bytes={max_bytes} must be at least 1, or None for all text")
        stream = self.validation
        spans = choose_spans(
            stream.token_N,
            stream.start_M,
            stream.num_bytes_M,
            self.tokenizer.num_bytes_2V,
            max_bytes,
        )
        if not spans and max_bytes is None:
            raise UserError("the held-out documents hold no text: there is nothing to score")
        if not spans:
            raise UserError(f"max_bytes={max_bytes} is less than the first token of text")
        make = pieces_of if causal else masked_pieces_of
        pieces = [p for start, end, _ in spans for p in make(start, end, sequence_length, stride)]
        lengths = [piece.length for piece in pieces]
        alone = [[i] for i in range(len(pieces))]
        rows = pack(lengths, sequence_length) if self.isolate_documents else alone
        return ValidationBatches(
            token_N=stream.token_N,
            rows=[[pieces[i] for i in row] for row in rows],
            batch_size=batch_size,
            sequence_length=sequence_length,
            num_bytes=sum(num_bytes for *_, num_bytes in spans),
            start_M=[start for start, *_ in spans],
            shift=1 if causal else 0,
        )


def shuffled(stream: TokenStream, tokenizer: Tokenizer, seed: int = 0) -> TokenStream:
    """The stream with the text tokens of each document in a random order, in memory.

    Bytes are counted anew: a token may decode to another number of them as a document's first.
    """
    token_N, rng = np.array(stream.token_N), np.random.default_rng(seed)
    for start, end in itertools.pairwise(stream.start_M.tolist()):
        rng.shuffle(token_N[start + 1 : end])
    bytes_N = bytes_of(token_N, stream.start_M, tokenizer.num_bytes_2V)
    num_bytes_M = np.add.reduceat(bytes_N, stream.start_M[:-1])
    return dataclasses.replace(stream, token_N=token_N, num_bytes_M=num_bytes_M)


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if sequence_length < 2:
        raise UserError(f"sequence_length={sequence_length} must be at least 2")


@gin.configurable
class TextData:
    """A run's text: its corpus, tokenizer and split. Nothing is read before `prepare`.

    Args:
        corpus: where the text comes from, such as `StandardLibrary()`.
        tokenizer: a spec such as `Bytes()`; the default is `TrainedBPE()`.
        validation_fraction: about how many of the documents are held out.
        validation_corpus: where given, all of it is held out and none of `corpus`.
        split_seed: another seed holds out other documents.
        isolate_documents: attention and positions start anew at each document.
        shuffle_tokens: put the tokens of each document into a random order, in both splits: a
            negative control, in which no token tells of the next.
        cache_dir: the default is `$MOE_CACHE` or `~/.cache/moe`.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: TokenizerSpec | None = None,
        validation_fraction: OpenShare = 0.05,
        validation_corpus: Corpus | None = None,
        split_seed: Natural = 0,
        isolate_documents: bool = True,
        shuffle_tokens: bool = False,
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
        self.shuffle_tokens = shuffle_tokens
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()

    def prepare(self, say: Say = lambda line: None) -> PreparedData:
        """Read, split and tokenise the text, or load its tokens from the cache.

        say: prints each phase.

        Raises:
            UserError: text that is missing, empty, not UTF-8, can't be split, or is lost by the
                tokenizer.
        """
        say(f"reading the corpus {self.corpus.name}")
        train, validation = self._splits()
        self._report(train, validation, say)
        say(f"fitting the tokenizer to {train.num_bytes:,} bytes")
        tokenizer = self.tokenizer.fit(train.texts, self.cache_dir, train.sha256, say)
        say(f"tokenising {train.num_bytes + validation.num_bytes:,} bytes")
        train_stream = self._stream(train, tokenizer, say)
        validation_stream = self._stream(validation, tokenizer, say)
        if self.shuffle_tokens:
            train_stream = shuffled(train_stream, tokenizer)
            validation_stream = shuffled(validation_stream, tokenizer)
        return PreparedData(
            info=self._info(train, validation, train_stream, validation_stream),
            tokenizer=tokenizer,
            train=train_stream,
            validation=validation_stream,
            train_split=train,
            validation_split=validation,
            isolate_documents=self.isolate_documents,
            shuffled=self.shuffle_tokens,
            cache_dir=self.cache_dir,
            shares=shares_of(self.corpus, train, train_stream),
        )

    def _splits(self) -> tuple[Split, Split]:
        if self.validation_corpus is None:
            return split(self.corpus, self.validation_fraction, self.split_seed)
        return whole(self.corpus), whole(self.validation_corpus)

    def _report(self, train: Split, validation: Split, say: Say) -> None:
        """Say what was left out, and which held-out documents are training documents, too."""
        for line in dict.fromkeys((*left_out_of(train.corpus), *left_out_of(validation.corpus))):
            say(line)
        twice = in_both(train, validation)
        if not twice:
            return
        size = sum(entry.num_bytes for entry in twice)
        names = ", ".join(entry.name for entry in twice[:3])
        say(
            f"{len(twice)} of {validation.num_documents} held-out documents ({size:,} bytes) stand "
            f"in the training text too, word for word: {names}"
        )

    def _stream(self, chosen: Split, tokenizer: Tokenizer, say: Say) -> TokenStream:
        key = chosen.sha256, tokenizer.fingerprint
        return token_stream(chosen.documents, tokenizer, key=key, cache_dir=self.cache_dir, say=say)

    def _info(
        self, train: Split, validation: Split, train_tokens: TokenStream, held_out: TokenStream
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
