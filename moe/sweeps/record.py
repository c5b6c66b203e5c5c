"""The files of a sweep's folder: sweep.json (the plan), a folder for each trial, and the tables.

Tables are JSON lines, so that `pandas.read_json("FOLDER/trials.jsonl", lines=True)` reads them:
trials.jsonl has a row for each trial that ended, well or not, and curves.jsonl one for each logged
step of the reported runs. Both are made anew of the trials' own files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import json
from pathlib import Path, PurePosixPath
from typing import Any

from moe import received
from moe.data.tokens.sealed import write_atomically
from moe.errors import UserError

VERSION = 1
Row = dict[str, Any]
NUMBER = (float, type(None))
# What every row of trials.jsonl has.
ROW: dict[str, received.Kind] = {
    **dict.fromkeys(("trial", "cell", "phase", "status"), str),
    **dict.fromkeys(("number", "seed"), int),
    **dict.fromkeys(("bits_per_byte", "validation_bits_per_byte"), NUMBER),
    **dict.fromkeys(("document_bits", "document_bytes"), (list, type(None))),
    "tuned": dict,
    "reason": (str, type(None)),
}


@dataclasses.dataclass(frozen=True)
class TrialFolder:
    """The paths of one trial's files."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "trial.gin"

    @property
    def begun(self) -> Path:
        """The config with which the run in `run` has begun."""
        return self.path / "begun.gin"

    @property
    def identity(self) -> Path:
        """What the row says of the trial before it is run."""
        return self.path / "trial.json"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def log(self) -> Path:
        """What the trial's process prints."""
        return self.path / "log.txt"

    @property
    def result(self) -> Path:
        """The trial's row; it is there once the trial has ended for good."""
        return self.path / "result.json"

    @property
    def curves(self) -> Path:
        return self.path / "curves.jsonl"

    @property
    def outcome(self) -> Path:
        """Why the last attempt has left no result."""
        return self.path / "outcome.json"

    @property
    def attempts(self) -> Path:
        """Reasons of attempts that failed."""
        return self.path / "attempts.json"

    @property
    def claim(self) -> Path:
        """Locked by the worker that runs the trial."""
        return self.path / ".claim"


@dataclasses.dataclass(frozen=True)
class SweepFolder:
    """The paths of a sweep's files."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "sweep.json"

    @property
    def trials(self) -> Path:
        return self.path / "trials.jsonl"

    @property
    def curves(self) -> Path:
        return self.path / "curves.jsonl"

    def trial(self, name: str) -> TrialFolder:
        return TrialFolder(self.path / "trials" / name)

    def read_plan(self) -> dict[str, Any] | None:
        """What sweep.json holds; None without one.

        Raises:
            UserError: it can't be read, or is of another version.
        """
        if not self.plan.exists():
            return None
        found = received.read_json(self.plan)
        if not isinstance(found, dict) or "cells" not in found:
            raise UserError(f"{self.plan} describes no sweep; name another folder")
        if found.get("version") != VERSION:
            theirs = received.shown(found.get("version"))
            raise UserError(
                f"{self.plan} has version {theirs}, expected {VERSION}: use the "
                "release that wrote it, or another folder"
            )
        received.check(found, {"cells": list, "name": str}, str(self.plan))
        return found

    def results(self) -> dict[str, Row]:
        """The rows of the trials that have ended, by name."""
        rows = {}
        for path in sorted(self.path.glob("trials/*/*/result.json")):
            row = received.read_json(path)
            check_row(row, path)
            rows[row["trial"]] = row
        return rows

    def rows(self) -> list[Row]:
        """The rows of trials.jsonl; UserError where it is damaged."""
        rows = list(read_lines(self.trials))
        for row in rows:
            check_row(row, self.trials)
        return rows

    def table(self, say: Callable[[str], None]) -> list[Row]:
        """The rows of trials.jsonl, or those of the trials' own files where it is damaged.

        Raises:
            UserError: these are damaged, too.
        """
        try:
            return self.rows()
        except UserError as error:
            say(f"{error}; the trials' own results are read, of which --run makes the table anew")
            return list(self.results().values())

    def write_tables(self, results: Mapping[str, Row], order: Iterable[str]) -> list[Row]:
        """Write trials.jsonl and curves.jsonl of the trials that have ended; returns the rows.

        results: as of `results`. order: of the trials' names.
        """
        names = [name for name in order if name in results]
        rows = [results[name] for name in names]
        write_atomically(self.trials, as_lines(rows))
        curves = [self.trial(name).curves for name in names]
        write_atomically(self.curves, b"".join(p.read_bytes() for p in curves if p.exists()))
        return rows


def check_row(row: Any, where: Path) -> None:
    """UserError unless a value is the row of a trial."""
    timed = {name: NUMBER for name in ("wall_seconds", "training_flops") if name in row}
    received.check(row, ROW | timed, str(where))
    parts = PurePosixPath(row["trial"]).parts
    if not parts or ".." in parts or parts[0] == "/":
        raise UserError(f"{where}: damaged: 'trial' is {received.shown(row['trial'])}, no name")
    for name in row["tuned"]:
        received.check(row["tuned"], {name: float}, f"{where}: tuned")


def as_lines(rows: Iterable[Row]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_lines(path: Path) -> Iterator[Row]:
    """The rows of a file of JSON lines; none of a missing one. UserError where it is damaged."""
    for number, row in received.rows(path) if path.exists() else ():
        received.check(row, {}, f"{path}, line {number}")
        yield row
