"""A corpus's documents by name, size and hash, and their split into training and validation."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import hashlib
import itertools

from moe.data.corpora.corpus import Corpus, Document, hash_position
from moe.data.corpora.files import checked_text
from moe.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A document without its text.

    num_bytes: of the text in UTF-8. digest: a hash of name and text. content: of the text alone.
    """

    name: str
    num_bytes: int
    digest: bytes
    content: bytes


@dataclasses.dataclass(frozen=True)
class Split:
    """Some documents of a corpus, such as a split; they are read again at every use.

    entries: of all documents, in the corpus's order. chosen: which of them these are.
    """

    corpus: Corpus
    entries: Sequence[Entry]
    chosen: Sequence[bool]

    def documents(self) -> Iterator[Document]:
        """The chosen documents, in the corpus's order; UserError where one has changed."""
        found = iter(self.corpus.documents())
        for entry, chosen in zip(self.entries, self.chosen, strict=True):
            document = next(found, None)
            if document is None or (chosen and entry_of(document) != entry):
                raise UserError(
                    f"document {entry.name!r} of the corpus {self.corpus.name!r} has changed since "
                    "this command read it first; start the command again"
                )
            if chosen:
                yield document

    def texts(self) -> Iterator[str]:
        """The texts of the chosen documents."""
        return (document.text for document in self.documents())

    @property
    def num_documents(self) -> int:
        return sum(self.chosen)

    @property
    def num_bytes(self) -> int:
        return sum(e.num_bytes for e in itertools.compress(self.entries, self.chosen))

    @property
    def sha256(self) -> str:
        return digest_of(itertools.compress(self.entries, self.chosen))


def digest_of(entries: Iterable[Entry]) -> str:
    """The sha256 of the documents' names and texts, in their order."""
    return hashlib.sha256(b"".join(entry.digest for entry in entries)).hexdigest()


def entry_of(document: Document) -> Entry:
    """A document's name, size and hashes."""
    text = checked_text(document.text, f"document {document.name!r}").encode("utf-8")
    title = hashlib.sha256(document.name.encode("utf-8", "surrogateescape")).digest()
    digest, content = hashlib.sha256(title + text).digest(), hashlib.sha256(text).digest()
    return Entry(document.name, len(text), digest, content)


def whole(corpus: Corpus) -> Split:
    """All documents of a corpus, after reading each once; UserError where there is no text."""
    entries = [entry_of(document) for document in corpus.documents()]
    if not any(entry.num_bytes for entry in entries):
        why = "; ".join([f"{len(entries)} documents, 0 bytes", *left_out_of(corpus)])
        raise UserError(f"the corpus {corpus.name!r} is empty ({why})")
    return Split(corpus, entries, [True] * len(entries))


def left_out_of(corpus: Corpus) -> list[str]:
    """A line for each reason why a corpus has left out entries; empty if it keeps no account."""
    return getattr(corpus, "left_out", list)()


def in_both(train: Split, validation: Split) -> list[Entry]:
    """Held-out documents whose text is that of a training document, word for word."""
    seen = {e.content for e in itertools.compress(train.entries, train.chosen) if e.num_bytes}
    held_out = itertools.compress(validation.entries, validation.chosen)
    return [entry for entry in held_out if entry.content in seen]


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Split, Split]:
    """The training and the validation documents; both splits have text.

    Where the corpus's rule leaves a split without text, it gets the document whose hash is nearest.

    Raises:
        UserError: the fraction is not between 0 and 1, or fewer than two documents have text.
    """
    if not 0 < fraction < 1:
        raise UserError(f"validation_fraction={fraction} must lie between 0 and 1")
    entries = whole(corpus).entries
    texts = [i for i, entry in enumerate(entries) if entry.num_bytes]
    if len(texts) < 2:
        raise UserError(
            f"the corpus {corpus.name!r} has one document with text, which cannot be split; "
            "give more documents, or the validation files as TextData.validation_corpus"
        )
    held_out = [corpus.holds_out(entry.name, fraction, seed) for entry in entries]
    by_hash = sorted(texts, key=lambda i: (hash_position(entries[i].name, seed), i))
    if not any(held_out[i] for i in texts):
        held_out[by_hash[0]] = True
    if all(held_out[i] for i in texts):
        held_out[by_hash[-1]] = False
    kept = [not held for held in held_out]
    return Split(corpus, entries, kept), Split(corpus, entries, held_out)
