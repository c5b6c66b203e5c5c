"""Read a table of runs: CSV, JSON lines (both gzipped too) or Parquet, as columns of cells."""

from collections.abc import Iterator, Mapping, Sequence
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any
import zlib

import numpy as np

from moe.errors import UserError, first_line, nearest
from moe.received import shown
from moe.scaling.fit import Points
from moe.scaling.laws.law import Law
from moe.scaling.where import rows_where

Columns = dict[str, Sequence[Any]]
# Arrow's own errors are of these, or NotImplementedError, KeyError, IndexError and TypeError.
DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, zlib.error, csv.Error),
    *(RecursionError, NotImplementedError, OverflowError),
)
MOST_BYTES = 2**28  # of a table's text
MOST_CELLS = 2**24
KINDS = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")


def read(path: str) -> Columns:
    """A table's columns by name.

    Raises:
        UserError: there is no such file, or it can't be read.
    """
    file = Path(path)
    if not file.is_file():
        near = [p.name for p in file.parent.glob("*") if p.name.endswith(KINDS)]
        what = "a folder, not a table" if file.is_dir() else "no such file"
        raise UserError(f"--data={path}: {what}{nearest(file.name, near)}")
    kind = next((k for k in sorted(KINDS, key=len, reverse=True) if file.name.endswith(k)), None)
    if kind is None:
        raise UserError(f"--data={path}: expected a name that ends in {', '.join(KINDS)}")
    try:
        columns = _parquet(file) if kind == ".parquet" else _text(file, kind.startswith(".csv"))
    except UserError:
        raise
    except DAMAGED as error:
        first = first_line(error)[:160]
        raise UserError(f"--data={path}: {type(error).__name__}: {first}") from error
    if not columns or not len(next(iter(columns.values()))):
        raise UserError(f"--data={path}: the table has no rows")
    return columns


def _parquet(file: Path) -> Columns:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"--data={file}: Parquet needs pyarrow; pip install 'moe-routing[parquet]'"
        ) from None
    with parquet.ParquetFile(file) as opened:
        about = opened.metadata
        if about.num_rows * max(about.num_columns, 1) > MOST_CELLS:
            raise UserError(
                f"--data={file}: {about.num_rows:,} rows of {about.num_columns:,} columns; a table "
                f"has at most {MOST_CELLS:,} cells"
            )
        return _of_rows(opened.read().to_pylist(), file)


def _text(file: Path, is_csv: bool) -> Columns:
    opened = gzip.open(file) if file.suffix == ".gz" else file.open("rb")
    with opened as raw:
        content = raw.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"--data={file}: a table has at most {MOST_BYTES:,} bytes of text")
        text = io.StringIO(content.decode("utf-8-sig"))
    if not is_csv:
        return _of_rows([json.loads(line) for line in text if line.strip()], file)
    reader = csv.reader(text, strict=True)
    header = next(reader, [])
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"--data={file}: column {twice!r} stands there twice")
    rows = []
    for row in filter(None, reader):
        if len(row) != len(header):
            raise UserError(
                f"--data={file}: line {reader.line_num} has {len(row)} cells, the header "
                f"{len(header)}"
            )
        rows.append(row)
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _of_rows(rows: list[Any], file: Path) -> Columns:
    """Columns of records; what lies in an inner record is named outer.inner."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"--data={file}: row {number} is no record of names and values")
    flat = [_flat(row) for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)
    if len(names) * len(rows) > MOST_CELLS:
        raise UserError(
            f"--data={file}: {len(rows):,} rows of {len(names):,} columns; a table has at most "
            f"{MOST_CELLS:,} cells"
        )
    return {name: [row.get(name) for row in flat] for name in names}


def _flat(row: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


def assignments(text: str) -> Iterator[tuple[str, str, str]]:
    """Each part of "N=size,L=loss", its letter, and the value after "=", which may be empty."""
    for part in filter(None, (part.strip() for part in text.split(","))):
        letter, _, value = (word.strip() for word in part.partition("="))
        yield part, letter, value


def read_names(text: str, *laws: Law) -> dict[str, str]:
    """The table's columns by the laws' letters, of --columns="N=size,L=loss".

    A letter that is not given stands for the column of that name.
    """
    names = {letter: letter for law in laws for letter in needed(law)}
    for part, letter, column in assignments(text):
        if not column:
            raise UserError(f"--columns: {part!r} is no LETTER=COLUMN, such as N=parameters")
        if letter not in names:
            raise UserError(f"--columns: the law has no {letter!r}; it reads {', '.join(names)}")
        names[letter] = column
    return names


def needed(law: Law) -> tuple[str, ...]:
    """The letters of a law's columns."""
    return (*law.inputs, law.target)


def select(columns: Columns, names: Mapping[str, str], law: Law, where: str, drop: int) -> Points:
    """The points that a law is fitted to.

    Args:
        names: columns by letter.
        where: a condition on rows; empty for all.
        drop: how many of the highest targets are left out.

    Raises:
        UserError: a column is missing, or a cell is no number that the law can have.
    """
    count = len(next(iter(columns.values())))
    mask = rows_where(where, columns) if where.strip() else np.ones(count, bool)
    rows = np.flatnonzero(mask)
    if not len(rows):
        raise UserError(f"--where={where!r}: none of the {count} rows is left")
    found = {}
    for letter in needed(law):
        if names[letter] not in columns:
            hint = nearest(names[letter], columns) or f"; there are {', '.join(columns)}"
            raise UserError(
                f"the law {law.name} needs {letter}: the table has no column {names[letter]!r}"
                f"{hint}; name it with --columns={letter}=COLUMN"
            )
        found[letter] = _numbers(columns[names[letter]], rows, names[letter], letter, law)
    points = Points({k: found[k] for k in law.inputs}, found[law.target])
    if drop:
        keep = np.sort(np.argsort(points.target, kind="stable")[: max(len(points) - drop, 0)])
        points = points.take(keep)
    return points


def _numbers(
    cells: Sequence[Any], rows: np.ndarray, column: str, letter: str, law: Law
) -> np.ndarray:
    """The cells of these rows as numbers."""
    values = np.empty(len(rows))
    for i, row in enumerate(rows):
        try:
            values[i] = float(cells[row])
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"row {row + 1}: {column} ({letter}) is {shown(cells[row])}, no number; leave such "
                f"rows out with --where='{column} > 0'"
            ) from None
    low, high = (0.0, np.inf)
    if letter in law.inputs:
        low, high = law.inputs[letter].low, law.inputs[letter].high
    positive = letter not in law.inputs
    bad = ~np.isfinite(values) | (values < low) | (values > high) | (positive & (values <= 0))
    if bad.any():
        first = np.flatnonzero(bad)[0]
        expected = "above 0" if positive else f"from {low:g} to {high:g}"
        raise UserError(
            f"row {rows[first] + 1}: {column} ({letter}) is {values[first]:g}, expected {expected}"
            f" ({bad.sum()} such rows); leave them out with --where"
        )
    return values
