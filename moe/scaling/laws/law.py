"""A scaling law as a value: what it reads, its coefficients, and the loss that it predicts.

n points, P fitted parameters; a leading S is a batch of parameter vectors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np

Array = np.ndarray
Numbers = np.ndarray | float  # an array, or one number
Values = SimpleNamespace  # numbers or arrays by name


@dataclass(frozen=True)
class Coefficient:
    """A coefficient's starting values, and the scale on which it is fitted.

    Attributes:
        starts: the grid of starts takes each of them.
        positive: fitted as its logarithm.
        above: the coefficient that it exceeds, declared before it; the log of the distance is
            fitted.
    """

    starts: tuple[float, ...]
    positive: bool = False
    above: str = ""


def free(*starts: float) -> Coefficient:
    """A coefficient of any sign."""
    return Coefficient(starts)


def positive(*starts: float) -> Coefficient:
    """A coefficient above zero, fitted as its logarithm."""
    return Coefficient(starts, positive=True)


def above(other: str, *starts: float) -> Coefficient:
    """A coefficient above another one."""
    return Coefficient(starts, positive=True, above=other)


@dataclass(frozen=True)
class Input:
    """One column that a law reads.

    Attributes:
        meaning: in words, with the unit, for axes and messages.
        low, high: the values that it may have.
        choices: those that a search for an optimum tries; empty where any value between low and
            high will do.
    """

    meaning: str
    low: float = 0.0
    high: float = np.inf
    choices: tuple[float, ...] = ()


POWERS = tuple(2.0**i for i in range(13))
N = Input("parameters N", low=1)
D = Input("training tokens D", low=1)
E = Input("experts E", low=1, choices=POWERS)
G = Input("granularity G", low=1, choices=POWERS[:9])
S = Input("sparsity S = (E - K) / E", low=0, high=1 - 1e-9)


@dataclass(frozen=True)
class Costs:
    """What models of given sizes cost; arrays of one shape.

    Attributes:
        flops_per_token: of training (forward and backward).
        inference_flops: of a token's forward pass.
        total_parameters: all that must lie in memory.
    """

    flops_per_token: Array
    inference_flops: Array
    total_parameters: Array


def dense_costs(x: Values) -> Costs:
    """Six FLOPs per parameter and token in training, two in a forward pass; all are active."""
    return Costs(6 * x.N, 2 * x.N, x.N)


@dataclass(frozen=True)
class Law:
    """A law: `log_prediction(c, x)` is the natural log of what it predicts.

    Attributes:
        inputs: columns by the law's letters. Their order is that of the plot: the first is its x.
        coefficients: by the paper's names.
        log_prediction: c holds the coefficients, as arrays that broadcast with those of x, the
            inputs.
        equation: for people.
        delta: residuals of the log beyond it count linearly (Huber); np.inf for least squares.
        target, meaning: the column that is predicted, and its words.
        better: -1 where less is better, 1 for more.
        derived: further quantities that follow from the coefficients (numbers), by name.
        costs: what a model of these inputs costs; None where the law doesn't say.
        assumes: what `costs` assumes, in words.
    """

    name: str
    inputs: Mapping[str, Input]
    coefficients: Mapping[str, Coefficient]
    log_prediction: Callable[[Any, Any], Numbers]
    equation: str
    delta: float = 1e-3
    target: str = "L"
    meaning: str = "loss (nats per token)"
    better: int = -1
    derived: Callable[[Any], dict[str, float]] | None = None
    costs: Callable[[Any], Costs] | None = None
    assumes: str = ""
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.coefficients))

    def unpack(self, theta_SP: Array) -> Values:
        """Coefficients by name, (S, 1), from fitted parameters (S, P)."""
        values: dict[str, Array] = {}
        for i, (name, kind) in enumerate(self.coefficients.items()):
            value = theta_SP[..., i, None]
            if kind.positive:
                value = np.exp(value)
            values[name] = value + values[kind.above] if kind.above else value
        return Values(**values)

    def pack(self, values: Mapping[str, float]) -> Array:
        """Fitted parameters (P,) from coefficients by name; nan where they are out of range."""
        theta = []
        for name, kind in self.coefficients.items():
            value = values[name] - (values[kind.above] if kind.above else 0.0)
            theta.append(value if not kind.positive else np.log(value) if value > 0 else np.nan)
        return np.array(theta, np.float64)

    def numbers(self, theta_P: Array) -> dict[str, float]:
        """Coefficients as plain numbers."""
        return {name: float(value[0]) for name, value in vars(self.unpack(theta_P)).items()}

    def grid(self, fixed: Mapping[str, float]) -> Array:
        """All combinations of starting values, (S, P)."""
        axes = [
            (fixed[name],) if name in fixed else kind.starts
            for name, kind in self.coefficients.items()
        ]
        combinations = (dict(zip(self.names, v, strict=True)) for v in itertools.product(*axes))
        grid_SP = np.stack([self.pack(values) for values in combinations])
        return grid_SP[np.isfinite(grid_SP).all(axis=1)]


def log_sum_exp(*terms: Numbers) -> Numbers:
    """log of the sum of exp(terms), which broadcast."""
    peak = terms[0]
    for term in terms[1:]:
        peak = np.maximum(peak, term)
    return peak + np.log(sum(np.exp(term - peak) for term in terms))


def saturated(experts: Numbers, start: Numbers, most: Numbers) -> Numbers:
    """The saturated expert count (2202.01169): `start` for one expert, at most `most`."""
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
