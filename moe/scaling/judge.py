"""How far a fit can be trusted: intervals, what the data leave open, errors on held-out points."""

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
from scipy.optimize import linprog

from moe.errors import UserError
from moe.scaling.fit import Fit, Points, Problem, Say, fit, refine
from moe.scaling.laws.law import Array, Coefficient, Law
from moe.statistics import bootstrap

FLAT = 1e-7  # of the largest singular value: a direction that changes no prediction
STEP, MOVES = 1e-4, 1e-3  # along a flat direction; by more of itself a derived value moves
FACTOR = 10.0  # interval of a positive coefficient that is no estimate any more
FOLDS = 5
Interval = tuple[float, float]


def check_points(law: Law, points: Points, fixed: Mapping[str, float]) -> None:
    """Refuse points that can't decide the law.

    Raises:
        UserError: an input or the target has one value only, or there are too few points.
    """
    for letter, values in points.inputs.items():
        if len(points) and len(np.unique(values)) < 2:
            raise UserError(
                f"{letter} is {values[0]:g} in every one of the {len(points)} points: the law "
                f"{law.name} needs at least two values of it"
            )
    if len(points) and len(np.unique(points.target)) < 2:
        raise UserError(
            f"{law.target} is {points.target[0]:g} in every one of the {len(points)} points: the "
            f"law {law.name} needs at least two values of it"
        )
    free = len(law.names) - len(fixed)
    if len(points) <= free:
        raise UserError(
            f"{len(points)} points are too few for the {free} coefficients of the law {law.name}; "
            f"it takes at least {free + 1}, or --fix some"
        )


def resampled(fitted: Fit, samples: int, seed: int, say: Say) -> Array:
    """Parameters fitted to resampled points, (samples, P), each from the fit's own.

    A coefficient that the fit has lost (a term that went to zero) would stay lost: each sample
    then also starts from the fit with its first starting value, and the better end counts.
    """
    counts = bootstrap.row_counts(len(fitted.points), samples, seed)
    theta_SP = np.empty((samples, len(fitted.theta_P)))
    starts = [fitted.theta_P]
    if flat := flat_directions(fitted):
        first_P = fitted.law.grid(fitted.fixed)[0]
        lost = np.array([name in flat for name in fitted.law.names])
        starts.append(np.where(lost, first_P, fitted.theta_P))
    for i, weights in enumerate(counts):
        say(f"bootstrap, round {i + 1} of {samples}")
        problem = Problem(fitted.law, fitted.points, weights, fitted.fixed)
        ends = (refine(problem, start_P, rounds=8, iterations=100) for start_P in starts)
        theta_SP[i] = min(ends, key=lambda end: end[0])[1]
    return theta_SP


def spread(fitted: Fit) -> float:
    """The small-sample factor of the fit's intervals."""
    return bootstrap.small_sample(len(fitted.points), len(fitted.theta_P) - len(fitted.fixed))


def interval(fitted: Fit, values_S: Array, estimate: float) -> Interval | None:
    """The 95 % interval of a quantity; of its logarithm where it is positive.

    None without samples.
    """
    if not len(values_S):
        return None
    factor = spread(fitted)
    if estimate > 0 and np.isfinite(estimate) and (values_S > 0).all():
        low, high = bootstrap.interval(np.log(values_S), np.log(estimate), spread=factor)
        return float(np.exp(low)), float(np.exp(high))
    return bootstrap.interval(values_S, estimate, spread=factor)


def coefficients(fitted: Fit, theta_SP: Array) -> dict[str, dict]:
    """Value and interval of each coefficient, and why the data don't identify it, if so."""
    flat, found = flat_directions(fitted), {}
    samples = vars(fitted.law.unpack(theta_SP)) if len(theta_SP) else {}
    for name, value in fitted.coefficients.items():
        if name in fitted.fixed:
            found[name] = {"value": value, "interval": None, "fixed": True, "identified": True}
            continue
        values_S = samples[name][:, 0] if name in samples else np.empty(0)
        limits = interval(fitted, values_S, value)
        why = flat.get(name) or wide(fitted.law.coefficients[name], value, limits)
        limits = None if name in flat else limits  # it stays where the fit left it
        found[name] = {"value": value, "interval": limits, "identified": why is None}
        if why:
            found[name]["reason"] = why
    return found


def flat_directions(fitted: Fit) -> dict[str, str]:
    """Coefficients that can change, alone or together, with no prediction changing."""
    found = {}
    for axis_P in flat_axes(fitted):
        moved = [n for n, part in zip(fitted.law.names, axis_P, strict=True) if abs(part) > 0.05]
        for name in moved:
            others = ", ".join(other for other in moved if other != name)
            together = f"it can change together with {others}" if others else "it can change"
            found[name] = f"{together} and no prediction at the data changes"
    return found


def flat_axes(fitted: Fit) -> Array:
    """Directions of the parameters that change no prediction, (directions, P), of length 1."""
    problem = Problem(fitted.law, fitted.points, fixed=fitted.fixed)
    _, jacobian_nP = problem.linearised(fitted.theta_P)
    _, size, axes = np.linalg.svd(jacobian_nP[:, problem.moves], full_matrices=False)
    flat = axes[size < FLAT * size[0]]
    found = np.zeros((len(flat), len(fitted.theta_P)))
    found[:, problem.moves] = flat
    return found


def wide(kind: Coefficient, value: float, limits: Interval | None) -> str | None:
    """Why an interval is no estimate, None where it is one."""
    if limits is None:
        return None
    low, high = limits
    if not np.isfinite([low, high]).all():
        return "its interval is not finite"
    if kind.positive:
        factor = high / low if low > 0 else np.inf
        return None if factor <= FACTOR else f"its interval spans a factor of {factor:.3g}"
    scale = max(abs(value), min((abs(s) for s in kind.starts if s), default=0.0))
    return None if high - low <= 2 * scale else "its interval is wider than twice its size"


def rmsle(residuals: Array) -> float:
    """Root of the mean square of log10(predicted / measured)."""
    return float(np.sqrt(np.mean(residuals**2)) / np.log(10))


def held_out(fitted: Fit, seed: int, say: Say) -> dict[str, float | int | None]:
    """RMSLE in log10 on points that the law was not fitted to: of folds, and of the largest.

    `folds`: each point is predicted by a fit without its fold (one of five, by chance).
    `largest`: the points of the largest first input, about a fifth, predicted from the others;
    None where the others don't decide the law.
    """
    points, count = fitted.points, len(fitted.points)
    folds = min(FOLDS, count)
    fold_n = np.random.default_rng(seed).permutation(count) % folds
    errors = np.empty(count)
    for fold in range(folds):
        say(f"held-out error of {fitted.law.name}, round {fold + 1} of {folds}")
        errors[fold_n == fold] = _without(fitted, fold_n == fold)
    first = next(iter(points.inputs.values()))
    large = first >= np.quantile(first, 0.8)
    try:
        check_points(fitted.law, points.take(~large), fitted.fixed)
        largest = rmsle(_without(fitted, large))
    except UserError:
        largest = None
    return {"folds": rmsle(errors), "largest": largest, "points_in_largest": int(large.sum())}


def _without(fitted: Fit, left_out: Array) -> Array:
    """Residuals of the points left out, by a fit to the others."""
    problem = Problem(fitted.law, fitted.points.take(~left_out), fixed=fitted.fixed)
    starts_SP = fitted.candidates_SP[:: max(1, len(fitted.candidates_SP) // 4)]
    _, theta_P = min((refine(problem, start_P) for start_P in starts_SP), key=lambda p: p[0])
    return Problem(fitted.law, fitted.points.take(left_out)).residuals(theta_P)


def compare(
    fitted: Fit, others: list[Law], points: list[Points], seed: int, say: Say
) -> list[dict]:
    """Held-out errors of this law and others, fitted to the same rows; the least first."""
    fits = [fitted]
    for law, own in zip(others, points, strict=True):
        check_points(law, own, {})
        fits.append(fit(law, own, say=say))
    rows = [
        {
            "law": one.law.name,
            "coefficients": len(one.theta_P) - len(one.fixed),
            "rmsle_log10": rmsle(one.residuals()),
            "held_out": held_out(one, seed, say),
        }
        for one in fits
    ]
    return sorted(rows, key=lambda row: row["held_out"]["folds"])


def beyond(points: Points, at: Mapping[str, float]) -> list[str]:
    """Warnings where a prediction lies outside the measured points."""
    found = []
    for letter, value in at.items():
        low, high = points.inputs[letter].min(), points.inputs[letter].max()
        if value < low:
            found.append(f"{letter}={value:.4g} lies below the data, which begin at {low:.4g}")
        elif value > high:
            found.append(f"{letter}={value:.4g} lies beyond the data, which end at {high:.4g}")
    if not found and len(at) > 1 and not _among(points, at):
        found.append(f"no points surround {', '.join(at)} taken together")
    return found


def _among(points: Points, at: Mapping[str, float]) -> bool:
    """Whether a place is a mean of measured ones, in logs (1 - S for a share from zero)."""
    columns = [(points.inputs[letter], value) for letter, value in at.items()]
    logs = [
        (np.log(v), np.log(x)) if v.min() > 0 else (np.log1p(-v), np.log1p(-x)) for v, x in columns
    ]
    matrix = np.stack([*(v for v, _ in logs), np.ones(len(points))])
    place = np.array([*(x for _, x in logs), 1.0])
    return linprog(np.zeros(len(points)), A_eq=matrix, b_eq=place, method="highs").status == 0


def predict(fitted: Fit, theta_SP: Array, at: Mapping[str, float], seed: int) -> dict:
    """The prediction at a place: of the law, with its interval, and the interval of one more run.

    The run's also holds its scatter: a residual, drawn for each sample.
    """
    x = SimpleNamespace(**{letter: np.array([value]) for letter, value in at.items()})
    law = fitted.law
    value = float(np.exp(law.log_prediction(law.unpack(fitted.theta_P), x))[0])
    found = {"at": dict(at), law.target: value, "interval": None, "interval_of_a_run": None}
    if len(theta_SP):
        with np.errstate(all="ignore"):
            logs_S = np.asarray(law.log_prediction(law.unpack(theta_SP), x))[:, 0]
        residuals = np.random.default_rng(seed).choice(fitted.residuals(), len(logs_S))
        scatter = residuals * spread(fitted)
        found["interval"] = interval(fitted, np.exp(logs_S), value)
        found["interval_of_a_run"] = interval(fitted, np.exp(logs_S - scatter), value)
    return found | {"warnings": beyond(fitted.points, at)}


def derived(fitted: Fit, theta_SP: Array) -> dict[str, dict]:
    """What follows from the coefficients, with intervals; none where the data leave it open."""
    values, samples = (
        follows(fitted.law, fitted.theta_P),
        [follows(fitted.law, theta_P) for theta_P in theta_SP],
    )
    sides = [
        [follows(fitted.law, fitted.theta_P + sign * STEP * axis_P) for sign in (1, -1)]
        for axis_P in flat_axes(fitted)
    ]
    found = {}
    for name, value in values.items():
        limits = interval(fitted, np.array([s[name] for s in samples]), value)
        slopes = [abs(up[name] - down[name]) / (2 * STEP) for up, down in sides]
        fixed = all(slope <= MOVES * abs(value) for slope in slopes)  # not a number: not fixed
        found[name] = {
            "value": value,
            "interval": limits if fixed else None,
            "identified": fixed,
        }
        if not fixed:
            found[name]["reason"] = "it can change and no prediction at the data changes"
    return found


def follows(law: Law, theta_P: Array) -> dict[str, float]:
    """The law's derived quantities; not finite where they are not defined."""
    if law.derived is None:
        return {}
    with np.errstate(all="ignore"):
        numbers = {name: np.float64(value) for name, value in law.numbers(theta_P).items()}
        found = law.derived(SimpleNamespace(**numbers))
    return {name: float(value) for name, value in found.items()}
