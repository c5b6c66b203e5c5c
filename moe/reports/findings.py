"""What a sweep has found: each cell beside its baseline, and the finding in a sentence."""

from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import t as student

from moe.reports.read import Sweep, bits_of, difference
from moe.statistics.comparison import (
    MOST_SEEDS,
    Estimate,
    Verdict,
    estimate,
    further_seeds,
    verdicts,
)
from moe.sweeps.record import Row
from moe.sweeps.tune import edges


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """How many times a cell's budget the baseline needs for the cell's loss.

    Attributes:
        value, low, high: the mean over seeds and its 95 % interval; NaN for one seed and bounds.
        mark: "" where the baseline's own curve holds the loss; "~" where it was extended; "<" and
            ">" where it is too far and the value is a bound.
    """

    value: float
    low: float
    high: float
    mark: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """One cell.

    Attributes:
        facts: of the plan.
        bits: bits per byte over seeds and documents; None with less than two finished runs.
        values_S: bits per byte of each finished run.
        verdict: beside the baseline; None for the baseline and where it isn't ranked.
        further: seeds that would decide, as `further_seeds` says.
        failed: reported runs that did not finish; those of tuning where all of it has failed.
        compute, time: multipliers over the baseline.
        edges: tuned settings whose best value was the lowest or highest tried.
        leak: by how much the training rule is better, in bits per byte; None where not measured.
        means: of metrics over finished runs, by name.
    """

    cell: str
    facts: dict[str, Any]
    bits: Estimate | None
    values_S: list[float]
    verdict: Verdict | None
    further: int | None
    failed: list[Row]
    compute: Multiplier | None
    time: Multiplier | None
    edges: dict[str, str]
    leak: float | None
    means: dict[str, float]

    @property
    def is_baseline(self) -> bool:
        return self.facts["baseline"] == self.cell

    @property
    def word(self) -> str:
        """The verdict in a word."""
        if self.facts["leaks"]:
            return "leaks"
        if self.failed:
            return "failed" if not self.values_S else "unstable"
        if self.is_baseline:
            return "baseline"
        if not self.values_S:
            return "not run"
        return self.verdict.word if self.verdict else "undecided"


FARTHEST = math.log(4)  # that a learning curve is extended
MEANS = (
    *("train_seconds", "tokens_per_second", "effective_utilisation", "peak_memory_bytes"),
    *("dropped", "max_over_mean_load"),
)


def find(sweep: Sweep) -> list[Finding]:
    """All cells: those that may be ranked by their bits per byte, then those that may not.

    Only those that are ranked get a verdict and are of the family over which errors are held: what
    is never said can't be wrong.
    """
    differences: dict[str, Estimate] = {}
    for cell in sweep.cells:
        name, baseline = cell["cell"], cell["baseline"]
        if name != baseline and not cell["leaks"] and not sweep.failed(name):
            ours, theirs = paired(sweep, name, baseline)
            if len(ours) >= 2:
                differences[name] = difference(ours, theirs)
    family, delta = list(differences.values()), sweep.plan["delta"]
    judged = dict(zip(differences, verdicts(family, delta), strict=True))
    further = dict(zip(differences, further_seeds(family, delta), strict=True))
    found = [
        one(sweep, cell, judged.get(cell["cell"]), further.get(cell["cell"]))
        for cell in sweep.cells
    ]
    return sorted(found, key=rank)


def rank(finding: Finding) -> tuple:
    """The order of the table: ranked cells by bits per byte, then unstable, failed and leaking."""
    groups = {"unstable": 1, "failed": 2, "not run": 3, "leaks": 4}
    mean = float(np.mean(finding.values_S)) if finding.values_S else math.inf
    return groups.get(finding.word, 0), mean


def paired(
    sweep: Sweep, cell: str, baseline: str, phase: str = "report"
) -> tuple[list[Row], list[Row]]:
    """The finished runs of a cell and of its baseline with the same seeds."""
    ours = {row["seed"]: row for row in sweep.finished(cell, phase)}
    theirs = {row["seed"]: row for row in sweep.finished(baseline, phase)}
    both = sorted(ours.keys() & theirs.keys())
    return [ours[seed] for seed in both], [theirs[seed] for seed in both]


def one(
    sweep: Sweep, cell: dict[str, Any], verdict: Verdict | None, further: int | None
) -> Finding:
    """The finding of a cell."""
    name, baseline = cell["cell"], cell["baseline"]
    rows = sweep.finished(name)
    bits = estimate(*bits_of(rows)) if len(rows) >= 2 else None
    by = {"compute": "flops", "time": "seconds"}
    multipliers = {
        kind: None if name == baseline or cell["leaks"] else multiplier(sweep, name, baseline, axis)
        for kind, axis in by.items()
    }
    leaks = [
        row["bits_per_byte"] - row["training_rule_bits_per_byte"]
        for row in rows
        if row.get("training_rule_bits_per_byte") is not None
    ]
    means = {}
    for key in MEANS:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            means[key] = float(np.mean(values))
    return Finding(
        cell=name,
        facts=cell,
        bits=bits,
        values_S=[row["bits_per_byte"] for row in rows],
        verdict=verdict,
        further=further,
        failed=sweep.failed(name),
        edges=edges_of(sweep, name),
        leak=float(np.mean(leaks)) if leaks else None,
        means=means,
        **multipliers,
    )


def edges_of(sweep: Sweep, cell: str) -> dict[str, str]:
    """Tuned settings of a cell whose best value was the lowest or highest that was tried."""
    rows = sweep.of(cell, "tuning")
    scored = [r for r in rows if r["status"] == "finished"]
    if not scored:
        return {}
    best = min(scored, key=lambda row: row["validation_bits_per_byte"])
    return edges(best["tuned"], [row["tuned"] for row in rows])


def multiplier(sweep: Sweep, cell: str, baseline: str, axis: str) -> Multiplier | None:
    """The baseline's budget for the cell's last training loss, over the cell's own budget.

    Losses are means over tenths of the steps. The baseline's curve is its own after the first tenth
    of training, made to fall (`fallen`), a straight line in the logarithm of the budget between
    tenths, extended by the slope of its second half up to `FARTHEST`. The cell's loss is that
    curve's last one and the difference of both runs' last tenths, which saw the same batches: how
    hard these were cancels.

    axis: `flops` or `seconds` of the curves.
    """
    ours, theirs = paired(sweep, cell, baseline)
    logs, marks = [], set()
    for mine, other in zip(ours, theirs, strict=True):
        curve, base = (logged(sweep, row, axis) for row in (mine, other))
        if len(curve) < 10 or len(base) < 10:
            return None
        tenths, losses = smoothed(base, axis)
        apart = smoothed(curve, axis)[1][-1] - losses[-1]
        budgets, falling = fallen(tenths, losses)
        needed, mark = inverse(budgets, falling, falling[-1] + apart)
        marks.add(mark)
        logs.append(needed - math.log(curve[-1][axis]) + math.log(base[-1][axis]) - tenths[-1])
    if not logs:
        return None
    mark = next((mark for mark in ("<", ">", "~") if mark in marks), "")
    mean = float(np.mean(logs))
    half = math.nan
    if len(logs) > 1 and mark not in ("<", ">"):
        error = float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
        half = error * float(student.ppf(0.975, len(logs) - 1))
    return Multiplier(math.exp(mean), math.exp(mean - half), math.exp(mean + half), mark)


def logged(sweep: Sweep, row: Row, axis: str) -> list[Row]:
    """The rows of a trial's curve that have a loss and a budget."""
    curve = sweep.curves.get(row["trial"], [])
    return [r for r in curve if r.get(axis) and r.get("bits_per_byte") is not None]


def smoothed(curve: Sequence[Row], axis: str) -> tuple[list[float], list[float]]:
    """The log of the budget, and the loss, as means over each tenth but the first."""
    edges_ = np.linspace(len(curve) // 10, len(curve), 10).round().astype(int)
    budget, loss = [], []
    for start, end in itertools.pairwise(edges_):
        part = curve[start : max(end, start + 1)]
        budget.append(float(np.mean([math.log(row[axis]) for row in part])))
        loss.append(float(np.mean([row["bits_per_byte"] for row in part])))
    return budget, loss


def fallen(budgets: list[float], losses: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """The falling curve that is nearest in least squares: log budgets and losses of its levels.

    Losses that rise are pooled with those before. A pooled level stands at the mean of its budgets,
    the last one at the end.
    """
    fitted = np.round(isotonic_regression(losses, increasing=False).x, 9)
    starts = np.flatnonzero(np.diff(fitted, prepend=np.inf))
    at = np.add.reduceat(budgets, starts) / np.diff(starts, append=len(fitted))
    at[-1] = budgets[-1]
    return at, fitted[starts]


def inverse(budgets: np.ndarray, falling: np.ndarray, loss: float) -> tuple[float, str]:
    """The log of the budget at which a falling curve reaches a loss, with a multiplier's mark."""
    if loss > falling[0]:
        return float(budgets[0]), "<"
    if loss >= falling[-1]:
        return float(np.interp(-loss, -falling, budgets)), ""
    half = (len(budgets) - 1) // 2
    if half == len(budgets) - 1:  # it never fell
        return float(budgets[-1]), ">"
    slope = (falling[-1] - falling[half]) / (budgets[-1] - budgets[half])
    far = (loss - falling[-1]) / slope
    return float(budgets[-1] + min(far, FARTHEST)), "~" if far <= FARTHEST else ">"


def sentence(sweep: Sweep, findings: Sequence[Finding]) -> str:
    """The finding of the whole sweep, in one sentence."""
    delta, baseline = sweep.plan["delta"], sweep.plan["baseline"]
    if all(not f.values_S for f in findings if f.is_baseline):
        return f"Nothing can be said: no run of the baseline {baseline} has finished."
    ranked = [f for f in findings if f.word in ("better", "worse", "equivalent", "undecided")]
    parts = []
    for word, phrase in (
        ("better", "better"),
        ("equivalent", f"equivalent within {delta:g}"),
        ("worse", "worse"),
        ("undecided", "undecided"),
    ):
        those = [f for f in ranked if f.word == word]
        if those:
            parts.append(f"{names(those)} {'is' if len(those) == 1 else 'are'} {phrase}")
    wrong = [f for f in findings if f.word in ("unstable", "failed")]
    if wrong:
        parts.append(f"runs of {listed(wrong)} have failed")
    if absent := [f for f in findings if f.word == "not run"]:
        parts.append(f"{listed(absent)} {'has' if len(absent) == 1 else 'have'} not run yet")
    leaking = [f for f in findings if f.word == "leaks"]
    if leaking:
        one_ = len(leaking) == 1
        parts.append(
            f"{listed(leaking)} {'sees' if one_ else 'see'} the future and "
            f"{'is' if one_ else 'are'} not ranked"
        )
    if not parts:
        return "There is nothing beside the baseline to compare."
    match = sweep.plan["match"]
    equal = "with nothing matched" if match == "nothing" else f"at equal {match}"
    return f"Beside {baseline}, {equal}, in bits per byte: {'; '.join(parts)}."


def listed(findings: Sequence[Finding]) -> str:
    """The cells' names."""
    return ", ".join(f.cell for f in findings)


def names(findings: Sequence[Finding], most: int = 4) -> str:
    """Names with differences for a few cells, names or a number for more."""
    if len(findings) > most:
        shown = ", ".join(f.cell for f in findings[:most])
        return f"{shown} and {len(findings) - most} more"
    unpaired = "fewer than 2 seeds beside the baseline"
    return ", ".join(
        f"{f.cell} ({shown_difference(f) if f.verdict else unpaired})" for f in findings
    )


def shown_difference(finding: Finding) -> str:
    """The difference to the baseline in bits per byte, with its interval."""
    assert finding.verdict is not None
    found = finding.verdict.difference
    low, high = found.interval()
    text = f"{found.mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    if finding.word == "undecided":
        text += f", {what_decides(finding.further)} would decide"
    return text


def what_decides(further: int | None) -> str:
    """How many further seeds, in words, or text."""
    if further is None:
        return "more text"
    if further > MOST_SEEDS:
        return f"more than {MOST_SEEDS:,} further seeds"
    return f"{further} further seed{'s' if further != 1 else ''}"


def control(sweep: Sweep) -> str:
    """What the negative controls have come to, in a sentence."""
    rows, ran = [], False
    for baseline in dict.fromkeys(cell["baseline"] for cell in sweep.cells):
        ours, theirs = sweep.finished(baseline, "same"), sweep.finished(baseline)
        number, ran = min(len(ours), len(theirs)), ran or bool(ours)
        if number >= 2:
            rows.append((baseline, difference(ours[:number], theirs[:number])))
    if not rows and ran:
        return "The baseline against itself: fewer than 2 runs each, which show nothing."
    if not rows:
        return "The baseline was not run a second time under another name: no negative control."
    said = []
    judged = verdicts([d for _, d in rows], sweep.plan["delta"])
    for (name, found), verdict in zip(rows, judged, strict=True):
        low, high = found.interval()
        words = {"equivalent": "no difference, as it must be", "undecided": "no difference found"}
        said.append(
            f"{name} against itself with other seeds: {found.mean:+.4f} "
            f"[{low:+.4f}, {high:+.4f}], {words.get(verdict.word, 'A DIFFERENCE')}"
        )
    return "; ".join(said) + "."


def shuffled(sweep: Sweep) -> str:
    """What shuffled text has come to, in a sentence."""
    gains = []
    for cell in sweep.cells:
        ours, theirs = paired(sweep, cell["cell"], cell["baseline"], "shuffled")
        if cell["cell"] != cell["baseline"] and len(ours) >= 2:
            gains.append((cell["cell"], difference(ours, theirs)))
    if not gains:
        return "Text with shuffled tokens was not run (sweep.controls)."
    judged = verdicts([d for _, d in gains], sweep.plan["delta"])
    better = [n for (n, _), v in zip(gains, judged, strict=True) if v.word == "better"]
    if better:
        return f"On shuffled tokens {', '.join(better)} GAINS, which no router should."
    return f"On shuffled tokens none of {len(gains)} cells gains, as it must be."
