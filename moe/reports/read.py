"""A sweep's folder as values: its plan, the rows of its trials, and their curves."""

from collections.abc import Iterator, Sequence
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from moe.errors import UserError
from moe.statistics.comparison import Estimate, estimate
from moe.sweeps.record import VERSION, Row, SweepFolder, read_lines

PLAN = ("name", "question", "baseline", "delta", "match", "tuning", "seeds", "cells")
CELL = (
    *("cell", "baseline", "router", "parameters_total", "parameters_active", "flops_per_token"),
    *("residual", "causality", "leaks", "decoding"),
)
ROW = (
    *("trial", "cell", "phase", "number", "seed", "tuned", "status", "reason", "bits_per_byte"),
    *("validation_bits_per_byte", "document_bits", "document_bytes"),
)
CURVE = ("trial", "step", "tokens", "flops", "seconds")


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

    @property
    def missing(self) -> int:
        """How many reported runs have not ended."""
        return sum(
            max(0, len(self.plan["seeds"]) - len(self.of(cell["cell"], "report")))
            for cell in self.cells
        )


def plain(text: str) -> str:
    """The text on one line, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split("\n")))


def cleaned(value: Any) -> Any:
    """JSON with `plain` text and keys: nothing that is shown can move a terminal's cursor."""
    if isinstance(value, dict):
        return {plain(key): cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return value if value and isinstance(value[0], float | int) else [*map(cleaned, value)]
    return plain(value) if isinstance(value, str) else value


def lines(path: Path) -> Iterator[Row]:
    """The rows of a table, `cleaned`; UserError where it isn't one."""
    try:
        for row in read_lines(path):
            refuse_incomplete(row, (), path)
            yield cleaned(row)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged: {error}") from error


def refuse_incomplete(row: Any, names: Sequence[str], path: Path) -> None:
    """UserError where a row, or the plan, lacks what every one has."""
    if not isinstance(row, dict):
        raise UserError(f"{path}: damaged: {str(row)[:40]!r} where an object is expected")
    if missing := [name for name in names if name not in row]:
        raise UserError(f"{path}: damaged: no {missing[0]!r} in {str(row)[:40]}...")


def scored(row: Row) -> Row:
    """The row; one that ended without a finite loss has diverged, whatever it says.

    Raises:
        UserError: it has a loss and no bits of single documents, over which intervals are.
    """
    if row["status"] != "finished":
        return row
    values = (row["bits_per_byte"], row["validation_bits_per_byte"])
    if any(value is None or not math.isfinite(value) for value in values):
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
    refuse_incomplete(plan, PLAN, folder.plan)
    for cell in plan["cells"]:
        refuse_incomplete(cell, CELL, folder.plan)
    other = {row.get("version") for row in rows} - {VERSION}
    if other:
        raise UserError(
            f"{folder.trials} has rows of version {min(map(str, other))}, not {VERSION}"
        )
    for row in rows:
        refuse_incomplete(row, ROW, folder.trials)
    rows = [*map(scored, rows)]
    if not any(row["phase"] == "report" for row in rows):
        raise UserError(f"{path}: no reported run has ended yet; moe sweep --list shows what has")
    curves: dict[str, list[Row]] = {}
    for line in lines(folder.curves):
        refuse_incomplete(line, CURVE, folder.curves)
        curves.setdefault(line["trial"], []).append(line)
    return Sweep(folder.path, plan, rows, curves)


def routing_lines(sweep: Sweep, row: Row) -> list[Row]:
    """The lines of the routing.jsonl of a trial's run; none where its folder is gone.

    Raises:
        UserError: they are damaged.
    """
    path = SweepFolder(sweep.path).trial(row["trial"]).run / "routing.jsonl"
    found = list(lines(path))
    for line in found:
        refuse_incomplete(line, ("count", "kept"), path)
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
