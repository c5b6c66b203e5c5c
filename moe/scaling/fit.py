"""Fit a law: the sum of Huber losses of log residuals, least over a grid of starts by L-BFGS.

n points, P fitted parameters, S parameter vectors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from scipy.optimize import minimize

from moe.errors import UserError
from moe.scaling.laws.law import Array, Law, Numbers

REFINED = 64  # starts that are followed to their optimum
ELEMENTS = 2_000_000  # residuals held at a time
STEP = 1e-6  # of central differences
FAR = 1e3  # residual where a law has no finite value
Say = Callable[[str], None]


@dataclass(frozen=True)
class Points:
    """Measured points.

    Attributes:
        inputs: by letter, (n,).
        target: what the law predicts, (n,).
    """

    inputs: Mapping[str, Array]
    target: Array

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: Array) -> "Points":
        """Some of the points, by index or mask."""
        return Points({k: v[rows] for k, v in self.inputs.items()}, self.target[rows])


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        theta_P: fitted parameters.
        objective: the sum of the Huber losses.
        tried, refined, agreeing: starts, those followed to their optimum, and those of them that
            came to the same objective within 1e-4 of it.
        candidates_SP: the optima found, best first.
        fixed: coefficients that were given.
    """

    law: Law
    points: Points
    theta_P: Array
    objective: float
    tried: int
    refined: int
    agreeing: int
    candidates_SP: Array
    fixed: Mapping[str, float]

    @property
    def coefficients(self) -> dict[str, float]:
        """By the paper's names."""
        return self.law.numbers(self.theta_P)

    def residuals(self) -> Array:
        """log of predicted over measured, (n,)."""
        return Problem(self.law, self.points).residuals(self.theta_P)


class Problem:
    """The objective of one law on some points.

    Args:
        weights: how often each point counts; once where None.
        fixed: coefficients that keep their starting values.
    """

    def __init__(
        self,
        law: Law,
        points: Points,
        weights: Array | None = None,
        fixed: Mapping[str, float] | None = None,
    ):
        self.law = law
        self.inputs = SimpleNamespace(**points.inputs)
        self.log_target = np.log(points.target)
        self.weights = np.ones(len(points)) if weights is None else weights
        self.moves = np.array([name not in (fixed or {}) for name in law.names])

    def residuals(self, theta_SP: Array) -> Array:
        """log of predicted over measured, (S, n)."""
        with np.errstate(all="ignore"):
            log_prediction = self.law.log_prediction(self.law.unpack(theta_SP), self.inputs)
        residuals = log_prediction - self.log_target
        return np.nan_to_num(residuals, nan=FAR, posinf=FAR, neginf=-FAR)

    def objective(self, theta_SP: Array) -> Numbers:
        """The weighted sum of Huber losses: (S,), or a number for one vector (P,)."""
        return huber(self.residuals(theta_SP), self.law.delta) @ self.weights

    def linearised(self, theta_P: Array) -> tuple[Array, Array]:
        """Residuals (n,), and their derivatives (n, P) by central differences; 0 where fixed."""
        step_P = STEP * np.maximum(1, np.abs(theta_P)) * self.moves
        shift_PP = np.diag(step_P)
        around = np.concatenate([theta_P[None], theta_P + shift_PP, theta_P - shift_PP])
        residuals, count = self.residuals(around), len(theta_P)
        change_Pn = residuals[1 : count + 1] - residuals[count + 1 :]
        return residuals[0], change_Pn.T / np.where(self.moves, 2 * step_P, 1)

    def value_and_gradient(self, theta_P: Array) -> tuple[float, Array]:
        """The objective and its gradient (P,)."""
        residuals, jacobian_nP = self.linearised(theta_P)
        slope = np.clip(residuals, -self.law.delta, self.law.delta) * self.weights
        return float(huber(residuals, self.law.delta) @ self.weights), slope @ jacobian_nP


def huber(residuals: Array, delta: float) -> Array:
    """Half the square up to delta, linear beyond."""
    size = np.abs(residuals)
    inner = np.minimum(size, delta)
    return inner * (size - inner / 2)


def fit(
    law: Law,
    points: Points,
    fixed: Mapping[str, float] | None = None,
    say: Say = lambda line: None,
) -> Fit:
    """Fit a law to points: the best of all starts, of which the most promising are refined.

    fixed: coefficients that are given.
    """
    problem, fixed = Problem(law, points, fixed=fixed), fixed or {}
    try:
        grid_SP = law.grid(fixed)
        value_S = np.concatenate([problem.objective(t) for t in chunks(grid_SP, len(points))])
    except Exception as error:
        raise UserError(
            f"the law {law.name} can't be evaluated: {type(error).__name__}: {error}"
        ) from error
    if not (value_S < FAR * len(points) * min(law.delta, 1) / 2).any():
        raise UserError(
            f"the law {law.name} has no finite value at any of its {len(grid_SP)} starts"
        )
    found = []
    starts_SP = grid_SP[promising(value_S, REFINED)]
    for i, start_P in enumerate(starts_SP):
        say(f"fitting {law.name}, round {i + 1} of {len(starts_SP)}")
        found.append(refine(problem, start_P, rounds=3, iterations=60))
    found.sort(key=lambda pair: pair[0])
    found[:4] = [refine(problem, theta_P) for _, theta_P in found[:4]]
    found.sort(key=lambda pair: pair[0])
    best, theta_P = found[0]
    agreeing = sum(value <= best * (1 + 1e-4) + 1e-12 for value, _ in found)
    candidates_SP = np.stack([theta_P for _, theta_P in found])
    return Fit(law, points, theta_P, best, len(grid_SP), len(found), agreeing, candidates_SP, fixed)


def chunks(grid_SP: Array, points: int) -> Iterator[Array]:
    """The grid in pieces whose residuals fit into memory."""
    size = max(1, ELEMENTS // max(points, 1))
    return (grid_SP[i : i + size] for i in range(0, len(grid_SP), size))


def promising(value_S: Array, count: int) -> Array:
    """Indices of the starts to refine: the best ones, and a few spread over the better half."""
    order = np.argsort(value_S, kind="stable")
    if len(order) <= count:
        return order
    spread = np.linspace(count, max(count, len(order) // 2), count // 4).astype(int)
    return np.unique(
        np.concatenate([order[: count * 3 // 4], order[spread.clip(0, len(order) - 1)]])
    )


def refine(
    problem: Problem, theta_P: Array, rounds: int = 20, iterations: int = 500
) -> tuple[float, Array]:
    """The objective and parameters where L-BFGS ends that starts at theta_P.

    Each round runs it in coordinates in which the curvature at its start is about one: a - alpha
    log N moves far along a valley otherwise, and optimizers stop on its floor.
    """
    value, gradient_P = problem.value_and_gradient(theta_P)
    for _ in range(rounds):
        if value <= 1e-28 or not np.isfinite(gradient_P).all():
            break
        scale_PP = whitening(problem, theta_P)

        def scaled(move_P, theta_P=theta_P, scale_PP=scale_PP, unit=value):
            loss, gradient = problem.value_and_gradient(theta_P + scale_PP @ move_P)
            return loss / unit, scale_PP.T @ gradient / unit

        options = {"maxiter": iterations, "ftol": 1e-15, "gtol": 1e-9, "maxls": 40, "maxcor": 20}
        found = minimize(
            scaled, np.zeros_like(theta_P), jac=True, method="L-BFGS-B", options=options
        )
        before, value = value, min(value, value * found.fun)
        if found.fun < 1:
            theta_P = theta_P + scale_PP @ found.x
        if value > before * (1 - 1e-9):
            break
    return value, theta_P


def whitening(problem: Problem, theta_P: Array) -> Array:
    """The change of coordinates (P, P) in which the Gauss-Newton curvature is the objective."""
    residuals, jacobian_nP = problem.linearised(theta_P)
    delta = problem.law.delta
    weights = problem.weights * np.minimum(1, delta / np.maximum(np.abs(residuals), 1e-300))
    curvature_PP = (jacobian_nP.T * weights) @ jacobian_nP
    value = huber(residuals, delta) @ problem.weights
    eigen_P, axes_PP = np.linalg.eigh(curvature_PP)
    eigen_P = np.maximum(eigen_P, max(eigen_P[-1] * 1e-12, value * 1e-2, 1e-300))
    return axes_PP * np.sqrt(value / eigen_P)
