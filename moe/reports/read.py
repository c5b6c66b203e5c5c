"""A sweep's folder as values: its plan, the rows of its trials, and their curves."""

from collections.abc import Iterator, Sequence
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from moe import received
from moe.errors import UserError
from moe.statistics.comparison import Estimate, estimate
from moe.sweeps.record import NUMBER, VERSION, Row, SweepFolder, check_row, read_lines

PLAN: dict[str, received.Kind] = {
    **dict.fromkeys(("name", "question", "baseline", "match"), str),
    **{"delta": float, "tuning": dict, "seeds": list, "cells": list},
}
TUNING: dict[str, received.Kind] = {"trials": int, "ranges": dict}
CELL: dict[str, received.Kind] = {
    **dict.fromkeys(("cell", "baseline", "causality", "decoding"), str),
    **dict.fromkeys(("parameters_total", "parameters_active", "flops_per_token"), float),
    **{"router": (str, type(None)), "residual": float, "leaks": bool},
}
CURVE: dict[str, received.Kind] = {
    **{"trial": str, "step": float},
    **dict.fromkeys(("tokens", "flops", "seconds"), NUMBER),
}
# Where they are there at all.
OF_CELL = ("decode_parameters",)
OF_ROW = (
    *("training_rule_bits_per_byte", "train_seconds", "tokens_per_second"),
    *("effective_utilisation", "peak_memory_bytes", "dropped", "max_over_mean_load", "steps"),
)
OF_CURVE = ("bits_per_byte", "load/max_over_mean", "load/dropped", "router/entropy")
MOST = {"cells": 1000, "ranges": 100, "layers": 1000}  # or no figure would hold them


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep's folder holds.

    Attributes:
        plan: the content of sweep.json.
        rows: of all trials that have ended.
        curves: rows of logged steps, by trial.
    """

    path: Path
    plan: dict[str, Any]
    rows: list[Row]
    curves: dict[str, list[Row]]

    @property
    def cells(self) -> list[dict[str, Any]]:
        return self.plan["cells"]

    def of(self, cell: str, phase: str) -> list[Row]:
        """The rows of a cell in a phase, by number."""
        rows = [row for row in self.rows if row["cell"] == cell and row["phase"] == phase]
        return sorted(rows, key=lambda row: row["number"])

    def finished(self, cell: str, phase: str = "report") -> list[Row]:
        """Those that have finished."""
        return [row for row in self.of(cell, phase) if row["status"] == "finished"]

    def failed(self, cell: str) -> list[Row]:
        """Its reported runs that did not finish; its tuning's where it left nothing to report."""
        reported, tried = self.of(cell, "report"), self.of(cell, "tuning")
        asked = self.plan["tuning"]["trials"] if self.plan["tuning"]["ranges"] else 0
        if not reported and 0 < asked <= len(tried) and not self.finished(cell, "tuning"):
            return tried
        return [row for row in reported if row["status"] != "finished"]

    @property
    def missing(self) -> int:
        """How many reported runs have not ended, of cells that have any to run."""
        names = [cell["cell"] for cell in self.cells]
        reported = {name: len(self.of(name, "report")) for name in names}
        left = [name for name in names if reported[name] or not self.failed(name)]
        return sum(max(0, len(self.plan["seeds"]) - reported[name]) for name in left)


def plain(text: str) -> str:
    """The text on one line, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split("\n")))


def cleaned(value: Any) -> Any:
    """JSON with `plain` text and keys, and null for numbers that are not finite.

    Nothing that is shown can move a terminal's cursor.
    """
    if isinstance(value, dict):
        return {plain(key): cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        # Most are long lists of whole numbers, for which a call each would take minutes.
        return [item if type(item) is int else cleaned(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return plain(value) if isinstance(value, str) else value


def lines(path: Path) -> Iterator[Row]:
    """The rows of a table, `cleaned`; UserError where it isn't one."""
    return map(cleaned, read_lines(path))


def check_optional(row: Row, names: Sequence[str], where: Path) -> None:
    """UserError where a row has one of these fields and no number in it."""
    received.check(row, {name: NUMBER for name in names if name in row}, str(where))


def check_plan(plan: Row, where: Path) -> None:
    """UserError unless the plan has all that a report shows, in sizes that it can show."""
    received.check(plan, PLAN, str(where))
    received.check(plan["tuning"], TUNING, f"{where}: tuning")
    ranges = plan["tuning"]["ranges"]
    for name, size in (("cells", len(plan["cells"])), ("ranges", len(ranges))):
        if size > MOST[name]:
            raise UserError(f"{where}: {size:,} {name}; a report has at most {MOST[name]:,}")
    for name, span in ranges.items():
        fine = isinstance(span, list) and len(span) == 3
        if not fine or not all(received.is_of(end, float) for end in span[:2]):
            raise UserError(f"{where}: damaged: range {name!r} is {received.shown(span)}")
    for cell in plan["cells"]:
        received.check(cell, CELL, str(where))
        check_optional(cell, OF_CELL, where)
    if not plan["cells"]:
        raise UserError(f"{where}: damaged: no cells")
    names = [cell["cell"] for cell in plan["cells"]]
    for cell in plan["cells"]:
        if not cell["cell"] or names.count(cell["cell"]) > 1:
            raise UserError(f"{where}: damaged: {cell['cell'][:40]!r} names no cell, or two")
        if cell["baseline"] not in names:
            raise UserError(f"{where}: damaged: no cell is the baseline {cell['baseline'][:40]!r}")


def check_rows(rows: Sequence[Row], where: Path) -> None:
    """UserError unless the rows of trials have what a report compares."""
    tuned, seen = {}, set()
    for row in rows:
        check_row(row, where)
        check_optional(row, OF_ROW, where)
        if row["trial"] in seen:
            raise UserError(f"{where}: damaged: two rows of the trial {row['trial'][:40]}")
        seen.add(row["trial"])
        if row["bits_per_byte"] is None:
            continue
        if row["phase"] != "tuning" and not (row.get("steps") or 0) > 0:
            raise UserError(f"{where}: damaged: {row['trial'][:40]} has finished after no steps")
        both = [row["document_bits"] or [], row["document_bytes"] or []]
        if all(both) and len(both[0]) != len(both[1]):
            raise UserError(f"{where}: damaged: {row['trial'][:40]} has bits of other documents")
        if not all(received.is_of(one, float) for values in both for one in values):
            raise UserError(f"{where}: damaged: {row['trial'][:40]} has documents without numbers")
        if any(size <= 0 for size in both[1]):
            raise UserError(f"{where}: damaged: {row['trial'][:40]} has documents of no bytes")
        key = row["cell"], row["phase"]
        if (
            row["phase"] == "tuning"
            and tuned.setdefault(key, row["tuned"].keys()) != row["tuned"].keys()
        ):
            raise UserError(f"{where}: damaged: {row['trial'][:40]} has tuned other settings")


def check_curve(line: Row, where: Path) -> None:
    """UserError unless a row is that of a logged step."""
    received.check(line, CURVE, str(where))
    check_optional(line, OF_CURVE, where)
    if any((line[name] or 0) < 0 for name in ("step", "tokens", "flops", "seconds")):
        raise UserError(f"{where}: damaged: a step with negative numbers: {received.shown(line)}")


def check_routing(line: Row, where: Path) -> tuple[int, ...]:
    """The number of layers and experts of a line of routing.jsonl.

    Raises:
        UserError: it lacks the experts' counts, or they are no rectangle of numbers.
    """
    kinds: dict[str, received.Kind] = {"count": list, "kept": list}
    received.check(line, kinds, str(where))
    shapes = []
    for name in kinds:
        try:
            values = np.array(line[name] if len(line[name]) <= MOST["layers"] else ())
        except (ValueError, TypeError, OverflowError):
            values = np.empty(0)
        numbers = values.dtype.kind in "if" and np.isfinite(values).all()
        if not numbers or values.ndim != 2 or not values.size:
            raise UserError(f"{where}: damaged: {name!r} holds no layers of experts' counts")
        shapes.append(values.shape)
    entropy = cleaned(line.get("entropy", [0.0] * shapes[0][0]))
    fine = isinstance(entropy, list) and all(received.is_of(one, NUMBER) for one in entropy)
    if shapes[0] != shapes[1] or not fine or len(entropy) != shapes[0][0]:
        raise UserError(f"{where}: damaged: a step whose layers are not the same ones throughout")
    return shapes[0]


def scored(row: Row) -> Row:
    """The row; one that ended without a finite loss has diverged, whatever it says.

    Raises:
        UserError: it has a loss and no bits of single documents, over which intervals are.
    """
    if row["status"] != "finished":
        return row
    values = (row["bits_per_byte"], row["validation_bits_per_byte"])
    if any(value is None for value in values):
        return row | {"status": "diverged", "reason": "its held-out loss is not finite"}
    if row["phase"] != "tuning" and not (row["document_bits"] and row["document_bytes"]):
        raise UserError(f"{row['trial']} has no bits of single documents: nothing can be compared")
    return row


def read(path: str) -> Sweep:
    """The sweep in a folder.

    Raises:
        UserError: no sweep there, none of whose runs has ended, or rows of another version.
    """
    folder = SweepFolder(Path(path))
    plan = folder.read_plan()
    if plan is None:
        raise UserError(f"{path} holds no sweep: there is no sweep.json in it")
    plan, rows = cleaned(plan), [*lines(folder.trials)]
    check_plan(plan, folder.plan)
    other = [row.get("version") for row in rows if row.get("version") != VERSION]
    if other:
        shown = min(map(received.shown, other))
        raise UserError(f"{folder.trials} has rows of version {shown}, not {VERSION}")
    check_rows(rows, folder.trials)
    rows = [*map(scored, rows)]
    if not any(row["phase"] == "report" for row in rows):
        raise UserError(f"{path}: no reported run has ended yet; moe sweep --list shows what has")
    curves: dict[str, list[Row]] = {}
    for line in lines(folder.curves):
        check_curve(line, folder.curves)
        curves.setdefault(line["trial"], []).append(line)
    return Sweep(folder.path, plan, rows, curves)


def routing_lines(sweep: Sweep, row: Row) -> list[Row]:
    """The lines of the routing.jsonl of a trial's run; none where its folder is gone.

    Raises:
        UserError: they are damaged.
    """
    path = SweepFolder(sweep.path).trial(row["trial"]).run / "routing.jsonl"
    found, shapes = [], set()
    for line in read_lines(path):
        shapes.add(check_routing(line, path))
        found.append(cleaned(line))
    if len(shapes) > 1:
        raise UserError(f"{path}: damaged: a step whose layers are not the same ones throughout")
    return found


def bits_of(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Bits of each document by each run (S, M), and the documents' bytes (M,).

    Raises:
        UserError: the runs have scored different documents.
    """
    first = rows[0]["document_bytes"]
    for row in rows:
        if row["document_bytes"] != first:
            raise UserError(
                f"{row['trial']} and {rows[0]['trial']} have scored different documents; compare "
                "runs on one text"
            )
    return np.array([row["document_bits"] for row in rows]), np.array(first)


def difference(ours: Sequence[Row], theirs: Sequence[Row]) -> Estimate:
    """The estimated difference in bits per byte of runs to as many others, pair by pair.

    Raises:
        UserError: as `bits_of`.
    """
    bits_SM, bytes_M = bits_of([*ours, *theirs])
    return estimate(bits_SM[: len(ours)] - bits_SM[len(ours) :], bytes_M)
