"""`moe report`: what sweeps have found, as a page and a table."""

from pathlib import Path

from moe.reports import page
from moe.reports.findings import find, sentence
from moe.reports.read import read


def run(flags) -> int:
    """Write report.html and report.md of the folders' sweeps, and print what was found."""
    sweeps = [read(folder) for folder in flags.folders]
    paths = page.write(sweeps, Path(flags.out or flags.folders[0]))
    for sweep in sweeps:
        print(f"{sweep.plan['question']}\n  {sentence(sweep, find(sweep))}")
    print(f"written to   {', '.join(map(str, paths))}")
    return 0
