"""Which experts stay, by layer, and which of them takes up each that goes.

L sparse layers, E experts, N experts that stay.
"""

import dataclasses

import numpy as np

from moe.errors import UserError, nearest
from moe.pruning.measure import Measured

METHODS = ("prune", "merge")
SCORES = ("saliency", "load", "random")


@dataclasses.dataclass(frozen=True)
class How:
    """How experts are taken away.

    Attributes:
        method: "prune" removes them; "merge" averages each with the one that stays and resembles
            it most.
        by: those with the lowest "saliency" or "load" go, or those that chance picks ("random").
        seed: of chance.
    """

    method: str = "prune"
    by: str = "saliency"
    seed: int = 0

    def __post_init__(self):
        for name, value, choices in (("method", self.method, METHODS), ("by", self.by, SCORES)):
            if value not in choices:
                hint = nearest(value, choices) or f": one of {', '.join(choices)}"
                raise UserError(f"--{name}={value}: no such choice{hint}")

    def score_LE(self, found: Measured) -> np.ndarray:
        """The experts' scores, of which the highest stay."""
        if self.by == "random":
            return np.random.default_rng(self.seed).random(found.count_LE.shape)
        return found.count_LE if self.by == "load" else found.saliency_LE

    def weight_LE(self, found: Measured) -> np.ndarray:
        """What experts weigh in an average: their saliency, or else the tokens that chose them."""
        return found.saliency_LE if self.by == "saliency" else found.count_LE


@dataclasses.dataclass(frozen=True)
class Choice:
    """The experts that stay in each layer, and what becomes of the others.

    Attributes:
        kept_LN: their numbers, ascending.
        home_LE: for every expert the place in kept_LN of the one that it is merged with, its own
            if it stays; -1 where it is only removed.
        weight_LE: the weights of the averages.
    """

    kept_LN: np.ndarray
    home_LE: np.ndarray
    weight_LE: np.ndarray

    @property
    def merges(self) -> bool:
        """Whether any expert is merged with another."""
        return self.kept_LN.shape != self.home_LE.shape and bool((self.home_LE >= 0).all())


def choose(found: Measured, how: How, size: int) -> Choice:
    """Keep the `size` experts of each layer with the highest scores; of equal ones the first.

    Merging follows M-SMoE (Li et al. 2023): dominant experts stay, every other one joins the
    dominant one whose router logits are nearest by their cosine. Other than there, every layer
    keeps as many, so that layers stay alike, and merged experts keep the dominant one's column of
    the router alone, since the new model has no row for the others.
    """
    score_LE = how.score_LE(found)
    order_LE = np.argsort(-score_LE, axis=1, kind="stable")
    kept_LN = np.sort(order_LE[:, :size], axis=1)
    home_LE = np.full(score_LE.shape, -1)
    for layer, kept_N in enumerate(kept_LN):
        if how.method == "merge":
            home_LE[layer] = np.argmax(found.similarity_LEE[layer][:, kept_N], axis=1)
        home_LE[layer, kept_N] = np.arange(size)
    return Choice(kept_LN, home_LE, how.weight_LE(found))
