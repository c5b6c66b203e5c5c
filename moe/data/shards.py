"""Training text given as token files, memory-mapped and read as one stream.

N tokens, V vocabulary.
"""

from collections.abc import Iterator
import dataclasses
import hashlib
from pathlib import Path

import gin
import numpy as np

from moe.data.corpora.corpus import Corpus, Document, hashed_hold_out
from moe.data.corpora.split import Split, left_out_of, whole
from moe.data.text import DataInfo, PreparedData, Say
from moe.data.tokens.cache import seldom, token_stream
from moe.data.tokens.files import Paths, ShardedTokens, files_of, mapped, name_of
from moe.data.tokens.tokenizer import DOCUMENT_TOKEN, Tokenizer, load_tokenizer
from moe.errors import UserError
from moe.machine.user_cache import default_cache_dir


@dataclasses.dataclass(frozen=True)
class ShardSplit:
    """The training split of token files, with its size and a sample of its text."""

    token_N: ShardedTokens
    tokenizer: Tokenizer
    sha256: str
    num_bytes: int
    num_documents: int

    @property
    def num_text_tokens(self) -> int:
        """The number of tokens without document tokens."""
        return len(self.token_N) - self.num_documents

    def sample(self, most: int) -> bytes:
        """The decoded text; where it exceeds `most` bytes, as many from 64 evenly spaced places."""
        size = int(most / 64 * self.num_text_tokens / self.num_bytes) + 1
        starts = np.linspace(0, len(self.token_N) - size, 64).astype(int)
        cuts = [slice(start, start + size) for start in starts]
        if self.num_bytes <= most:
            cuts = [slice(None)]
        texts = (self.tokenizer.decode(self.token_N[cut]) for cut in cuts)
        return "".join(text.strip("\ufffd") for text in texts).encode()[:most]


@dataclasses.dataclass(frozen=True)
class DecodedShards:
    """A corpus of the text that token files decode to."""

    name: str
    token_N: ShardedTokens
    tokenizer: Tokenizer

    holds_out = staticmethod(hashed_hold_out)

    def documents(self) -> Iterator[Document]:
        lists = (ids for ids in self.token_N.documents(self.tokenizer.document_id) if len(ids))
        for number, ids in enumerate(lists):
            [text] = self.tokenizer.decode_batch([ids.tolist()])
            yield Document(f"{self.name}:{number}", text)


@gin.configurable
class TokenShards:
    """Training text as token files, instead of `TextData`; held-out text as such files or as text.

    A file is a one-dimensional .npy array, or a .bin of bare numbers (`dtype`). Files are
    concatenated in the order of `paths`, those of a glob by name. They are memory-mapped and never
    copied; each start of a run reads them once to count and hash the tokens, in seconds per GB.
    Held-out tokens are decoded and tokenised again, since bits per byte divides by their text's
    bytes.

    Args:
        paths: files or globs.
        tokenizer: the tokenizer.json that they were made with, or the folder it was saved in.
        validation_paths: token files that are held out; these, or `validation_corpus`.
        validation_corpus: text that is held out; this, or `validation_paths`.
        document_token: the tokenizer's token that starts, or ends, each document.
        dtype: of .bin files: "uint16" or "uint32", little-endian.
        isolate_documents: attention and positions start anew at each document.
        cache_dir: the default is `$MOE_CACHE` or `~/.cache/moe`.
    """

    def __init__(
        self,
        paths: Paths,
        tokenizer: str,
        validation_paths: Paths | None = None,
        validation_corpus: Corpus | None = None,
        document_token: str = DOCUMENT_TOKEN,
        dtype: str = "uint16",
        isolate_documents: bool = True,
        cache_dir: str | Path | None = None,
    ):
        if (validation_paths is None) == (validation_corpus is None):
            raise UserError(
                "TokenShards: give held-out text, as either validation_paths or validation_corpus"
            )
        if dtype not in ("uint16", "uint32"):
            raise UserError(f"TokenShards.dtype={dtype!r}: uint16 or uint32")
        self.paths, self.tokenizer, self.validation_paths = paths, tokenizer, validation_paths
        self.validation_corpus, self.document_token = validation_corpus, document_token
        self.dtype, self.isolate_documents = dtype, isolate_documents
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()

    def prepare(self, say: Say = lambda line: None) -> PreparedData:
        """Map and count the shards, and tokenise the held-out text or load it from the cache.

        Raises:
            UserError: files that are missing, empty or not of this tokenizer's tokens; held-out
                text that its tokens don't decode to.
        """
        tokenizer = load_tokenizer(Path(self.tokenizer).expanduser(), self.document_token)
        files = files_of(self.paths)
        say(f"counting the tokens of {len(files)} shards")
        train = self._train_split(files, tokenizer, seldom(say))
        validation = whole(self._held_out(tokenizer))
        for line in left_out_of(validation.corpus):
            say(line)
        say(f"tokenising {validation.num_bytes:,} bytes")
        key = validation.sha256, tokenizer.fingerprint
        held_out = token_stream(
            validation.documents, tokenizer, key=key, cache_dir=self.cache_dir, say=say
        )
        return PreparedData(
            info=_info(name_of(files), train, validation, held_out.num_text_tokens),
            tokenizer=tokenizer,
            train=train,
            validation=held_out,
            train_split=train,
            validation_split=validation,
            isolate_documents=self.isolate_documents,
            cache_dir=self.cache_dir,
        )

    def _held_out(self, tokenizer: Tokenizer) -> Corpus:
        if self.validation_corpus is not None:
            return self.validation_corpus
        assert self.validation_paths is not None
        files = files_of(self.validation_paths)
        both = {path.resolve() for path in files} & {p.resolve() for p in files_of(self.paths)}
        if both:
            raise UserError(f"{min(both)} is among the training shards and held out as well")
        token_N = ShardedTokens([mapped(path, self.dtype) for path in files])
        _counted(token_N, tokenizer, files)
        return DecodedShards(name_of(files), token_N, tokenizer)

    def _train_split(self, files: list[Path], tokenizer: Tokenizer, say: Say) -> ShardSplit:
        """The token files as one stream, with its counts and hash."""
        token_N = ShardedTokens([mapped(path, self.dtype) for path in files])
        count_V, sha256 = _counted(token_N, tokenizer, files, say)
        return ShardSplit(
            token_N=token_N,
            tokenizer=tokenizer,
            sha256=sha256,
            num_bytes=int(count_V @ tokenizer.num_bytes_2V[1].astype(np.int64)),
            num_documents=int(count_V[tokenizer.document_id]),
        )


def _counted(
    token_N: ShardedTokens, tokenizer: Tokenizer, files: list[Path], say: Say = lambda line: None
) -> tuple[np.ndarray, str]:
    """The number of occurrences of each token (V,), and the sha256 of the stream, in one pass.

    Raises:
        UserError: a token that the tokenizer doesn't have; or no tokens of text.
    """
    count_V, done = np.zeros(tokenizer.vocab_size, np.int64), 0
    digest = hashlib.sha256()
    for piece in token_N.pieces():
        if (largest := int(piece.max())) >= len(count_V):
            raise UserError(
                f"{name_of(files)}: token {largest}, and the tokenizer has {len(count_V)}; were "
                "these files made with another tokenizer, or in another dtype?"
            )
        if (least := int(piece.min())) < 0:
            raise UserError(f"{name_of(files)}: token {least}; tokens are 0 and above")
        count_V += np.bincount(piece.astype(np.int64), minlength=len(count_V))
        digest.update(piece.astype("<u4").tobytes())
        done += len(piece)
        say(f"counted {done:,} of {len(token_N):,} tokens")
    if count_V.sum() == count_V[tokenizer.document_id]:
        raise UserError(f"{name_of(files)}: no tokens of text")
    return count_V, digest.hexdigest()


def _info(name: str, train: ShardSplit, validation: Split, validation_tokens: int) -> DataInfo:
    both = hashlib.sha256(f"{train.sha256} {validation.sha256}".encode())
    return DataInfo(
        name=name,
        sha256=both.hexdigest(),
        bytes=train.num_bytes + validation.num_bytes,
        documents=train.num_documents + validation.num_documents,
        train_documents=train.num_documents,
        train_bytes=train.num_bytes,
        train_tokens=train.num_text_tokens,
        validation_documents=validation.num_documents,
        validation_bytes=validation.num_bytes,
        validation_tokens=validation_tokens,
        bytes_per_token=train.num_bytes / train.num_text_tokens,
    )
