"""Loads and drops of each layer's experts, and routers' entropies, at equal shares of training.

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
PANELS = (  # a label, and the value at the scale's lower end
    ("fullest expert's load / mean", 1.0),
    ("share of assignments dropped", 0.0),
    ("entropy of the router in nats", 0.0),
)


def by_layer(lines: Sequence[Row]) -> np.ndarray:
    """The fullest expert's load over the mean, the share dropped, the entropy: (3, L, Q).

    Each is of the tenth of training that ends at a share; NaN where it was not written.

    lines: of a run's routing.jsonl.
    """
    found_Q3L = []
    for share in SHARES:
        end = max(1, round(share * len(lines)))
        part = lines[max(0, end - max(1, len(lines) // 10)) : end]
        count_LE, kept_LE = (np.sum([row[name] for row in part], 0) for name in ("count", "kept"))
        total_L = np.maximum(count_LE.sum(1), 1)
        load_L = count_LE.max(1) * count_LE.shape[1] / total_L
        unknown_L = [np.nan] * len(load_L)
        entropy_L = np.mean(np.array([row.get("entropy", unknown_L) for row in part], float), 0)
        found_Q3L.append([load_L, 1 - kept_LE.sum(1) / total_L, entropy_L])
    return np.transpose(found_Q3L, (1, 2, 0))


def layers(sweep: Sweep, findings: Sequence[Finding]) -> Figure | None:
    """A row for each cell that routes: colours by layer, and within a layer over training."""
    found = {}
    for f in findings:
        runs = [routing_lines(sweep, row) for row in sweep.finished(f.cell)]
        if seeds := [by_layer(lines) for lines in runs if lines]:
            found[f.cell] = np.mean(seeds, 0)
    if not found:
        return None
    most = max(three.shape[1] for three in found.values())
    size = (max(12, 3 + 1.6 * most), 1.8 + 0.27 * len(found))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for index, (axes, (label, low)) in enumerate(zip(panels, PANELS, strict=True)):
        shown = np.full((len(found), most * len(SHARES)), np.nan)
        for row, three in enumerate(found.values()):
            values = three[index].ravel()
            shown[row, : len(values)] = values
        high = float(np.nanmax(shown, initial=low + 0.01))
        image = axes.pcolormesh(shown, cmap="cividis", vmin=low, vmax=high)
        for layer in range(1, most):
            axes.axvline(layer * len(SHARES), color="white", linewidth=2)
        axes.set_xticks([(n + 0.5) * len(SHARES) for n in range(most)], range(1, most + 1))
        axes.set_xlabel("routed layer")
        axes.set_title(label, fontsize="medium")
        bar = figure.colorbar(image, ax=axes)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        axes.spines[:].set_visible(False)
    panels[0].set_yticks(np.arange(len(found)) + 0.5, [short(name) for name in found])
    panels[0].invert_yaxis()
    figure.suptitle(
        "Routing by layer; the columns of a layer are quarters of training, left to right"
    )
    return figure
