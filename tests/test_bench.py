"""`moe bench` at tiny size: a row for everything that is measured, and mistakes in a line."""

import json

import pytest

from layers.dispatch import Sorted
from moe.bench import layer, routers
from moe.cli import main as cli
from routing import Capacity


@pytest.mark.thorough
def test_every_router_has_a_row(tmp_path, capsys):
    path = tmp_path / "routers.json"
    flags = ["--tokens=64", "--width=16", "--experts=16", f"--json={path}"]
    assert cli.main(["bench", "routers", *flags]) == 0
    rows = json.loads(path.read_text())
    assert [row["router"] for row in rows[2:]] == list(routers.ROUTERS)
    assert all(row["milliseconds"] > 0 for row in rows)
    assert rows[0]["fraction_of_layer"] == 1
    keys = {"router", "milliseconds", "fraction_of_layer", "tokens", "width", "experts"}
    assert all(set(row) == keys and row["tokens"] == 64 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1


@pytest.mark.thorough
def test_every_variant_of_a_layer_is_measured(tmp_path, capsys):
    path = tmp_path / "layer.json"
    assert cli.main(["bench", "layer", "--case=64,16,16,4,2", f"--json={path}"]) == 0
    rows = json.loads(path.read_text())
    found = [(row["routing"], row["dispatcher"]) for row in rows]
    ours = [(routing, name) for routing, rows in layer.VARIANTS.items() for name, *_ in rows]
    assert [pair for pair in found if not pair[1].startswith("transformers")] == ours
    for row in rows:
        assert row["case"] == "T=64 D=16 F=16 E=4 K=2"
        assert min(value for value in row.values() if isinstance(value, float)) > 0
        assert ("memory_ratio" in row) != row["dispatcher"].startswith("transformers")
    out = capsys.readouterr().out
    assert "best dispatcher, zipf, step, times dense:" in out
    phases = [line for line in out.splitlines() if line.startswith("  ... ")]
    assert phases[0] == "  ... measuring the peaks of matmul and copy"
    assert phases[1] == "  ... case 1 of 1 (T=64 D=16 F=16 E=4 K=2): compiling" and len(phases) == 3


def test_means_are_of_the_fastest_of_each_case():
    def row(case, dispatcher, ratio):
        names = {"case": case, "routing": "balanced", "dispatcher": dispatcher}
        ratios = {f"ratio_to_dense_{what}": ratio for what in ("forward", "step")}
        fastest = {f"fastest_to_dense_{what}": ratio / 2 for what in ("forward", "step")}
        return names | ratios | fastest

    rows = [
        row("a", "SlotGather", 2.0),
        row("a", "Sorted", 1.0),
        row("a", "transformers eager", 9.0),
        row("a", "transformers grouped_mm", 2.0),
        row("a", "transformers grouped_mm, memory kept", 1.5),
        row("b", "Sorted", 4.0),
    ]
    found = layer.summary(rows)
    assert found["best dispatcher, balanced, step, times dense"] == pytest.approx(2.0)
    fastest = found["best dispatcher, balanced, step, times dense, fastest calls"]
    assert fastest == pytest.approx(1.0)
    assert found["transformers, step, times ours, fastest calls"] == pytest.approx(2.0)
    assert found["transformers, step, times ours"] == pytest.approx(2.0)
    assert found["transformers with memory kept, forward, times ours"] == pytest.approx(1.5)


def test_pairs_are_told_by_medians_and_by_the_fastest_calls(monkeypatch):
    # Of each round's four calls (first, second, first, second) the last two count.
    counted = {"first": [2.0, 4.0, 1.0], "second": [4.0, 4.0, 4.0]}
    calls = {
        name: iter([t for time in times for t in (9.0, time)]) for name, times in counted.items()
    }
    monkeypatch.setattr(layer, "ROUNDS", 3)
    monkeypatch.setattr(layer, "settle", lambda pair: None)
    pair = tuple(lambda name=name: next(calls[name]) for name in counted)
    monkeypatch.setattr(layer, "timed", lambda call: call())
    # Ratios of 2, 1 and 4; the fastest are 1 and 4 seconds.
    assert layer.paired([pair]) == [layer.Timing(4.0, 2.0, 4.0)]


@pytest.mark.parametrize("case", ["64,16,16,4", "64,16,x,4,2", "64,16,16,4,5", "64,16,16,0,1"])
def test_a_case_that_cannot_be_is_told(case, capsys):
    assert cli.main(["bench", "layer", f"--case={case}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--case={case}" in error


def test_an_unknown_suite_is_told(capsys):
    assert cli.main(["bench", "router"]) == 2
    assert "moe bench has no suite 'router'; did you mean 'routers'?" in capsys.readouterr().err


class OutOfMemory(Sorted):
    """A dispatcher as on a device that has no room for its rows."""

    def dispatch(self, x_GTD, decision):
        raise RuntimeError("RESOURCE_EXHAUSTED")


def test_a_dispatcher_that_fails_costs_its_own_row(monkeypatch):
    """One that fails, before one that works; means are of the rows with numbers."""
    wanted = [("Broken", OutOfMemory(), Capacity(None)), *layer.VARIANTS["zipf"]]
    monkeypatch.setattr(layer, "VARIANTS", {"zipf": tuple(wanted)})
    case = layer.Case(64, 16, 16, 4, 2)
    broken, works = layer._rows(case, 1e12, 1e11, "bfloat16", lambda line: None)
    assert broken["dispatcher"] == "Broken" and "Error" in broken["error"]
    assert works["milliseconds_step"] > 0 and "error" not in works
    assert layer.summary([broken, works]) == layer.summary([works])
    assert layer.summary([broken]) == {}
