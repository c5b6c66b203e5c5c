"""The report as one HTML page without scripts or requests, and its table as Markdown."""

from collections.abc import Sequence
import html
from pathlib import Path

import numpy as np

from moe.reports import figures
from moe.reports.findings import (
    Finding,
    Multiplier,
    control,
    find,
    sentence,
    shown_difference,
    shuffled,
)
from moe.reports.layers import layers
from moe.reports.read import Sweep

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
p, li { overflow-wrap: anywhere }
h2 { margin-top: 2.5rem } svg { max-width: 100%; height: auto }
p.finding { font-size: 1.2rem; border-left: 4px solid #0072B2; padding-left: 1rem }
table { border-collapse: collapse; font-size: 13px } .wide { overflow-x: auto }
td, th { padding: 3px 10px; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
"""
HEADER = (
    *("cell", "verdict", "bits per byte [95 %]", "difference [95 %]", "compute", "time"),
    *("seeds", "parameters", "active", "tokens/s", "utilisation", "max/mean load", "dropped"),
    *("training rule better by", "causality"),
)
DECODING = ("cell", "router", "rule")
TUNED = ("cell", "tried", "failed", "chosen", "at the edge of what was tried")


def table(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    """The rows of the table, without the header."""
    return [row_of(finding) for finding in findings]


def row_of(f: Finding) -> tuple[str, ...]:
    """A cell as texts."""
    mean = "" if not f.values_S else f"{np.mean(f.values_S):.4f}"
    if f.bits is not None:
        low, high = f.bits.interval()
        mean += f" [{low:.4f}, {high:.4f}]"
    seeds = f"{len(f.values_S)}" + (f" ({len(f.failed)} failed)" if f.failed else "")
    return (
        f.cell,
        f.word,
        mean,
        shown_difference(f) if f.verdict else "",
        times(f.compute),
        times(f.time),
        seeds,
        f"{f.facts['parameters_total']:,}",
        f"{f.facts['parameters_active']:,}",
        metric(f, "tokens_per_second", ",.0f"),
        metric(f, "effective_utilisation", ".2f"),
        metric(f, "max_over_mean_load", ".2f"),
        metric(f, "dropped", ".1%"),
        "" if f.leak is None else f"{f.leak:+.4f}",
        f.facts["causality"],
    )


def metric(f: Finding, name: str, form: str) -> str:
    return format(f.means[name], form) if name in f.means else ""


def times(multiplier: Multiplier | None) -> str:
    """A multiplier with its mark and interval."""
    if multiplier is None:
        return ""
    text = f"{multiplier.mark}{multiplier.value:.2f}x"
    if np.isfinite(multiplier.low):
        text += f" [{multiplier.low:.2f}, {multiplier.high:.2f}]"
    return text


def markdown(sweeps: Sequence[Sweep]) -> str:
    """Finding, table and notes of each sweep."""
    parts = []
    for sweep in sweeps:
        findings = find(sweep)
        rows = [HEADER, ("---",) * len(HEADER), *table(findings)]
        lines = ["| " + " | ".join(map(unmarked, row)) + " |" for row in rows]
        said = [unmarked(note) for note in notes(sweep, findings)]
        parts += [f"## {unmarked(sweep.plan['question'])}", unmarked(sentence(sweep, findings))]
        parts += ["\n".join(lines), "\n".join(f"- {note}" for note in said)]
    return "\n\n".join(parts) + "\n"


def unmarked(text: str) -> str:
    """The text without marks that would end a Markdown cell or begin an HTML element."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def page(sweeps: Sequence[Sweep]) -> str:
    """The report as HTML."""
    title = html.escape(", ".join(sweep.plan["name"] for sweep in sweeps))
    body = "".join(map(section, sweeps))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


def section(sweep: Sweep) -> str:
    """One sweep's part of the page."""
    findings = find(sweep)
    drawn = [
        figures.answer(sweep, findings) if any(f.verdict for f in findings) else None,
        figures.curves(sweep, findings),
        figures.routing(sweep, findings),
        layers(sweep, findings),
        figures.pareto(findings),
        figures.tuning(sweep, findings),
    ]
    first, *others = [figures.as_svg(figure) if figure else "" for figure in drawn]
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes(sweep, findings))
    return (
        f"<h1>{html.escape(sweep.plan['question'])}</h1>\n"
        f'<p class="finding">{html.escape(sentence(sweep, findings))}</p>\n{first}\n'
        f'<h2>The table</h2><div class="wide">{html_table(table(findings))}</div>\n'
        f"<h2>How far this can be trusted</h2><ul>{listed}</ul>\n"
        f"<h2>More figures</h2>{''.join(f'<p>{svg}</p>' for svg in others if svg)}\n"
        f"<h2>What tuning chose</h2>{html_table(tuned(sweep, findings), TUNED)}\n"
        f"<h2>How each arm decodes</h2>{html_table(decoding(findings), DECODING)}\n"
    )


def decoding(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    """Cell, router and the rule by which it decodes."""
    return [(f.cell, f.facts["router"] or "dense", f.facts["decoding"]) for f in findings]


def tuned(sweep: Sweep, findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    """Cell, trials of its tuning, those that failed, the values reported with, and edges."""
    rows = []
    for f in findings:
        tried, reported = sweep.of(f.cell, "tuning"), sweep.of(f.cell, "report")
        failed = sum(row["status"] != "finished" for row in tried)
        chosen = reported[0]["tuned"].items() if reported else ()
        values = ", ".join(f"{name} = {value:.4g}" for name, value in chosen)
        edges = ", ".join(f"{name}: {side}" for name, side in f.edges.items())
        rows.append((f.cell, f"{len(tried)}", f"{failed}", values, edges))
    return rows


def html_table(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    """Rows as an HTML table, escaped."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f"<table><tr>{head}</tr>\n{lines}</table>"


def notes(sweep: Sweep, findings: Sequence[Finding]) -> list[str]:
    """What a reader should know before believing the table."""
    plan = sweep.plan
    found = [
        matched(sweep, findings),
        tuned_by(sweep),
        "Intervals are Student's over seeds and documents, paired by seed with the baseline; "
        "differences, and equivalences, each hold 5 % over all ranked cells (Holm). Equivalent: "
        f"two one-sided tests within {plan['delta']:g} bits per byte.",
        "compute and time: how many times a cell's FLOPs or seconds the baseline needs for the "
        "same training loss, by its own curve; ~ where that curve had to be extended, < and > "
        "where it is too far from the loss to say more. Amid a "
        "schedule the loss is above that of a run which ends there: these say too much.",
        control(sweep),
        shuffled(sweep),
    ]
    known = {cell["cell"] for cell in sweep.cells}
    if gone := sorted({row["cell"] for row in sweep.rows} - known):
        found.append(f"Left out, as the plan no longer has them: {', '.join(gone)}.")
    if sweep.missing:
        found.append(f"UNFINISHED: {sweep.missing} reported runs have not ended.")
    for f in findings:
        for name, side in f.edges.items():
            found.append(
                f"{f.cell}: the best {name} is the {'lowest' if side == 'low' else 'highest'} that "
                "was tried; a wider range may be better (sweep.widen)."
            )
        for row in f.failed:
            found.append(f"{row['trial']}: {row['status']}: {row['reason']}")
    tuning = [r for r in sweep.rows if r["phase"] == "tuning" and r["status"] != "finished"]
    if tuning:
        cells = ", ".join(sorted({row["cell"] for row in tuning}))
        found.append(f"{len(tuning)} tuning trials have failed, of {cells}.")
    return found


def matched(sweep: Sweep, findings: Sequence[Finding]) -> str:
    """What is equal for all cells, and how nearly, in a sentence."""
    match = sweep.plan["match"]
    if match == "nothing":
        return "Matched: nothing."
    if sweep.plan.get("matched_by") == "wall_time":
        return f"Matched: {match}, which is what each run was given."
    worst = max(abs(f.facts["residual"]) for f in findings)
    return f"Matched: {match}; the largest difference left is {worst:.2%}."


def tuned_by(sweep: Sweep) -> str:
    """How each cell was tuned, and the seeds of what is reported, in a sentence."""
    count = len(sweep.plan["seeds"])
    seeds = f"{count} fresh seed{'s' if count != 1 else ''}"
    if not tried(sweep):
        return f"Tuned: nothing; {seeds}."
    return (
        f"Tuned: {tried(sweep)} trials for every cell, chosen on other held-out "
        f"documents than those reported; {seeds}."
    )


def tried(sweep: Sweep) -> int:
    """The trials that tuned each cell, those of widened ranges included."""
    rows = (len(sweep.of(cell["cell"], "tuning")) for cell in sweep.cells)
    return max(sweep.plan["tuning"]["trials"], *rows)


def write(sweeps: Sequence[Sweep], path: Path) -> list[Path]:
    """Write report.html and report.md into a folder; returns their paths."""
    path.mkdir(parents=True, exist_ok=True)
    paths = [path / "report.html", path / "report.md"]
    paths[0].write_text(page(sweeps), encoding="utf-8")
    paths[1].write_text(markdown(sweeps), encoding="utf-8")
    return paths
