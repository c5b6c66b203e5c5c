"""A mixture of corpora, whose training windows are drawn in given proportions."""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math

import gin
import numpy as np

from moe.data.batches import Share
from moe.data.corpora.corpus import Corpus, Document
from moe.data.corpora.split import Split, left_out_of
from moe.data.tokens.cache import TokenStream
from moe.errors import UserError
from routing.ranges import Positive


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several corpora; training windows are drawn from each by its weight.

    A window lies in a single corpus. A small corpus with a large weight is read many times over.
    Held-out documents are those of all corpora, and the tokenizer is fitted to all of them.

    Attributes:
        corpora: such as `[@StandardLibrary(), @TextFiles()]`.
        weights: a number above 0 for each; they need not sum to 1. By size where None.
    """

    corpora: Sequence[Corpus]
    weights: Sequence[Positive] | None = None

    def __post_init__(self):
        if len(self.corpora) < 2:
            raise UserError("Mixture.corpora: give two or more; one needs no mixture")
        for corpus in self.corpora:
            if isinstance(corpus, type):
                name = corpus.__name__
                raise UserError(f"Mixture.corpora holds a class: write @{name}(), not @{name}")
            if isinstance(corpus, Mixture):
                raise UserError(
                    "Mixture.corpora holds a mixture, whose weights would be ignored; name its "
                    "corpora here, with their own weights"
                )
        if self.weights is None:
            return
        if len(self.weights) != len(self.corpora):
            raise UserError(
                f"Mixture.weights has {len(self.weights)} numbers for {len(self.corpora)} corpora"
            )
        if not all(weight > 0 and math.isfinite(weight) for weight in self.weights):
            raise UserError(f"Mixture.weights={list(self.weights)}: each must be above 0")

    @property
    def name(self) -> str:
        return "+".join(corpus.name for corpus in self.corpora)

    def documents(self) -> Iterator[Document]:
        """The documents of each corpus in turn; names start with the corpus's number."""
        for number, corpus in enumerate(self.corpora):
            for document in corpus.documents():
                yield Document(f"{number}/{document.name}", document.text)

    def left_out(self) -> list[str]:
        """A line for each reason why entries of the corpora were not read."""
        return [line for corpus in self.corpora for line in left_out_of(corpus)]

    def holds_out(self, document_name: str, fraction: float, seed: int, /) -> bool:
        """Whether the document's own corpus holds it out."""
        number, _, name = document_name.partition("/")
        return self.corpora[int(number)].holds_out(name, fraction, seed)


def shares_of(corpus: Corpus, train: Split, stream: TokenStream) -> tuple[Share, ...]:
    """The range and weight of each corpus of a mixture in the training stream; else empty.

    Raises:
        UserError: a corpus that has no document to train on.
    """
    if not isinstance(corpus, Mixture):
        return ()
    names = (entry.name for entry in itertools.compress(train.entries, train.chosen))
    number_M = np.array([int(name.partition("/")[0]) for name in names])
    shares = []
    for number, one in enumerate(corpus.corpora):
        found = np.flatnonzero(number_M == number)
        if not len(found):
            raise UserError(f"Mixture: {one.name} has no document to train on; all are held out")
        start, end = int(stream.start_M[found[0]]), int(stream.start_M[found[-1] + 1])
        weight = end - start if corpus.weights is None else corpus.weights[number]
        shares.append(Share(start, end, float(weight), one.name))
    return tuple(shares)
