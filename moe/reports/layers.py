"""Loads and drops of each layer's experts, at equal shares of training.

L layers, E experts, Q shares of training.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure
import numpy as np

from moe.reports.figures import short
from moe.reports.findings import Finding
from moe.reports.read import Sweep, routing_lines
from moe.sweeps.record import Row

SHARES = (0.25, 0.5, 0.75, 1.0)


def by_layer(lines: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """The fullest expert's load over the mean, and the share dropped: (L, Q) each.

    Each is of the tenth of training that ends at a share.

    lines: of a run's routing.jsonl.
    """
    load_QL, dropped_QL = [], []
    for share in SHARES:
        end = max(1, round(share * len(lines)))
        part = lines[max(0, end - max(1, len(lines) // 10)) : end]
        count_LE, kept_LE = (np.sum([row[name] for row in part], 0) for name in ("count", "kept"))
        total_L = np.maximum(count_LE.sum(1), 1)
        load_QL.append(count_LE.max(1) * count_LE.shape[1] / total_L)
        dropped_QL.append(1 - kept_LE.sum(1) / total_L)
    return np.transpose(load_QL), np.transpose(dropped_QL)


def layers(sweep: Sweep, findings: Sequence[Finding]) -> Figure | None:
    """A row for each cell that routes: colours by layer, and within a layer over training."""
    found = {}
    for f in findings:
        runs = [routing_lines(sweep, row) for row in sweep.finished(f.cell)]
        if seeds := [by_layer(lines) for lines in runs if lines]:
            found[f.cell] = np.mean(seeds, 0)
    if not found:
        return None
    most = max(pair.shape[1] for pair in found.values())
    size = (max(9, 3 + 1.1 * most), 1.8 + 0.27 * len(found))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = ("fullest expert's load / mean", "share of assignments dropped")
    for index, (axes, label) in enumerate(zip(panels, names, strict=True)):
        shown = np.full((len(found), most * len(SHARES)), np.nan)
        for row, pair in enumerate(found.values()):
            values = pair[index].ravel()
            shown[row, : len(values)] = values
        low = 1.0 if index == 0 else 0.0
        high = max(float(np.nanmax(shown)), low + 0.01)
        image = axes.pcolormesh(shown, cmap="cividis", vmin=low, vmax=high)
        for layer in range(1, most):
            axes.axvline(layer * len(SHARES), color="white", linewidth=2)
        axes.set_xticks([(n + 0.5) * len(SHARES) for n in range(most)], range(1, most + 1))
        axes.set_xlabel("routed layer")
        bar = figure.colorbar(image, ax=axes, label=label)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        axes.spines[:].set_visible(False)
    panels[0].set_yticks(np.arange(len(found)) + 0.5, [short(name) for name in found])
    panels[0].invert_yaxis()
    figure.suptitle(
        "Routing by layer; the columns of a layer are quarters of training, left to right"
    )
    return figure
