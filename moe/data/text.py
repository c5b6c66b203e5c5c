"""Text as batches of token windows: the training stream and the held-out documents.

B sequences a batch, T tokens each; N tokens in a stream. Training batch i is a pure function of
the seed and i, so that a run resumes exactly, on any number of hosts. Validation scores every
token of every held-out document exactly once.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
from pathlib import Path
import time
from typing import TYPE_CHECKING, Any

import gin

from moe.data.batches import (
    Share,
    TrainBatches,
    ValidationBatches,
    choose_spans,
    masked_pieces_of,
    pack,
    pieces_of,
)
from moe.data.corpora.corpus import Corpus, Part, digest_of, in_both, left_out_of, split, whole
from moe.data.mixture import shares_of
from moe.data.tokens.cache import TokenStream, token_stream
from moe.data.tokens.tokenizer import Tokenizer, TokenizerSpec, TrainedBPE
from moe.errors import UserError
from moe.machine.user_cache import default_cache_dir
from routing.ranges import Natural, OpenShare

if TYPE_CHECKING:
    from moe.data.shards import ShardPart

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
    train: "TokenStream | ShardPart"
    validation: TokenStream
    train_part: "Part | ShardPart"
    validation_part: Part
    isolate_documents: bool
    cache_dir: Path
    shares: tuple[Share, ...] = ()  # of a mixture of corpora

    def fingerprint(self) -> dict[str, Any]:
        """What has to be equal for a run to go on: the text, its split, tokens and isolation."""
        return {
            "train_sha256": self.train_part.sha256,
            "validation_sha256": self.validation_part.sha256,
            "tokenizer": self.tokenizer.fingerprint,
            "isolate_documents": self.isolate_documents,
            **({"mixture": [share.weight for share in self.shares]} if self.shares else {}),
        }

    def train_batches(self, batch_size: int, sequence_length: int, seed: int) -> TrainBatches:
        """Endless shuffled windows of the training stream; UserError where it is too short."""
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
        """The held-out documents, every token scored once.

        Args:
            stride: by how much the windows of a long document advance; each scored token but the
                document's first `sequence_length` has at least `sequence_length - stride` tokens
                before it. The default is half the sequence.
            max_bytes: score only so much text: documents in a fixed random order, the last one
                cut. It is the same text for every batch size and sequence length and, but for
                where the cut falls, for every tokenizer.
            causal: targets are the next tokens; else the tokens themselves, for masked ones.
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
            num_documents=len(spans),
            shift=1 if causal else 0,
        )


def seldom(say: Say, seconds: float = 10.0) -> Say:
    """Says a line where the one before it is so long ago; of lines that come thick and fast."""
    last = time.monotonic()

    def now_and_then(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(line)

    return now_and_then


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
        validation_fraction: OpenShare = 0.05,
        validation_corpus: Corpus | None = None,
        split_seed: Natural = 0,
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
            UserError: for text that is missing, empty, not UTF-8 or cannot be split, or that the
                tokenizer does not give back.
        """
        say(f"reading the corpus {self.corpus.name}")
        train, validation = self._parts()
        self._tell(train, validation, say)
        now_and_then = seldom(say)
        say(f"fitting the tokenizer to {train.num_bytes:,} bytes")
        tokenizer = self.tokenizer.fit(train.texts, self.cache_dir, train.sha256, now_and_then)
        say(f"tokenising {train.num_bytes + validation.num_bytes:,} bytes")
        train_stream = self._stream(train, tokenizer, now_and_then)
        validation_stream = self._stream(validation, tokenizer, now_and_then)
        return PreparedData(
            info=self._info(train, validation, train_stream, validation_stream),
            tokenizer=tokenizer,
            train=train_stream,
            validation=validation_stream,
            train_part=train,
            validation_part=validation,
            isolate_documents=self.isolate_documents,
            cache_dir=self.cache_dir,
            shares=shares_of(self.corpus, train, train_stream),
        )

    def _parts(self) -> tuple[Part, Part]:
        if self.validation_corpus is None:
            return split(self.corpus, self.validation_fraction, self.split_seed)
        return whole(self.corpus), whole(self.validation_corpus)

    def _tell(self, train: Part, validation: Part, say: Say) -> None:
        """What was left out, and held-out text that is training text, too."""
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

    def _stream(self, part: Part, tokenizer: Tokenizer, say: Say) -> TokenStream:
        key = part.sha256, tokenizer.fingerprint
        return token_stream(part.documents, tokenizer, key=key, cache_dir=self.cache_dir, say=say)

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
