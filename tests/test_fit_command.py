"""`moe fit` from a reader's side: a table in, coefficients, predictions and a picture out.

Broken on purpose, once each: --seed unused; --where ignored; an unknown law with a traceback;
limits without a budget accepted; a law of a file not found.
"""

import json
from pathlib import Path
import re

from laws import PUBLISHED, noisy
import numpy as np
import pytest

from moe.cli import fit as command
from moe.cli import main as cli
from moe.scaling import fit as fitting

MY_LAW = '''\
"""A power law with a floor, of the size alone."""

import numpy as np

from moe.scaling.laws.law import Law, N, dense_costs, free, positive


def log_loss(c, x):
    return np.log(c.E + c.A / x.N**c.alpha)


MyLaw = Law(
    name="floor",
    equation="L = E + A / N^alpha",
    inputs={"N": N},
    coefficients={"A": positive(10, 1e3), "alpha": free(0.2, 0.4), "E": positive(1, 2)},
    log_prediction=log_loss,
    costs=dense_costs,
)
'''


@pytest.fixture(autouse=True)
def few_starts(monkeypatch):
    monkeypatch.setattr(fitting, "REFINED", 6)
    monkeypatch.setattr(command, "LEAST_SAMPLES", 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A table of 40 Chinchilla-like runs, 10 of another router, and its folder."""
    points = noisy("chinchilla", count=40)
    rows = zip(points.inputs["N"], points.inputs["D"], points.target, strict=True)
    lines = [f"{n:.10g},{d:.10g},Switch,{loss:.10g}" for n, d, loss in rows]
    lines += [f"{1e8 + i},{2e9 + i},Hash,9.0" for i in range(10)]
    path = tmp_path_factory.mktemp("fit") / "runs.csv"
    path.write_text("\n".join(["size,tokens,router,loss", *lines]) + "\n", encoding="utf-8")
    return path


def flags(runs, *more, law="chinchilla"):
    return [
        "fit",
        f"--law={law}",
        f"--data={runs}",
        "--columns=N=size,D=tokens,L=loss",
        "--where=router == 'Switch'",
        "--bootstrap=8",
        *more,
    ]


def test_a_fit_from_end_to_end(runs, tmp_path, capsys):
    out, picture = tmp_path / "fit.json", tmp_path / "fit.png"
    more = [
        f"--json={out}",
        f"--plot={picture}",
        "--predict=N=1e9,D=2e10",
        "--predict=N=1e12,D=1e13",
    ]
    limits = ["--budget=1e21", "--max_memory=4e9", "--compare=dense", "--drop_highest=2"]
    assert cli.main(flags(runs, *more, *limits)) == 0
    found = json.loads(out.read_text())
    assert found["points"] == 38 and found["huber_delta"] == 1e-3
    for name, true in PUBLISHED["chinchilla"].items():
        row = found["coefficients"][name]
        low, high = row["interval"]
        assert low < row["value"] < high
        assert low - (high - low) < true < high + (high - low)
    assert 0.0005 < found["rmsle_log10"] < 0.0013  # the noise is 0.002 / ln 10 = 0.00087
    assert set(found["derived"]) == {"a", "b", "G"}
    near, far = found["predictions"]
    assert not near["warnings"] and "beyond the data" in far["warnings"][0]
    assert found["optimum"]["memory"] <= 4e9 and found["optimum"]["limited_by"] == ["max_memory"]
    assert [row["law"] for row in found["comparison"]] == ["chinchilla", "dense"]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    text = capsys.readouterr().out
    for words in ("L = E + A / N^alpha", "held out", "limited by --max_memory", "warning: N=1e+12"):
        assert words in text


def test_a_seed_repeats_the_intervals(runs, tmp_path):
    def intervals(seed):
        out = tmp_path / "fit.json"
        more = ["--columns=N=size,L=loss", f"--seed={seed}", f"--json={out}"]
        assert cli.main(flags(runs, *more, law="dense")) == 0
        return json.loads(out.read_text())["coefficients"]["N_c"]["interval"]

    assert intervals(1) == intervals(1) != intervals(2)


def test_a_law_of_ones_own_takes_twenty_lines(runs, tmp_path, capsys):
    assert len(MY_LAW.splitlines()) <= 20
    (tmp_path / "my_floor_law.py").write_text(MY_LAW, encoding="utf-8")
    out = tmp_path / "fit.json"
    N = np.geomspace(1e7, 1e10, 20)
    table = tmp_path / "mine.csv"
    rows = [f"{n},{2 + 300 / n**0.3}" for n in N]
    table.write_text("\n".join(["N,L", *rows]) + "\n", encoding="utf-8")
    law = f"--law={tmp_path / 'my_floor_law.py'}:MyLaw"
    more = ["--bootstrap=4", "--budget=1e20", "--tokens=1e9", f"--json={out}"]
    assert cli.main(["fit", law, f"--data={table}", *more]) == 0
    found = json.loads(out.read_text())["coefficients"]
    values = [found[name]["value"] for name in ("A", "alpha", "E")]
    np.testing.assert_allclose(values, [300, 0.3, 2], rtol=1e-5)
    assert "floor: L = E + A / N^alpha" in capsys.readouterr().out


MISTAKES = {
    "a law that is not there": (["--law=chinchila"], "did you mean 'chinchilla'?"),
    "a law far from any": (["--law=xyz"], "there are chinchilla, routed"),
    "no file of a law": (["--law=my_law.py:MyLaw"], "no such file"),
    "what is no law": (["--law=math:pi"], "no moe.scaling.laws.law.Law but float"),
    "a column that is not there": (["--columns=N=sise,D=tokens,L=loss"], "did you mean 'size'"),
    "a letter that no law reads": (["--columns=Q=size"], "has no 'Q'; it reads N, D, L"),
    "columns without =": (["--columns=size"], "LETTER=COLUMN"),
    "a letter that the law lacks": (["--predict=N=1e9,E=3"], "the law has no 'E'; there are N, D"),
    "half a place": (["--predict=N=1e9"], "also needs D"),
    "a place without a number": (["--predict=N=big,D=1"], "LETTER=NUMBER"),
    "a place outside the law": (["--predict=N=-1,D=1e9"], "expected from 1"),
    "a condition": (["--where=router = 'Switch'"], "write =="),
    "no rows": (["--where=router == 'TopK'"], "none of the 50 rows is left"),
    "one size": (["--where=size == 100000000"], "two values"),
    "too few": (["--drop_highest=35"], "5 points are too few"),
    "nothing left": (["--drop_highest=99"], "0 points are too few"),
    "limits without a budget": (["--max_memory=1e9"], "--budget"),
    "tokens that the law chooses": (["--budget=1e20", "--tokens=1e9"], "leave out --tokens"),
    "a coefficient": (["--fix=alfa=0.3"], "did you mean 'alpha'?"),
    "a coefficient out of range": (["--fix=A=-3"], "above 0"),
    "nothing to fit": (["--fix=A=1,B=1,E=1,alpha=1,beta=1"], "nothing is left to fit"),
    "a plot of no kind": (["--plot=fit.gif"], ".png"),
    "a plot nowhere": (["--plot=nowhere/fit.png"], "no such folder"),
    "bytes without a budget": (["--bytes_per_parameter=1"], "--budget"),
    "too few resamples": (["--bootstrap=3"], "at least 4, or 0 for none"),
    "negative resamples": (["--bootstrap=-1"], "at least 0"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line(what, runs, capsys):
    mistake, words = MISTAKES[what]
    assert cli.main(flags(runs, *mistake)) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1, error
    assert error.startswith("moe: error: ")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("c.A", "c.B", "can't be evaluated: AttributeError: .*'B'"),
        ("c.A", "c.A +* 1", r"can't be imported: invalid syntax \(.*\.py:9\)"),
        ("positive(10, 1e3)", "above('B', 3)", "can't be used: KeyError: 'B'"),
        ("positive, above", "free", r"can't be imported: NameError: name 'positive' .*\.py:16"),
        ("np.log(c.E +", "np.log(-c.E -", "no finite value at any of its 8 starts"),
    ],
)
def test_a_law_that_fails_is_told(old, new, words, tmp_path, runs, capsys):
    text = MY_LAW.replace("free, positive", "free, positive, above").replace(old, new)
    name = tmp_path.name  # one of its own: modules are imported once
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    mine = flags(runs, "--columns=N=size,L=loss", law=f"{tmp_path / name}.py:MyLaw")
    assert cli.main(mine) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and len(error.splitlines()) == 1, error


def test_learning_curves_are_noticed(tmp_path, capsys):
    sizes = np.repeat(np.geomspace(1e7, 1e9, 6), 8)
    losses = 3 - np.log10(sizes) / 10 + np.tile(np.arange(8) / 10, 6)
    table = tmp_path / "curves.csv"
    rows = [f"{n},{loss}" for n, loss in zip(sizes, losses, strict=True)]
    table.write_text("\n".join(["N,L", *rows]) + "\n")
    assert cli.main(["fit", "--law=dense", f"--data={table}", "--bootstrap=0"]) == 0
    assert "steps of one run" in capsys.readouterr().out


def test_the_docs_law_is_this_one():
    page = Path(__file__).parents[1] / "docs" / "scaling_laws.md"
    assert MY_LAW.strip() in page.read_text(encoding="utf-8")
