"""Ranges of numbers, as annotations that are read when a config is checked.

`k: Count = 2` says that k is an integer of at least 1. A config with a number out of its range is
refused before anything is built, and `moe help` shows the range; Python itself checks nothing.
"""

import dataclasses
import math
from typing import Annotated


@dataclasses.dataclass(frozen=True)
class Range:
    """Inclusive bounds (low, high) and exclusive ones (above, below)."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether a number is finite and in the range."""
        inside = self.low <= value <= self.high and self.above < value < self.below
        return math.isfinite(value) and inside

    def __str__(self) -> str:
        bounds = {
            "of at least": self.low,
            "above": self.above,
            "of at most": self.high if self.high < MOST else math.inf,
            "below": self.below,
        }
        words = [f"{word} {bound:.10g}" for word, bound in bounds.items() if math.isfinite(bound)]
        return " and ".join(words) or "that is finite"


MOST = 2**31 - 1  # sizes and counts are int32 on devices; the help doesn't repeat it

Count = Annotated[int, Range(low=1, high=MOST)]
Natural = Annotated[int, Range(low=0, high=2**32 - 1)]
Size = Annotated[int, Range(low=1)]  # of text, in bytes
MeshSize = Annotated[int, Range(low=-1, high=MOST)]
Real = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(low=0)]
AboveOne = Annotated[float, Range(above=1)]
Share = Annotated[float, Range(low=0, high=1)]
SomeShare = Annotated[float, Range(above=0, high=1)]
OpenShare = Annotated[float, Range(above=0, below=1)]
LessThanOne = Annotated[float, Range(low=0, below=1)]
