"""Held-out loss over the experts that stay, as a picture."""

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which people who see no red or no green tell apart, too.
LINES = {
    ("prune", "saliency"): ("#0072B2", "o", "-"),
    ("merge", "saliency"): ("#D55E00", "s", "--"),
    ("prune", "load"): ("#009E73", "^", "-."),
    ("merge", "load"): ("#CC79A7", "D", "--"),
    ("prune", "random"): ("#777777", "X", ":"),
    ("merge", "random"): ("#000000", "P", ":"),
}


def draw_curve(axis: Any, rows: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    """Draw a line for each method and score, which starts at the whole model."""
    axis.axhline(whole["bits_per_byte"], color="#777777", linewidth=0.7)
    for (method, by), (colour, marker, style) in LINES.items():
        own = [row for row in rows if (row["method"], row["by"]) == (method, by)]
        if not own:
            continue
        own = sorted([*own, whole], key=lambda row: row["experts"])
        x, y = ([row[name] for row in own] for name in ("experts", "bits_per_byte"))
        look = {"color": colour, "marker": marker, "linestyle": style, "linewidth": 1.3}
        axis.plot(x, y, **look, markersize=5, label=f"{method}, by {by}")
    ticks = sorted({row["experts"] for row in (*rows, whole)})
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.set_xlabel(f"experts kept in each layer, of {whole['experts']}")
    axis.set_ylabel("held-out bits per byte")
    axis.legend(frameon=False, fontsize=9)


def picture(path: Path, rows: list[dict[str, Any]], whole: dict[str, Any], name: str) -> None:
    """Write a PNG of the curves. name: of the run."""
    import matplotlib

    matplotlib.use("agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    draw_curve(axis, rows, whole)
    axis.set_title(f"{name}: experts taken away, nothing trained after", fontsize=11)
    figure.savefig(path, dpi=130)
