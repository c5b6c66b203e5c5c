"""Tables of runs and conditions on their rows.

Broken on purpose, once each: `or` bound tighter than `and`; numbers compared as text; a missing
cell equal to a number; a gzip file read as text; --drop_highest from the wrong end.
"""

import gzip
import json

from laws import noisy
import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from moe.errors import UserError
from moe.scaling import table
from moe.scaling.laws import LAWS
from moe.scaling.where import rows_where

COLUMNS = {
    "router": ["Switch", "Hash", "TopK", "Switch"],
    "k": ["1", "1", "2", ""],
    "loss": [2.5, 3.5, None, 10.0],
    "done": ["True", "false", "True", "False"],
    "cost.flops": [1e18, 2e18, 3e18, 4e18],
}


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("router == 'Switch'", [0, 3]),
        ('router != "Switch"', [1, 2]),
        ("k == 1", [0, 1]),
        ("k == 1.0 and router == 'Hash'", [1]),
        ("k != 1", [2, 3]),
        ("loss < 3 or loss > 9.5", [0, 3]),
        ("loss >= 3.5", [1, 3]),
        ("k in (1, 2,) and not router in ('Hash')", [0, 2]),
        ("router not in ('Switch', 'Hash')", [2]),
        ("router == 'Hash' or router == 'TopK' and k == 1", [1]),
        ("(router == 'Hash' or router == 'TopK') and k == 2", [2]),
        ("not (k == 1 or k == 2)", [3]),
        ("not not k == 2", [2]),
        ("done == True", [0, 2]),
        ("done == False and loss <= 1e1", [1, 3]),
        ("cost.flops >= +2.5e18", [2, 3]),
        ("router > 'Hash'", [0, 2, 3]),
        ("router == 'and'", []),
    ],
)
def test_conditions(condition, rows):
    assert np.flatnonzero(rows_where(condition, COLUMNS)).tolist() == rows


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("router = 'Switch'", "write =="),
        ("router == Switch", "write 'Switch'"),
        ("ruter == 'Switch'", "did you mean 'router'?"),
        ("k == 1 and", "expected a column, at its end"),
        ("k == 1 k == 2", "expected and, or, or the end, at 'k == 2'"),
        ("(k == 1", r"expected '\)', at its end"),
        ("k in 1", r"expected '\('"),
        ("1 == k", "expected a column"),
        ("k", "expected =="),
        ("k not == 1", "expected =="),
        ("k == 1; import os", "can't be read at '; import os'"),
        ("__import__('os').system('true') == 0", r"can't be read at \"\.system"),
        ("k == __import__('os')", "expected a number"),
        ("k == 1 + 1", "can't be read at"),
        ("k < 2 < 3", "expected and, or, or the end"),
        ("k == 'open", "can't be read at"),
        ("(" * 3000 + "k == 1", "more than 100 parentheses"),
        ("not " * 3000 + "k == 1", "more than 100 parentheses and nots"),
    ],
)
def test_conditions_that_cannot_be_read(condition, words):
    with pytest.raises(UserError, match=words):
        rows_where(condition, COLUMNS)


def written(folder, kind, rows):
    """A file of this kind with these records."""
    path = folder / f"runs{kind}"
    if kind == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    if kind.startswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if kind.endswith(".gz") else text)
    return path


@pytest.mark.parametrize("kind", table.KINDS)
def test_every_kind_of_table_gives_the_same_points(kind, tmp_path):
    rows = [
        {"size": 1e8 * (i + 1), "tokens": 1e9 * (7 - i), "loss": 3 - i / 10, "router": r}
        for i, r in enumerate(["a", "b", "a", "a", "b"])
    ]
    columns = table.read(str(written(tmp_path, kind, rows)))
    law = LAWS["chinchilla"]
    names = table.read_names("N=size, D=tokens,L=loss", law)
    points = table.select(columns, names, law, "router == 'a'", drop=1)
    np.testing.assert_allclose(points.inputs["N"], [3e8, 4e8])
    np.testing.assert_allclose(points.inputs["D"], [5e9, 4e9])
    np.testing.assert_allclose(points.target, [2.8, 2.7])


def test_inner_records_are_named_with_dots(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"cost": {"flops": 3.0}, "L": 2}\n\n{"L": 3, "cost": {"flops": 4.0}}\n')
    assert table.read(str(path)) == {"cost.flops": [3.0, 4.0], "L": [2, 3]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("runs.csv", b"", "no rows"),
        ("runs.csv", b"N,L\n", "no rows"),
        ("runs.csv", b"N,L\n1,2\n3\n", "line 3 has 1 cells, the header 2"),
        ("runs.csv", b"N,N\n1,2\n", "stands there twice"),
        ("runs.csv", b"N,L\n\xff,1\n", "UnicodeDecodeError"),
        ("runs.csv.gz", b"N,L\n1,2\n", "BadGzipFile"),
        ("runs.csv.gz", gzip.compress(b"N,L\n1,2\n" * 99, mtime=0)[:-9], "EOFError"),
        ("runs.jsonl", b"{'N': 1}\n", "JSONDecodeError"),
        ("runs.jsonl", b"[1, 2]\n", "row 1 is no record"),
        ("runs.parquet", b"PAR1", "ArrowInvalid"),
        ("runs.xlsx", b"", "ends in .csv, .csv.gz"),
    ],
)
def test_files_that_are_no_tables(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        table.read(str(tmp_path / name))


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "runs.csv").write_text("N,L\n1,2\n")
    with pytest.raises(UserError, match=r"no such file; did you mean 'runs.csv'\?"):
        table.read(str(tmp_path / "run.csv"))
    with pytest.raises(UserError, match="a folder"):
        table.read(str(tmp_path))


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"L": ["2", "-1"]}, r"row 2: L \(L\) is -1, expected above 0 \(1 such rows\)"),
        ({"L": ["nan", "2"]}, "row 1: L .* nan"),
        (
            {"L": ["", "2"]},
            "row 1: L .* is '', no number; leave such rows out with --where='L > 0'",
        ),
        ({"N": ["0", "5"]}, r"row 1: N \(N\) is 0, expected from 1 to inf"),
        ({"loss": ["1"]}, r"needs L: the table has no column 'L'; there are N, D, loss"),
    ],
)
def test_cells_that_a_law_cannot_have(cells, words):
    columns = {"N": ["1e8", "2e8"], "D": ["1e9", "2e9"], **cells}
    law = LAWS["chinchilla"]
    with pytest.raises(UserError, match=words):
        table.select(columns, table.read_names("", law), law, "", 0)


def test_no_rows_left():
    law = LAWS["dense"]
    with pytest.raises(UserError, match="none of the 3 rows is left"):
        table.select({"N": [1, 2, 3], "L": [1, 2, 3]}, {"N": "N", "L": "L"}, law, "N > 5", 0)


def test_the_highest_are_dropped():
    points = noisy("dense", count=30)
    columns = {"N": points.inputs["N"].tolist(), "L": points.target.tolist()}
    left = table.select(columns, {"N": "N", "L": "L"}, LAWS["dense"], "", drop=5)
    assert sorted(points.target)[:25] == sorted(left.target)
