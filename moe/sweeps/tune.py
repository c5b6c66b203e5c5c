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

    def beyond(self, side: str, number: int) -> "Range | None":
        """The piece that the range's widening by this number adds: half its length.

        It depends on nothing but this, so that values stay what they are whatever else is widened.

        side: "low" or "high". None where nothing is left: settings that are not negative stay so.
        """
        if self.scale == "log":
            factor = math.sqrt(self.high / self.low)
            low, high = self.low / factor**number, self.high * factor**number
            return (
                Range(low, low * factor, "log")
                if side == "low"
                else Range(high / factor, high, "log")
            )
        length = (self.high - self.low) / 2
        if side == "high":
            start = self.high + length * (number - 1)
            return Range(start, start + length, "linear")
        end = self.low - length * (number - 1)
        start = max(end - length, 0.0) if self.low >= 0 else end - length
        return Range(start, end, "linear") if start < end else None


def points(ranges: Mapping[str, Range], number: int, seed: int) -> list[Values]:
    """A quasi-random search: the first `number` points of a scrambled Halton sequence."""
    if not ranges or not number:
        return []
    shares = qmc.Halton(len(ranges), rng=seed).random(number)
    return [
        {name: span.at(share) for (name, span), share in zip(ranges.items(), row, strict=True)}
        for row in shares.tolist()
    ]


def edges(best: Values, tried: Sequence[Values]) -> dict[str, str]:
    """Which of the best values are the lowest or highest that were tried: "low" or "high"."""
    found = {}
    for name, value in best.items():
        values = sorted({point[name] for point in tried})
        if len(values) > 1 and value in (values[0], values[-1]):
            found[name] = "low" if value == values[0] else "high"
    return found
