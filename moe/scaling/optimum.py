"""The best sizes for a budget in FLOPs, under limits of memory and inference cost.

M candidate models in a search.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np

from moe.errors import UserError
from moe.scaling.fit import Fit
from moe.scaling.judge import beyond, interval
from moe.scaling.laws.law import Array, Law, Values

COARSE, FINE, ZOOMS = 241, 13, 9  # values along a free size, at first and then; how often


@dataclass(frozen=True)
class Budget:
    """What a model may cost.

    Attributes:
        flops: of the whole training.
        tokens: the training tokens, for laws without D.
        max_memory: bytes of all weights.
        bytes_per_parameter: 2 for bfloat16.
        max_inference: FLOPs of a token's forward pass.
    """

    flops: float
    tokens: float | None = None
    max_memory: float | None = None
    bytes_per_parameter: float = 2.0
    max_inference: float | None = None


def check_budget(law: Law, budget: Budget) -> None:
    """Refuse what the law can't judge.

    Raises:
        UserError: with what is missing or too much.
    """
    has_sizes = law.costs is not None
    if not has_sizes and (budget.max_memory or budget.max_inference or budget.tokens):
        raise UserError(
            f"the law {law.name} says no costs of a model: leave out --max_memory, "
            "--max_inference and --tokens"
        )
    if not has_sizes and "C" not in law.inputs:
        raise UserError(
            f"the law {law.name} says no costs of a model, so that no --budget is spent"
        )
    if has_sizes and "D" in law.inputs and budget.tokens:
        raise UserError(f"the law {law.name} chooses D itself: leave out --tokens")
    if has_sizes and "D" not in law.inputs and not budget.tokens:
        raise UserError(
            f"the law {law.name} has no D: --budget also needs --tokens=N, those of the "
            "models that it was fitted to"
        )


def optimum(fitted: Fit, theta_SP: Array, budget: Budget) -> dict:
    """The best inputs, what they cost and give, with intervals and the limits that bind.

    Sizes may lie beyond the data, with a warning; experts, granularity and shares stay within.

    Raises:
        UserError: no model keeps the limits.
    """
    law = fitted.law
    check_budget(law, budget)
    best = search(fitted, fitted.theta_P, budget)
    if best is None:
        raise UserError("no model keeps the limits: raise --max_memory or --max_inference")
    samples = [search(fitted, theta_P, budget) for theta_P in theta_SP]
    found: dict = {"budget": budget.flops, "assumes": law.assumes}
    for letter, value in best.items():
        values = np.array([sample[letter] for sample in samples if sample])
        found[letter] = {"value": value, "interval": interval(fitted, values, value)}
    x = SimpleNamespace(**{letter: np.array([value]) for letter, value in best.items()})
    value = float(_value(law, fitted.theta_P, x)[0])
    values = np.array([_value(law, t, x)[0] for t in theta_SP])
    found[law.target] = {"value": value, "interval": interval(fitted, values, value)}
    found |= _costs(law, budget, x)
    found["limited_by"] = _binding(fitted, budget, value)
    at = {letter: best[letter] for letter in law.inputs}
    return found | {"warnings": [*beyond(fitted.points, at), *_edges(fitted, best)]}


def _costs(law: Law, budget: Budget, x: Values) -> dict:
    """What the best model costs."""
    if law.costs is None:
        return {}
    costs = law.costs(x)
    total = float(costs.total_parameters[0])
    return {
        "total_parameters": total,
        "memory": total * budget.bytes_per_parameter,
        "inference_flops": float(costs.inference_flops[0]),
    }


def _binding(fitted: Fit, budget: Budget, value: float) -> list[str]:
    """The limits without which a better model would do."""
    found = []
    for limit in ("max_memory", "max_inference"):
        if getattr(budget, limit):
            freer = search(fitted, fitted.theta_P, replace(budget, **{limit: None})) or {}
            x = SimpleNamespace(**{k: np.array([v]) for k, v in freer.items()})
            gain = (_value(fitted.law, fitted.theta_P, x)[0] - value) * fitted.law.better
            found += [limit] if gain > 1e-6 * value else []
    return found


def _edges(fitted: Fit, best: Mapping[str, float]) -> list[str]:
    """Warnings for letters whose best value is the last that was measured."""
    found = []
    for letter in _bounded(fitted.law):
        values = fitted.points.inputs[letter]
        if letter in best and best[letter] in (values.min(), values.max()):
            found.append(f"the best {letter} is the edge of the data, {best[letter]:.4g}")
    return found


def _bounded(law: Law) -> list[str]:
    """Letters that are searched within the data only."""
    return [k for k, kind in law.inputs.items() if kind.choices or np.isfinite(kind.high)]


def search(fitted: Fit, theta_P: Array, budget: Budget) -> dict[str, float] | None:
    """The best inputs by letter; None where no model keeps the limits.

    Sizes are zoomed in on, in logs; experts and granularity are tried one by one.
    """
    law = fitted.law
    ranges = {}
    for letter, kind in law.inputs.items():
        if letter in ("D", "C"):
            continue  # D follows from the budget, C is the budget
        low, high = fitted.points.inputs[letter].min(), fitted.points.inputs[letter].max()
        if letter not in _bounded(law):
            low, high = max(low / 1e3, kind.low), high * 1e6
        ranges[letter] = (low, high)
    axes = {letter: _axis(law, letter, span, COARSE) for letter, span in ranges.items()}
    best = None
    for _ in range(ZOOMS):
        best = _best(law, theta_P, budget, axes)
        if best is None:
            return None
        for letter in axes:
            if not law.inputs[letter].choices:
                at = int(np.argmin(np.abs(axes[letter] - best[letter])))
                last = len(axes[letter]) - 1
                around = axes[letter][max(at - 1, 0)], axes[letter][min(at + 1, last)]
                axes[letter] = _axis(law, letter, around, FINE)
    return best


def _axis(law: Law, letter: str, span: tuple[float, float], count: int) -> Array:
    """Values to try from low to high; shares that may be 0 are spaced by their complement."""
    kind, (low, high) = law.inputs[letter], span
    if kind.choices:
        within = [v for v in kind.choices if low <= v <= high]
        return np.unique([low, *within, high])
    if kind.low == 0:
        values = 1 - np.geomspace(1 - low, 1 - high, min(count, 61))
        values[0], values[-1] = low, high  # the complement's complement may be off by a rounding
        return values
    return np.geomspace(low, high, count)


def _best(
    law: Law, theta_P: Array, budget: Budget, axes: Mapping[str, Array]
) -> dict[str, float] | None:
    """The best of all combinations of the axes' values that keep the limits."""
    mesh_M = np.meshgrid(*axes.values(), indexing="ij")
    x = SimpleNamespace(**{k: m.ravel() for k, m in zip(axes, mesh_M, strict=True)})
    allowed_M = np.ones(mesh_M[0].size, bool)
    if law.costs is not None:
        costs = law.costs(x)
        tokens_M = budget.flops / costs.flops_per_token
        if budget.tokens:
            allowed_M &= tokens_M >= budget.tokens * (1 - 1e-12)
        else:
            x.D = tokens_M
            allowed_M &= tokens_M >= 1
        if budget.max_memory:
            allowed_M &= costs.total_parameters * budget.bytes_per_parameter <= budget.max_memory
        if budget.max_inference:
            allowed_M &= costs.inference_flops <= budget.max_inference
    else:
        x.C = np.full(mesh_M[0].size, budget.flops)
    if not allowed_M.any():
        return None
    value_M = np.where(allowed_M, _value(law, theta_P, x) * law.better, -np.inf)
    best = int(np.nanargmax(value_M))
    return {letter: float(values[best]) for letter, values in vars(x).items()}


def _value(law: Law, theta_P: Array, x: Values) -> Array:
    with np.errstate(all="ignore"):
        return np.exp(law.log_prediction(law.unpack(theta_P), x))
