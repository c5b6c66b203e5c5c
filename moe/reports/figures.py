"""The figures of a report, as SVG, in Okabe and Ito's colours, which the colour-blind can tell."""

from collections.abc import Callable, Sequence
import dataclasses
import io
import itertools
import math
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
import numpy as np

from moe.reports.findings import Finding, paired
from moe.reports.read import Sweep
from moe.sweeps.cell import DECODED_AT_ONCE

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
BASELINE, GREY, BAND = "#000000", "#999999", "#DDDDDD"
WORDS = {
    "better": "#009E73",
    "worse": "#D55E00",
    "equivalent": "#0072B2",
    "undecided": GREY,
}
SETTINGS: Any = {"svg.hashsalt": "moe", "svg.fonttype": "path", "font.size": 9}
POINTS = 60  # of a learning curve


def as_svg(figure: Figure) -> str:
    """The figure as text."""
    file = io.StringIO()
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name may hold dollars
    with mpl.rc_context(SETTINGS):
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


def colours_of(findings: Sequence[Finding]) -> dict[str, str]:
    """A colour for each cell: the baseline is black, the best have one each, then grey.

    Several baselines, at places of the axes, are told apart: they have the first colours instead.
    """
    baselines = [f.cell for f in findings if f.is_baseline]
    first = COLOURS if len(baselines) > 1 else (BASELINE, *COLOURS)
    order = [*baselines, *(f.cell for f in findings if not f.is_baseline)]
    found = dict(zip(order, itertools.chain(first, itertools.repeat(GREY)), strict=False))
    return {f.cell: found[f.cell] for f in findings}


def answer(sweep: Sweep, findings: Sequence[Finding]) -> Figure:
    """Each cell's difference to its baseline: intervals, seeds, the band that doesn't matter."""
    shown = [f for f in findings if f.verdict is not None]
    shown.sort(key=lambda f: f.verdict.difference.mean if f.verdict else 0.0)
    figure = Figure(figsize=(7.5, 1.6 + 0.27 * max(len(shown), 2)))
    axes = figure.add_subplot()
    delta = sweep.plan["delta"]
    axes.axvspan(-delta, delta, color=BAND, label=f"does not matter (within {delta:g})")
    axes.axvline(0, color=BASELINE, linewidth=1, label=f"baseline: {short(sweep.plan['baseline'])}")
    for row, f in enumerate(reversed(shown)):
        assert f.verdict is not None
        difference = f.verdict.difference
        low, high = difference.interval()
        colour = WORDS.get(f.word, GREY)
        axes.plot([low, high], [row, row], color=colour, linewidth=2)
        axes.plot(difference.mean, row, "o", color=colour, markersize=6)
        for value in differences_by_seed(sweep, f):
            axes.plot(value, row, "|", color=colour, markersize=9)
    axes.set_yticks(range(len(shown)), [short(f.cell) for f in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("difference to the baseline in bits per byte of held-out text (less is better)")
    axes.set_title("95 % intervals of each cell, strokes are seeds; colours hold over all cells")
    for word in [word for word in WORDS if word in {f.word for f in shown}]:
        axes.plot([], [], color=WORDS[word], linewidth=2, label=word)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    tidy(axes)
    return figure


def short(name: str, most: int = 48) -> str:
    """The name, or both its ends, so that it leaves room for the figure."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]} ... {name[-half:]}"


def back_to_front(findings: Sequence[Finding], colours: dict[str, str]) -> list[Finding]:
    """Cells in grey, then the others from the worst to the best, then baselines: on top."""
    layer = {GREY: 0, BASELINE: 2}
    return sorted(reversed(findings), key=lambda f: layer.get(colours[f.cell], 1))


def differences_by_seed(sweep: Sweep, finding: Finding) -> list[float]:
    """The paired differences of single seeds."""
    both = paired(sweep, finding.cell, finding.facts["baseline"])
    return [
        ours["bits_per_byte"] - theirs["bits_per_byte"] for ours, theirs in zip(*both, strict=True)
    ]


def curves(sweep: Sweep, findings: Sequence[Finding]) -> Figure:
    """Training loss over tokens, FLOPs and seconds, with the range of the seeds as a band."""
    figure = Figure(figsize=(11, 3.6))
    panels = figure.subplots(1, 3, sharey=True)
    names = {
        "tokens": "training tokens",
        "flops": "training FLOPs",
        "seconds": "seconds of training",
    }
    colours = colours_of(findings)
    for axes, (axis, label) in zip(panels, names.items(), strict=True):
        for f in back_to_front(findings, colours):
            of_seeds(axes, sweep, f, axis, "bits_per_byte", colours[f.cell])
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        tidy(axes)
    panels[0].set_ylabel("training bits per byte")
    lines = [line for line in panels[0].get_lines() if line.get_label()[0] != "_"]
    skip_start(panels[0], lines)
    legend(panels[2], findings, colours)
    figure.suptitle("Learning curves: mean over seeds, and their range")
    return figure


def of_seeds(axes, sweep: Sweep, finding: Finding, axis: str, key: str, colour: str) -> None:
    """A metric of a cell over `axis`: the mean over seeds, and their range as a band."""
    rows = [sweep.curves.get(row["trial"], []) for row in sweep.finished(finding.cell)]
    rows = [[r for r in curve if r.get(key) is not None and r.get(axis)] for curve in rows]
    rows = [curve for curve in rows if len(curve) > 1]
    if not rows:
        return
    end = min(curve[-1][axis] for curve in rows)
    start = max(curve[0][axis] for curve in rows)
    x_N = np.linspace(start, end, POINTS)
    y_SN = np.array(
        [
            np.interp(x_N, *binned([r[axis] for r in curve], [r[key] for r in curve]))
            for curve in rows
        ]
    )
    style, width = "--" if finding.facts["leaks"] else "-", 0.6
    if colour != GREY:  # the bands of many would hide all else
        axes.fill_between(x_N, y_SN.min(0), y_SN.max(0), color=colour, alpha=0.2, linewidth=0)
        width = 1.4
    axes.plot(x_N, y_SN.mean(0), style, color=colour, linewidth=width, label=finding.cell)


def binned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means over as many equal parts as a curve has points."""
    parts = min(POINTS, len(x))
    split = np.array_split(np.arange(len(x)), parts)
    return (
        np.array([np.mean([x[i] for i in part]) for part in split]),
        np.array([np.mean([y[i] for i in part]) for part in split]),
    )


def skip_start(axes, lines) -> None:
    """Let the axis begin where a tenth of training is over: the first steps would fill it."""
    values = [line.get_ydata() for line in lines]
    if values:
        top = max(float(v[len(v) // 10]) for v in values)
        low = min(float(np.min(v)) for v in values)
        if top > low:
            axes.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))


def routing(sweep: Sweep, findings: Sequence[Finding]) -> Figure | None:
    """Load, drops and entropy of the routers over the share of training that is done."""
    keys = {
        "load/max_over_mean": "fullest expert's load / mean",
        "load/dropped": "share of assignments dropped",
        "router/entropy": "entropy of the router in nats",
    }
    colours = colours_of(findings)
    figure = Figure(figsize=(11, 3.2))
    panels, drawn = figure.subplots(1, 3), False
    for axes, (key, label) in zip(panels, keys.items(), strict=True):
        for f in back_to_front(findings, colours):
            share = with_shares(sweep, f)
            before = len(axes.get_lines())
            of_seeds(axes, share, f, "share", key, colours[f.cell])
            drawn |= len(axes.get_lines()) > before
        axes.set_xlabel("share of training")
        axes.set_ylabel(label)
        tidy(axes)
    legend(panels[2], findings, colours)
    figure.suptitle("Routing over training, at equal shares of the schedule")
    figure.subplots_adjust(wspace=0.3)
    return figure if drawn else None


def with_shares(sweep: Sweep, finding: Finding) -> Sweep:
    """The sweep with the share of its steps in each row of a cell's curves."""
    found = {}
    for row in sweep.finished(finding.cell):
        curve = sweep.curves.get(row["trial"], [])
        found[row["trial"]] = [r | {"share": r["step"] / row["steps"]} for r in curve]
    return dataclasses.replace(sweep, curves=found)


def pareto(findings: Sequence[Finding]) -> Figure:
    """Loss against what it costs: FLOPs, parameters, time and memory; what decoding reads."""
    costs: dict[str, Callable[[Finding], float | None]] = {
        "active FLOPs per token": lambda f: f.facts["flops_per_token"],
        "total parameters": lambda f: f.facts["parameters_total"],
        "seconds of training": lambda f: f.means.get("train_seconds"),
        "peak memory in MiB": lambda f: scaled(f.means.get("peak_memory_bytes"), 2**-20),
        f"parameters read per token,\ndecoding {DECODED_AT_ONCE} at once": lambda f: f.facts.get(
            "decode_parameters"
        ),
    }
    colours = colours_of(findings)
    figure = Figure(figsize=(14, 3.4))
    panels = figure.subplots(1, len(costs), sharey=True)
    for axes, (label, cost) in zip(panels, costs.items(), strict=True):
        points = [(cost(f), float(np.mean(f.values_S)), f) for f in findings if f.values_S]
        points = [(x, y, f) for x, y, f in points if x is not None and math.isfinite(x)]
        by_cell = {f.cell: (x, y) for x, y, f in points}
        for f in [f for f in back_to_front(findings, colours) if f.cell in by_cell]:
            x, y = by_cell[f.cell]
            marker = "x" if f.facts["leaks"] else "o"
            axes.plot(x, y, marker, color=colours[f.cell], markersize=6)
        fair = sorted((x, y) for x, y, f in points if not f.facts["leaks"])
        front, best = [], math.inf
        for x, y in fair:
            if y < best:
                front.append((x, y))
                best = y
        if len(front) > 1:
            axes.step(*zip(*front, strict=True), where="post", color=GREY, linewidth=1, zorder=0)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(0.15)
        tidy(axes)
    panels[0].set_ylabel("held-out bits per byte")
    legend(panels[-1], findings, colours)
    figure.suptitle("Loss against cost; the line joins cells that no cheaper one beats")
    return figure


def scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def tuning(sweep: Sweep, findings: Sequence[Finding]) -> Figure | None:
    """What tuning tried: validation bits per byte over each tuned setting."""
    names = list(sweep.plan["tuning"]["ranges"])
    rows = [row for row in sweep.rows if row["phase"] == "tuning"]
    if not names or not rows:
        return None
    colours = colours_of(findings)
    figure = Figure(figsize=(1.5 + 4.5 * len(names), 3.4))
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for f in back_to_front(findings, colours):
            own = [r for r in rows if r["cell"] == f.cell and name in r["tuned"]]
            good = sorted(
                (r["tuned"][name], r["validation_bits_per_byte"])
                for r in own
                if r["status"] == "finished"
            )
            if not good:
                continue
            axes.plot(*zip(*good, strict=True), ".-", color=colours[f.cell], linewidth=0.8)
            axes.plot(*min(good, key=lambda point: point[1]), "o", color=colours[f.cell])
            for row in own:
                if row["status"] != "finished":
                    axes.axvline(row["tuned"][name], color=colours[f.cell], linestyle=":")
        if sweep.plan["tuning"]["ranges"][name][2] == "log":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name)
        axes.set_ylabel("validation bits per byte")
        tidy(axes)
    legend(panels[-1], findings, colours)
    figure.suptitle("What tuning tried; a large dot is chosen, a dotted line has failed")
    return figure


def legend(axes, findings: Sequence[Finding], colours: dict[str, str]) -> None:
    """The cells by colour, beside the last panel; those that share grey on one line."""
    own = [f for f in findings if colours[f.cell] != GREY]
    handles = [
        Line2D([], [], color=colours[f.cell], linestyle="--" if f.facts["leaks"] else "-")
        for f in own
    ]
    labels = [short(f.cell) for f in own]
    if others := len(findings) - len(own):
        handles.append(Line2D([], [], color=GREY))
        labels.append(f"{others} others")
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def tidy(axes) -> None:
    """Only the two axes that are read, and a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EEEEEE", linewidth=0.6)
    axes.set_axisbelow(True)
