"""A sweep's folder as values: its plan, the rows of its trials, and their curves."""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from moe.errors import UserError
from moe.sweeps.record import VERSION, Row, SweepFolder, read_lines


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

    def cell(self, name: str) -> dict[str, Any]:
        """A cell's facts."""
        return next(cell for cell in self.cells if cell["cell"] == name)

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
    """The text without control characters, but for ends of lines."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def cleaned(value: Any) -> Any:
    """JSON with `plain` text and keys: nothing that is shown can move a terminal's cursor."""
    if isinstance(value, dict):
        return {plain(key): cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return value if value and isinstance(value[0], float | int) else [*map(cleaned, value)]
    return plain(value) if isinstance(value, str) else value


def read(path: str) -> Sweep:
    """The sweep in a folder.

    Raises:
        UserError: no sweep there, none of whose runs has ended, or rows of another version.
    """
    folder = SweepFolder(Path(path))
    plan = folder.read_plan()
    if plan is None:
        raise UserError(f"{path} holds no sweep: there is no sweep.json in it")
    plan, rows = cleaned(plan), [*map(cleaned, read_lines(folder.trials))]
    other = {row.get("version") for row in rows} - {VERSION}
    if other:
        raise UserError(
            f"{folder.trials} has rows of version {min(map(str, other))}, not {VERSION}"
        )
    if not any(row["phase"] == "report" for row in rows):
        raise UserError(f"{path}: no reported run has ended yet; moe sweep --list shows what has")
    curves: dict[str, list[Row]] = {}
    for line in map(cleaned, read_lines(folder.curves)):
        curves.setdefault(line["trial"], []).append(line)
    return Sweep(folder.path, plan, rows, curves)


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
