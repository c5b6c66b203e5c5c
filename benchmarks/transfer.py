"""Where the best learning rate lies as the width grows: a picture of `sweeps/transfer.gin`.

moe sweep --gin_file=sweeps/transfer.gin --folder=runs/transfer --run
python benchmarks/transfer.py --folder=runs/transfer --plot=OUT.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from moe.reports.figures import COLOURS
from moe.reports.read import Sweep, read

RATE = "AdamW.learning_rate"


def tried(sweep: Sweep, arm: str, width: str) -> list[tuple[float, float]]:
    """(learning rate, validation bits per byte) of an arm's trials at a width, by rate."""
    rows = [r for r in sweep.rows if (r["phase"], r["arm"]) == ("tuning", arm)]
    own = [r for r in rows if r["axes"]["width"] == width and r["status"] == "finished"]
    return sorted((r["tuned"][RATE], r["validation_bits_per_byte"]) for r in own)


def draw(sweep: Sweep, path: Path) -> None:
    """Loss over the rate, a panel for each arm and a line for each width."""
    arms = list(dict.fromkeys(row["arm"] for row in sweep.rows))
    widths = list(dict.fromkeys(row["axes"]["width"] for row in sweep.rows))
    figure, panels = plt.subplots(1, len(arms), figsize=(9, 3.8), sharey=True, layout="constrained")
    for axes, arm in zip(panels, arms, strict=True):
        for width, colour in zip(widths, COLOURS, strict=False):
            found = tried(sweep, arm, width)
            axes.plot(*zip(*found, strict=True), ".-", color=colour, label=f"width {width}")
            best = min(found, key=lambda point: point[1])
            axes.plot(*best, "o", color=colour, markersize=9)
            axes.axvline(best[0], color=colour, linewidth=0.7, linestyle=":")
        axes.set(title=arm, xlabel="learning rate", xscale="log", ylim=(2.65, 3.25))
        axes.set_xticks([0.003, 0.01, 0.03, 0.1], ["0.003", "0.01", "0.03", "0.1"])
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("validation bits per byte")
    panels[-1].legend(frameon=False, title="large dot: the best")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True)
    parser.add_argument("--plot", type=Path, required=True)
    given = parser.parse_args()
    draw(read(given.folder), given.plot)


if __name__ == "__main__":
    main()
