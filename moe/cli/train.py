"""`moe train`: trains a run from its config, and prints its results."""

import json
from pathlib import Path
import shutil
from typing import Any

from moe.errors import attempted, printable
from moe.machine import processes
from moe.runs.storage.folder import RunFolder


def run(flags) -> int:
    """Train or continue; returns 0, or 128 + the signal where one has interrupted the run."""
    from moe.cli import config

    config.bind(flags.gin_file, flags.gin_bindings)
    processes.join(flags.processes, flags.coordinator, flags.process)
    with processes.together():
        return _train(flags)


def _train(flags) -> int:
    from moe.runs.train import train
    from moe.training.run_spec import RunSpec

    summary = train(RunSpec(), flags.workdir)
    if summary.get("interrupted"):
        return 128 + summary["signal"] if summary["signal"] else 0
    if not processes.is_first():
        return 0
    samples = summary.pop("samples")
    if flags.json:
        Path(flags.json).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    folder = RunFolder(flags.workdir)
    print(attempted("report", print, report, summary, samples, folder) or f"see {folder.summary}")
    return 0


def report(summary: dict[str, Any], samples: list[str], folder: RunFolder) -> str:
    """The results of a run, as text for the screen."""
    lines = [
        *bars(summary),
        "",
        f"parameters   {summary['parameters_total']:,} total, "
        f"{summary['parameters_active']:,} active for a token",
        f"speed        {summary['tokens_per_second']:,.0f} tokens/s; "
        f"{summary['train_seconds']:.0f} s of training; "
        f"this command took {summary['wall_seconds']:.0f} s",
        f"utilisation  {summary['effective_utilisation']:.2f} of this machine's measured "
        f"{summary['matmul_peak_flops'] / 1e9:,.0f} GFLOP/s (kept work only; "
        f"{summary['utilisation']:.2f} with what was dropped)",
        f"memory       {summary['peak_memory_bytes'] / 2**20:,.0f} MiB at its peak",
        f"written to   {folder.path}: {', '.join(sorted(_files(folder)))}",
    ]
    if folder.picture.exists():
        lines.append(f"to look at   {folder.picture}: the loss, the loads, what each expert reads")
    if samples:
        width = min(shutil.get_terminal_size().columns, 100)
        shown = samples[0].strip("\n").splitlines()[:16]
        lines += ["", "a sample:", *("  | " + line[:width] for line in shown)]
    return printable("\n".join(lines))


def bars(summary: dict[str, Any]) -> list[str]:
    """Bars of bits per byte, of the model and the baselines.

    A masked objective has no baselines: it sees both sides of a token.
    """
    if summary["objective"] == "MaskedToken":
        value = f"{summary['val_bits_per_byte']:.3f}"
        return [
            "",
            f"bits per byte of hidden tokens of held-out text: {value} (lower is better; each is "
            "seen from both sides, which no compressor does)",
        ]
    figures = {"this model": summary["val_bits_per_byte"], **summary["baselines"]}
    widest = max(figures.values()) or 1.0
    lines = ["", "bits per byte of held-out text (lower is better)"]
    for name, value in sorted(figures.items(), key=lambda figure: figure[1]):
        bar = "#" * round(40 * value / widest)
        lines.append(f"  {name:<12}{value:6.3f}  {bar}")
    scored, there = summary["val_bytes"], summary["held_out_bytes"]
    if scored < there and len(figures) > 1:
        lines.append(f"  (this model on {scored:,} of {there:,} held-out bytes, the rest on all)")
    return lines


def _files(folder: RunFolder) -> list[str]:
    """The names of the run's visible files and folders."""
    return [
        path.name + ("/" if path.is_dir() else "")
        for path in folder.path.iterdir()
        if not path.name.startswith(".")
    ]
