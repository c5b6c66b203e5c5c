"""Plots of a run: its loss, the load of its experts, and the tokens that these process."""

from pathlib import Path
import re

import numpy as np

from moe.analysis.specialisation import TokenTable, read_metrics


def plot_loss(axis, workdir: str | Path, baselines: dict[str, float] | None = None) -> None:
    """Plot training and validation bits per byte by step.

    baselines: bits per byte that are drawn as lines, such as those of compressors.
    """
    lines = [line for line in read_metrics(workdir) if "bits_per_byte" in line]
    mark = "o" if len(lines) < 3 else None  # a line needs two points
    steps, values = [m["step"] for m in lines], [m["bits_per_byte"] for m in lines]
    axis.plot(steps, values, marker=mark, label="training")
    held_out = [line for line in read_metrics(workdir) if "val/bpb" in line]
    if held_out:
        axis.plot([m["step"] for m in held_out], [m["val/bpb"] for m in held_out], "o", label="val")
    for name, value in (baselines or {}).items():
        axis.axhline(value, color="grey", linewidth=0.8, linestyle=":")
        axis.text(axis.get_xlim()[1], value, f" {name}", color="grey", va="center", fontsize=8)
    axis.set(xlabel="step", ylabel="bits per byte", title="Loss")
    axis.legend(frameon=False)


def plot_load(axis, workdir: str | Path, last: int = 10) -> None:
    """Plot each expert's load, over its layer's mean load, in the `last` logged steps."""
    lines = read_metrics(workdir, "routing.jsonl")[-last:]
    axis.set(xlabel="expert", ylabel="sparse layer", title="Load (1 = the mean)")
    if not lines:
        axis.text(0.5, 0.5, "no step was logged", ha="center", va="center")
        return
    count_LE = np.sum([line["count"] for line in lines], axis=0)
    load_LE = count_LE / count_LE.mean(1, keepdims=True)
    image = axis.imshow(load_LE, cmap="coolwarm", vmin=0, vmax=2, aspect="auto")
    axis.set_xticks(range(load_LE.shape[1]), minor=load_LE.shape[1] > 16)
    axis.set_yticks(range(len(load_LE)))
    if load_LE.size <= 128:
        for (layer, expert), value in np.ndenumerate(load_LE):
            axis.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axis.figure.colorbar(image, ax=axis, fraction=0.04)


def write_tokens(axis, table: TokenTable, layer: int, most_experts: int = 16) -> None:
    """Write the tokens with the largest share of their gates at each expert of a layer."""
    axis.axis("off")
    axis.set_title(
        f"Tokens most faithful to each expert of sparse layer {layer}", loc="left", fontsize=11
    )
    experts = min(table.load_LVE.shape[2], most_experts)
    for expert in range(experts):
        tokens = "   ".join(visible(token) for token in table.top(layer, expert))
        line = f"expert {expert}:  {tokens}"
        place = 1 - (expert + 1) / (experts + 1)
        text = axis.text(0, place, line[:72], family="monospace", fontsize=9)
        text.set_in_layout(False)  # a long line must not push the other panels


def visible(token: str) -> str:
    """The token with spaces and line breaks as visible signs, safe for matplotlib.

    More than three spaces are written as their number.
    """
    shown = re.sub(" {4,}", lambda spaces: f"·×{len(spaces[0])}", token)
    shown = shown.replace("\n", "↵").replace(" ", "·").replace("\t", "→")
    return "".join(c if c.isprintable() else "?" for c in shown).replace("$", r"\$")


def picture(workdir: str | Path, path: Path, table: TokenTable, baselines=None) -> None:
    """Write a PNG with loss, load, and the tokens of the first and the last sparse layer."""
    import matplotlib

    matplotlib.use("agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    plot_loss(axes[0, 0], workdir, baselines)
    plot_load(axes[0, 1], workdir)
    write_tokens(axes[1, 0], table, layer=0)
    write_tokens(axes[1, 1], table, layer=len(table.load_LVE) - 1)
    figure.savefig(path, dpi=110)
