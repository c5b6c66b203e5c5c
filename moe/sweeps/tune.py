"""The search for each arm's settings: the same points for every arm, chosen on validation."""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from scipy.stats import qmc

Values = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of a setting: from low to high, searched evenly or evenly in its logarithm."""

    low: float
    high: float
    scale: str

    def at(self, share: float) -> float:
        """The value at a share in [0, 1] of the range, to four digits."""
        if self.scale == "log":
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.4g}")

    def wider(self, below: bool, above: bool) -> "Range":
        """The range with half its length more, below or above or both."""
        if self.scale == "log":
            factor = math.sqrt(self.high / self.low)
            low, high = self.low / factor, self.high * factor
        else:
            length = (self.high - self.low) / 2
            low, high = self.low - length, self.high + length
            low = max(low, 0.0) if self.low >= 0 else low  # settings that are not negative stay so
        return Range(low if below else self.low, high if above else self.high, self.scale)


def points(ranges: Mapping[str, Range], number: int, seed: int) -> list[Values]:
    """A quasi-random search: the first `number` points of a scrambled Halton sequence."""
    if not ranges or not number:
        return []
    shares = qmc.Halton(len(ranges), rng=seed).random(number)
    return [
        {name: span.at(share) for (name, span), share in zip(ranges.items(), row, strict=True)}
        for row in shares.tolist()
    ]


def between(span: Range, old: Range, number: int, seed: int) -> list[float]:
    """`number` values of the part of a widened range that the old one did not reach."""
    shares = qmc.Halton(1, rng=seed).random(4096)[:, 0].tolist()
    values = (span.at(share) for share in shares)
    return [v for v in values if not old.low <= v <= old.high][:number]


def edges(best: Values, tried: Sequence[Values]) -> dict[str, str]:
    """Which of the best values are the lowest or highest that were tried: "low" or "high"."""
    found = {}
    for name, value in best.items():
        values = sorted({point[name] for point in tried})
        if len(values) > 1 and value in (values[0], values[-1]):
            found[name] = "low" if value == values[0] else "high"
    return found
