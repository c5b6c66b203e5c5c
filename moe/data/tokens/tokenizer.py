"""Tokenizers: plain bytes, a byte-level BPE trained on the run's text, or one from a file.

A config names a *spec* (`Bytes`, `TrainedBPE`, `TokenizerFile`), whose `fit` returns a `Tokenizer`.
Every tokenizer has one special token, `<|document|>`, which starts each document. No text is
encoded to it: a text that spells it out is encoded like any other.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from pathlib import Path
import re
from typing import Any, Protocol, runtime_checkable

import gin
import numpy as np

from moe import received
from moe.data.corpora.walk import nearest_path
from moe.data.tokens.cache import passages, seldom
from moe.data.tokens.rust import quiet_panics, refuse_growth
from moe.data.tokens.sealed import read_sealed, write_atomically, write_sealed
from moe.errors import UserError, first_line, nearest
from routing.ranges import Count

DOCUMENT_TOKEN = "<|document|>"
FILE_NAME = "tokenizer.json"
BYTES_JSON = '{"type": "bytes"}'
MOST_BYTES = 2**27  # of a tokenizer.json
MOST_GAPS = 8  # ids for each token
Texts = Callable[[], Iterator[str]]
Say = Callable[[str], None]
Ids = Iterable[Any]  # of int, or an array of integers

# The longest spans that a token may cover, as in GPT-4's pattern: a word with one sign before it,
# up to three digits, or signs. Unlike there, a line's end and the next line's indentation are one
# span, also with signs before them: 9 % more bytes per token on Python with 8,192 tokens. Spans are
# at most MOST characters long, since the time to merge one grows with the square of its length, and
# DNA, base64 or a language without spaces would be a single span.
MOST = 64
FITTED = 1 << 16  # characters of a text in fitting, since the library holds 256 texts at a time
PIECES = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}{{1,{MOST}}}",
        r"\p{N}{1,3}",
        rf" ?[^\s\p{{L}}\p{{N}}]{{1,{MOST}}}(?:[\r\n]{{1,{MOST}}}[ \t]{{0,{MOST}}})?",
        rf"\s{{0,{MOST}}}[\r\n]{{1,{MOST}}}[ \t]{{0,{MOST}}}",
        rf"\s{{1,{MOST}}}(?!\S)",
        rf"\s{{1,{MOST}}}",
    ]
)


@runtime_checkable
class Tokenizer(Protocol):
    """Encodes text as token ids and decodes it, without loss on UTF-8 text.

    Attributes:
        vocab_size: V, one more than the largest token id.
        document_id: the token that starts each document; `decode` leaves it out.
        num_bytes_2V: bytes of text that each token decodes to, int32: as a document's first token,
            where some decoders drop a space, and anywhere else; 0 for the document token.
        fingerprint: equal for two tokenizers only if they encode alike.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def document_id(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def num_bytes_2V(self) -> np.ndarray: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode_batch(self, lists: list[list[int]]) -> list[str]: ...

    def decode(self, ids: Ids) -> str: ...

    def save(self, folder: Path) -> None: ...


@runtime_checkable
class TokenizerSpec(Protocol):
    """Makes a run's tokenizer."""

    def fit(
        self, texts: Texts, cache_dir: Path, fingerprint: str, say: Say = lambda line: None
    ) -> Tokenizer:
        """The tokenizer for the training texts.

        Args:
            texts: returns an iterator over the training texts.
            cache_dir: where a trained tokenizer is kept.
            fingerprint: a hash of the texts.
            say: prints the progress.
        """
        ...


class ByteTokenizer:
    """One token per byte, and the document token."""

    vocab_size = 257
    document_id = 256
    fingerprint = "bytes"
    num_bytes_2V = np.array([[1] * 256 + [0]] * 2, np.int32)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode_batch(self, lists: list[list[int]]) -> list[str]:
        return [bytes(ids).decode("utf-8", errors="replace") for ids in lists]

    def decode(self, ids: Ids) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        write_atomically(Path(folder, FILE_NAME), BYTES_JSON.encode())


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library, with the document token added if it lacks it."""

    def __init__(self, inner: Any):
        inner.no_truncation()
        inner.no_padding()
        if inner.token_to_id(DOCUMENT_TOKEN) is None:
            inner.add_special_tokens([DOCUMENT_TOKEN])
        inner.encode_special_tokens = True  # encodes special tokens in a text as text
        self._inner = inner
        self.document_id: int = inner.token_to_id(DOCUMENT_TOKEN)
        self.vocab_size: int = 1 + max(inner.get_vocab(with_added_tokens=True).values())
        self.fingerprint: str = hashlib.sha256(inner.to_str().encode()).hexdigest()

    def __len__(self) -> int:
        """How many tokens there are; ids may have gaps."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    @property
    def num_bytes_2V(self) -> np.ndarray:
        return self._num_bytes_2V

    @functools.cached_property
    def _num_bytes_2V(self) -> np.ndarray:
        """Bytes of each token: its letters if it is byte-level, else of the text it decodes to.

        Tokens of the latter kind are decoded alone, as at a document's start, and after themselves.
        """
        inner = self._inner
        vocabulary = inner.get_vocab(with_added_tokens=True)
        content = json.loads(inner.to_str())
        added = {one["id"] for one in content["added_tokens"]}
        kinds = set(re.findall('"type": "([A-Za-z]+)"', json.dumps(content["decoder"])))
        num_bytes_2V = np.zeros((2, self.vocab_size), np.int32)
        if "ByteLevel" in kinds:
            for token, i in vocabulary.items():
                num_bytes_2V[:, i] = len(token.encode()) if i in added else len(token)
        else:
            ids = list(vocabulary.values())
            once_V, twice_V = (
                [
                    len(text.encode())
                    for text in inner.decode_batch(lists, skip_special_tokens=False)
                ]
                for lists in ([[i] for i in ids], [[i, i] for i in ids])
            )
            num_bytes_2V[:, ids] = once_V, np.subtract(twice_V, once_V)
            if "ByteFallback" in kinds:  # a single byte may not be UTF-8
                found = [i for t, i in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", t)]
                num_bytes_2V[:, found] = 1
        num_bytes_2V[:, self.document_id] = 0
        return num_bytes_2V

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        try:
            with quiet_panics():
                encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # of a word without a token, say
            raise UserError(
                f"the tokenizer cannot encode this text ({str(error)[:160]}); use a byte-level "
                "tokenizer, such as TextData.tokenizer = @TrainedBPE()"
            ) from None
        return [encoding.ids for encoding in encodings]

    def decode_batch(self, lists: list[list[int]]) -> list[str]:
        """The text of each list of tokens; lists have no document tokens."""
        return self._inner.decode_batch(lists, skip_special_tokens=False)

    def decode(self, ids: Ids) -> str:
        kept = [int(i) for i in ids if i != self.document_id]
        return self._inner.decode(kept, skip_special_tokens=False)

    @property
    def content(self) -> bytes:
        """Of its tokenizer.json."""
        return self._inner.to_str().encode("utf-8")

    def save(self, folder: Path) -> None:
        write_atomically(Path(folder, FILE_NAME), self.content)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Bytes:
    """One token per UTF-8 byte: nothing to train, 257 tokens."""

    @property
    def vocab_size(self) -> int:
        return ByteTokenizer.vocab_size

    def fit(
        self, texts: Texts, cache_dir: Path, fingerprint: str, say: Say = lambda line: None
    ) -> ByteTokenizer:
        del texts, cache_dir, fingerprint, say
        return ByteTokenizer()


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TrainedBPE:
    """A byte-level BPE of `vocab_size` tokens (256 bytes and the document token among them).

    Trained on the training split and cached. A small corpus may give fewer tokens.

    Attributes:
        vocab_size: number of tokens; at least 257.
    """

    vocab_size: Count = 2048

    def fit(
        self, texts: Texts, cache_dir: Path, fingerprint: str, say: Say = lambda line: None
    ) -> SubwordTokenizer:
        if self.vocab_size < 257:
            raise UserError(
                f"TrainedBPE.vocab_size={self.vocab_size} is too small: 256 bytes and the "
                "document token need 257"
            )
        import tokenizers

        settings = [tokenizers.__version__, PIECES, self.vocab_size, fingerprint]
        name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
        path = cache_dir / "tokenizers" / f"{name}.json.sealed"
        if (cached := read_sealed(path, say)) is not None:
            return SubwordTokenizer(tokenizers.Tokenizer.from_str(cached.decode("utf-8")))
        counted = _counted(texts(), seldom(say))
        trained = SubwordTokenizer(_train(counted, self.vocab_size))
        write_sealed(path, trained.content)
        return trained


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json of the `tokenizers` library, or the folder of a saved tokenizer.

    Text that it doesn't decode to exactly is refused when it is tokenised: bits per byte would be
    wrong.

    Attributes:
        path: of the file or folder.
    """

    path: str

    @property
    def vocab_size(self) -> int:
        return load_tokenizer(Path(self.path).expanduser()).vocab_size

    def fit(
        self, texts: Texts, cache_dir: Path, fingerprint: str, say: Say = lambda line: None
    ) -> Tokenizer:
        del texts, cache_dir, fingerprint, say
        return load_tokenizer(Path(self.path).expanduser())


def load_tokenizer(path: Path | str, document_token: str = DOCUMENT_TOKEN) -> Tokenizer:
    """A tokenizer from the folder it was saved in, or from a tokenizer.json itself.

    document_token: the name of the added token that starts documents.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no tokenizer file {str(path)!r}{nearest_path(path)}")
    content = received.read(path, MOST_BYTES)
    if content == BYTES_JSON.encode():
        return ByteTokenizer()
    return _subwords(content, path, document_token)


def _subwords(content: bytes, path: Path, document_token: str) -> SubwordTokenizer:
    import tokenizers

    try:
        text = content.decode("utf-8")
        record = received.parsed(text, str(path))
        refuse_growth(record, path)
        if document_token != DOCUMENT_TOKEN:
            text = _renamed(record, document_token, path)
        with quiet_panics():
            found = SubwordTokenizer(tokenizers.Tokenizer.from_str(text))
            with contextlib.suppress(UserError):  # it may know other words
                found.decode_batch(found.encode_batch(["a b"]))  # or it breaks here
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path}: not a tokenizer.json: {first_line(error)[:160]}") from None
    known = len(found)
    if found.vocab_size > MOST_GAPS * (known + 1000):
        raise UserError(
            f"{path}: its largest token is {found.vocab_size - 1:,}, and it has {known:,}: every "
            "token up to the largest would take memory"
        )
    return found


def _renamed(record: Any, document_token: str, path: Path) -> str:
    """The tokenizer.json with this added token renamed to `DOCUMENT_TOKEN`; its id stays."""
    added = {one["content"]: one for one in record["added_tokens"]}
    if document_token not in added:
        hint = nearest(document_token, added) or f"; it has {', '.join(added) or 'none'}"
        raise UserError(f"{path}: no added token {document_token!r}{hint}")
    added[document_token]["content"] = DOCUMENT_TOKEN
    vocabulary = record["model"]["vocab"]
    if isinstance(vocabulary, dict) and document_token in vocabulary:
        vocabulary[DOCUMENT_TOKEN] = vocabulary.pop(document_token)
    elif isinstance(vocabulary, list):  # (token, score) pairs
        names = [DOCUMENT_TOKEN if name == document_token else name for name, _ in vocabulary]
        record["model"]["vocab"] = [
            [n, score] for n, (_, score) in zip(names, vocabulary, strict=True)
        ]
    return json.dumps(record)


def _counted(texts: Iterator[str], say: Say) -> Iterator[str]:
    """The texts, long ones in passages; says how much of them was read."""
    size = 0
    cut = (passages(text, FITTED) for text in texts)
    for _, text in itertools.chain.from_iterable(cut):
        yield text
        size += len(text)
        say(f"fitting the tokenizer: read {size / 1e6:,.0f} million characters")


def _train(texts: Iterator[str], vocab_size: int) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner
