"""Whether an arm differs from a baseline, or is equivalent to it, over seeds and documents.

S seeds, M documents. Values are bits of each document by each seed's run; a difference is in bits
per byte over all documents. Seeds are few: intervals are Student's, since resampling three of them
is far too narrow.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math

import numpy as np
from scipy.stats import t as student

LEVEL = 0.05
MOST_SEEDS = 1000
TAILS = np.geomspace(1e-9, 0.5, 400)


@functools.cache
def quantiles(freedom: int) -> np.ndarray:
    """Student's distances that leave `TAILS` beyond them, falling."""
    return student.isf(TAILS, freedom)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with the variance of its two sources of chance.

    Attributes:
        mean: over seeds and documents.
        seed_variance: of one seed's value.
        document_variance: of the mean, by the choice of documents.
        seeds: how many.
        documents: as many of equal size would be as uncertain as these.
    """

    mean: float
    seed_variance: float
    document_variance: float
    seeds: int
    documents: float

    def with_seeds(self, seeds: int) -> "Estimate":
        """The same mean and variances from another number of seeds."""
        return dataclasses.replace(self, seeds=seeds)

    def half_width(self, tail: float) -> float:
        """Half the width of the interval that leaves `tail` on each side.

        Those of seeds and of documents, each by its own Student's quantile, are added in squares.
        One quantile for both would trust two seeds that agree by chance.
        """
        by_seeds = float(student.isf(tail, self.seeds - 1)) ** 2 * self.seed_variance / self.seeds
        by_documents = float(student.isf(tail, self.freedom)) ** 2 * self.document_variance
        return math.sqrt(by_seeds + by_documents)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the variance by documents."""
        return max(1, math.floor(self.documents - 1))

    def interval(self, level: float = 1 - LEVEL) -> tuple[float, float]:
        """The two-sided interval of this level."""
        half = self.half_width((1 - level) / 2)
        return self.mean - half, self.mean + half

    def p_above(self, value: float) -> float:
        """The one-sided p-value of a mean of at most `value`: small where it is above."""
        p = self._tail(abs(self.mean - value))
        return p if self.mean > value else 1 - p

    def p_below(self, value: float) -> float:
        """The one-sided p-value of a mean of at least `value`: small where it is below."""
        p = self._tail(abs(self.mean - value))
        return p if self.mean < value else 1 - p

    def _tail(self, distance: float) -> float:
        """The tail beyond an interval that ends at this distance from the mean; at most 0.5."""
        by_seeds = quantiles(self.seeds - 1) ** 2 * self.seed_variance / self.seeds
        half = np.sqrt(by_seeds + quantiles(self.freedom) ** 2 * self.document_variance)
        if distance >= half[0]:
            return 0.0 if distance else 0.5
        return float(np.exp(np.interp(-distance, -half, np.log(TAILS))))

    @property
    def p_differs(self) -> float:
        """The two-sided p-value of a mean of 0."""
        return 2 * self._tail(abs(self.mean))

    def p_equivalent(self, delta: float) -> float:
        """The p-value of a mean beyond delta, by two one-sided tests (Schuirmann 1987)."""
        return max(self.p_above(-delta), self.p_below(delta))


def estimate(bits_SM: np.ndarray, bytes_M: np.ndarray) -> Estimate:
    """The bits per byte of runs, or of differences between paired runs.

    The variance by documents is that of a ratio over documents drawn at random, of the mean over
    seeds; each residual is divided by 1 - its document's share, as by leaving documents out one by
    one, and the degrees of freedom count large documents as more than one. What seeds and documents
    do together is in both variances, so that the error is rather too large than too small.

    Args:
        bits_SM: of each document by each seed; for a difference, paired by seed and document.
        bytes_M: of each document.
    """
    bits_SM, bytes_M = np.asarray(bits_SM, float), np.asarray(bytes_M, float)
    seeds, documents = bits_SM.shape
    if seeds < 2:
        raise ValueError(f"{seeds} seed tells nothing of its spread; at least 2 are needed")
    share_M = bytes_M / bytes_M.sum()
    value_S = bits_SM.sum(1) / bytes_M.sum()
    mean = float(value_S.mean())
    by_documents = 0.0
    if documents > 1:
        residual_M = bits_SM.mean(0) / bytes_M.sum() - mean * share_M
        by_documents = float(((residual_M / (1 - share_M)) ** 2).sum())
    effective = float(1 / (share_M**2).sum())
    return Estimate(mean, float(value_S.var(ddof=1)), by_documents, seeds, effective)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that hold the error over the whole family (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is found about a difference to the baseline.

    Attributes:
        word: `better`, `worse`, `equivalent` or `undecided`; less is better.
        p_differs, p_equivalent: adjusted over the family.
    """

    word: str
    difference: Estimate
    p_differs: float
    p_equivalent: float


def verdicts(differences: Sequence[Estimate], delta: float) -> list[Verdict]:
    """A verdict for each arm's difference to one baseline, with errors held over all of them.

    An arm within delta is equivalent, even where it is certain which is better: the difference
    does not matter.
    """
    differs = holm([d.p_differs for d in differences])
    equivalent = holm([d.p_equivalent(delta) for d in differences])
    found = []
    for d, p, q in zip(differences, differs, equivalent, strict=True):
        if q < LEVEL:
            word = "equivalent"
        elif p < LEVEL:
            word = "better" if d.mean < 0 else "worse"
        else:
            word = "undecided"
        found.append(Verdict(word, d, p, q))
    return found


def further_seeds(differences: Sequence[Estimate], delta: float) -> list[int | None]:
    """How many more seeds for every arm would decide each, if means and spreads stay.

    The whole family is judged anew with each number of seeds, as `verdicts` would. 0 where a word
    is found already, `MOST_SEEDS` + 1 where it takes more than `MOST_SEEDS`; None where documents
    alone keep it open, so that only more text would decide.
    """

    @functools.cache
    def decided(more: int) -> list[bool]:
        family = [d.with_seeds(d.seeds + more) for d in differences]
        return [v.word != "undecided" for v in verdicts(family, delta)]

    certain = [dataclasses.replace(d, seed_variance=0.0) for d in differences]
    by_text = [v.word == "undecided" for v in verdicts(certain, delta)]
    return [None if by_text[i] else _least(decided, i) for i in range(len(differences))]


def _least(decided: Callable[[int], list[bool]], arm: int) -> int:
    """The least number of further seeds that decides an arm: doubled, then halved."""
    low, high = -1, 0  # not with low, maybe with high
    while not decided(high)[arm]:
        if high == MOST_SEEDS:
            return MOST_SEEDS + 1
        low, high = high, min(2 * high or 1, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle)[arm] else (middle, high)
    return high
