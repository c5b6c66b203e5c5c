"""The picture of a fit: the law's curves with the measured points, and what the law leaves over.

Where further inputs vary, a point is moved along the law to those of its curve, so that its
distance from the curve is its residual.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from moe.scaling.fit import Fit
from moe.scaling.laws.law import Array

DISTINCT = 10  # values that have a curve each; more are put together as
GROUPS = 6
MARKS = "osD^vPX*<>"


def picture(fitted: Fit, path: Path) -> None:
    """Write a PNG with two panels: the fit over the first input, and the residuals in percent."""
    import matplotlib

    matplotlib.use("agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    letter, group_n, values = groups(fitted)
    colours = matplotlib.colormaps["cividis"](np.linspace(0, 0.9, len(values)))
    first = next(iter(fitted.law.inputs))
    x_n = fitted.points.inputs[first]
    left_over_n = np.exp(-fitted.residuals())
    error_n = 100 * (left_over_n - 1)
    for i, value in enumerate(values):
        mine = group_n == i
        style = {"color": colours[i], "marker": MARKS[i % len(MARKS)], "linestyle": "none"}
        style |= {"markersize": 5, "label": label(fitted, letter, value, mine)}
        span = np.geomspace(x_n[mine].min(), x_n[mine].max(), 100)
        at_points, on_line = (line(fitted, letter, value, x) for x in (x_n[mine], span))
        left.plot(x_n[mine], at_points * left_over_n[mine], **style)
        left.plot(span, on_line, color=colours[i], linewidth=1.2)
        right.plot(x_n[mine], error_n[mine], **style | {"label": None})
    _describe(fitted, left, right, float(np.std(error_n)))
    figure.savefig(path, dpi=120)


def _describe(fitted: Fit, left: Any, right: Any, scatter: float) -> None:
    """Titles, axes with units, legends."""
    law, first = fitted.law, next(iter(fitted.law.inputs.values()))
    scatter_10 = np.sqrt(np.mean(fitted.residuals() ** 2)) / np.log(10)
    left.set(
        title=f"Law {law.name}: {len(fitted.points)} points, RMSLE {scatter_10:.4f} (log10)",
        xlabel=first.meaning,
        ylabel=law.meaning,
        xscale="log",
        yscale="log",
    )
    _plain_ticks(left.yaxis, np.array(left.get_ylim()))
    right.set(
        title="Residuals (marks as on the left)",
        xlabel=first.meaning,
        ylabel="measured / fitted - 1 (%)",
        xscale="log",
    )
    right.axhline(0, color="black", linewidth=0.8)
    band = {"color": "grey", "alpha": 0.15, "linewidth": 0, "zorder": 0}
    right.axhspan(-scatter, scatter, label=f"± one deviation, {scatter:.2g} %", **band)
    left.legend(fontsize=8, title=legend_title(fitted), title_fontsize=8)
    right.legend(fontsize=8)


def _plain_ticks(axis: Any, values: Array) -> None:
    """Ticks as plain numbers where the values span less than a decade or two."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if values.max() / values.min() < 30:
        narrow = values.max() / values.min() < 4
        steps = (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8) if narrow else (1, 2, 5)
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def groups(fitted: Fit) -> tuple[str, Array, Array]:
    """The letter that tells the curves apart, each point's curve (n,), and the curves' values.

    It is the last input: experts, granularity or sparsity where the law has them. More than ten
    values are put together by size; the value of a curve is then the median of its points.
    """
    letters = list(fitted.points.inputs)
    if len(letters) == 1:
        return "", np.zeros(len(fitted.points), int), np.zeros(1)
    letter = letters[-1]
    values_n = fitted.points.inputs[letter]
    distinct = np.unique(values_n)
    if len(distinct) <= DISTINCT:
        return letter, np.searchsorted(distinct, values_n), distinct
    edges = np.quantile(distinct, np.linspace(0, 1, GROUPS + 1)[1:-1])
    group_n = np.searchsorted(np.unique(edges), values_n, side="right")
    used, group_n = np.unique(group_n, return_inverse=True)
    return letter, group_n, np.array([np.median(values_n[group_n == g]) for g in range(len(used))])


def label(fitted: Fit, letter: str, value: float, mine: Array) -> str:
    """What a curve's points have in common."""
    if not letter:
        return "measured"
    values = fitted.points.inputs[letter][mine]
    if values.min() == values.max():
        return f"{letter} = {number(value)}"
    return f"{letter} = {number(values.min())} to {number(values.max())} (line: {number(value)})"


def number(value: float) -> str:
    """Short: 64, 0.97, 2.1e+10."""
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2g}"


def legend_title(fitted: Fit) -> str:
    """What points and lines are."""
    letter, _, values = groups(fitted)
    others = [k for k, v in fitted.points.inputs.items() if len(np.unique(v)) > 1][1:]
    exact = others == [letter] and len(np.unique(fitted.points.inputs[letter])) == len(values)
    if not others or exact:
        return "points: measured; lines: the law"
    moved = ", ".join(others)
    return f"lines: the law; points: measured, carried\nalong the law to the line's {moved}"


def line(fitted: Fit, letter: str, value: float, first_n: Array) -> Array:
    """The law at values of the first input, further inputs at their medians."""
    first, *others = fitted.points.inputs
    x = {first: first_n}
    for other in others:
        at = value if other == letter else np.median(fitted.points.inputs[other])
        x[other] = np.full(len(first_n), at)
    law = fitted.law
    return np.exp(law.log_prediction(law.unpack(fitted.theta_P), SimpleNamespace(**x)))
