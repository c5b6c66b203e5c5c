"""`moe report`: what it says of sweeps with known truth, and the page."""

import json
import math
import re

import hostile_page
import numpy as np
import pytest
import synthetic_sweep

from moe.cli import main as cli
from moe.errors import UserError
from moe.reports import figures, page
from moe.reports.findings import control, find, sentence
from moe.reports.layers import by_layer, layers
from moe.reports.read import read, routing_lines

ARMS = {"base": 0.0, "good": -0.06, "same": 0.0, "bad": 0.08}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    arms = ARMS | {"seer": -0.5, "shaky": -0.04}
    where = tmp_path_factory.mktemp("report") / "ours"
    few = {"seed_sd": 0.001, "document_sd": 0.006}
    return synthetic_sweep.write(where, arms, leaking=("seer",), diverged=("shaky",), **few)


def test_verdicts_are_the_truth(folder):
    found = {f.cell: f for f in find(read(str(folder)))}
    assert {name: f.word for name, f in found.items()} == {
        "base": "baseline",
        "good": "better",
        "same": "equivalent",
        "bad": "worse",
        "seer": "leaks",
        "shaky": "unstable",
    }
    good = found["good"].verdict.difference
    low, high = good.interval()
    assert low < -0.06 < high and high - low < 0.03
    assert found["seer"].verdict is None and found["seer"].leak == pytest.approx(0.3)
    assert [f.cell for f in found.values()][-2:] == ["shaky", "seer"], "not ranked with the rest"


def test_the_finding_is_one_sentence(folder):
    sweep = read(str(folder))
    said = sentence(sweep, find(sweep))
    equal = "Beside base, at equal active FLOPs per token, in bits per byte: "
    first = equal + r"good \(-0\.0\d+ \[.*?\]\) is better; "
    assert re.match(first, said), said
    assert "same (" in said and "is equivalent within 0.01;" in said
    assert "bad (+0.0" in said and "runs of shaky have failed" in said
    assert said.endswith("seer sees the future and is not ranked.")
    assert "no difference, as it must be" in control(sweep)
    sweep.plan["match"] = "nothing"
    assert sentence(sweep, find(sweep)).startswith("Beside base, with nothing matched, in bits")


def test_the_multiplier_is_the_budget_at_which_the_baseline_gets_there(folder):
    """On curves L = c - 0.3 ln C, 0.06 bits are a factor of exp(0.2), beyond the baseline's end."""
    found = {f.cell: f for f in find(read(str(folder)))}
    assert found["good"].compute.value == pytest.approx(math.exp(0.06 / 0.3), rel=0.02)
    assert found["good"].compute.mark == "~" and found["bad"].compute.mark == ""
    assert found["bad"].compute.value == pytest.approx(math.exp(-0.08 / 0.3), rel=0.05)
    assert found["same"].time.value == pytest.approx(1.0, rel=0.01)


def test_how_hard_a_batch_is_cancels_in_the_multiplier(folder):
    """Runs of one seed see the same batches: lucky ones early are no lead over equal runs."""
    sweep, draw = read(str(folder)), np.random.default_rng(1)
    noise = draw.normal(0, 0.1, (9, 1 + synthetic_sweep.STEPS))
    for rows in sweep.curves.values():
        for row in rows:
            row["bits_per_byte"] += noise[row["seed"], int(row["step"])]
    found = {f.cell: f.compute for f in find(sweep)}
    assert found["same"].value == pytest.approx(1.0, rel=1e-6)
    assert 1.05 < found["good"].value < 1.5 and 0.6 < found["bad"].value < 0.95


def test_far_from_the_baseline_s_curve_a_multiplier_is_a_bound(tmp_path):
    arms = {"base": 0.0, "far": -0.6, "poor": 0.9}
    sweep = read(str(synthetic_sweep.write(tmp_path / "s", arms)))
    shown = {f.cell: page.times(f.compute) for f in find(sweep)}
    assert shown["far"] == ">4.00x" and shown["poor"].startswith("<0.1"), shown
    assert "[" not in shown["poor"], "a bound has no interval"
    base = [row for rows in sweep.curves.values() for row in rows if row["cell"] == "base"]
    for row in base:
        row["bits_per_byte"] = 1.6 if row["step"] % 3 else None
    shown = {f.cell: page.times(f.compute) for f in find(sweep)}
    assert shown["far"] == ">1.00x", "a flat curve, with steps without a loss"


def test_few_seeds_leave_a_small_effect_undecided_and_say_how_many_would_decide(tmp_path):
    arms = {"base": 0.0, "near": -0.02}
    where = synthetic_sweep.write(tmp_path / "s", arms, seeds=2, seed_sd=0.01, document_sd=0.001)
    sweep = read(str(where))
    said = sentence(sweep, find(sweep))
    assert re.search(r": near \(.*, \d+ further seeds? would decide\) is undecided\.", said), said


@pytest.mark.thorough
def test_over_many_sweeps_ties_are_seldom_called_differences(tmp_path):
    """The whole way from files to words; the rates in detail are in test_comparison.py."""
    wrong = 0
    for n in range(40):
        arms = {"base": 0.0, **{f"a{n}{i}": 0.0 for i in range(3)}}
        where = synthetic_sweep.write(tmp_path / str(n), arms, seeds=3, seed_sd=0.004 + n * 1e-5)
        wrong += any(f.word in ("better", "worse") for f in find(read(str(where))))
    assert wrong <= 6, wrong


def test_the_page_stands_alone_and_escapes_what_it_shows(tmp_path, capsys):
    wild = '<script>alert("x")</script>\x1b]0;'
    arms = ARMS | {wild: -0.03}
    where = synthetic_sweep.write(tmp_path / "s", arms)
    assert cli.main(["report", str(where)]) == 0
    said = capsys.readouterr().out
    assert "Which arm is best?" in said and "\x1b" not in said
    text = (where / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "\x1b" not in text
    assert "default-src 'none'" in text
    links = re.findall(r"""(?:src|href)="([^"]*)"|url\(([^)]*)\)""", text)
    inside = ("#", "data:image/png;base64,")
    assert links and all(link.startswith(inside) for pair in links for link in pair if link)
    assert text.count("<svg") == 6 and text.count("</svg>") == 6
    table = (where / "report.md").read_text()
    assert "| good | better |" in table and "\x1b" not in table


def test_no_text_becomes_a_part_of_the_page(tmp_path, capsys):
    """The long form, in a browser, is benchmarks/report_in_browser.py."""
    where = hostile_page.sweep(tmp_path / "s")
    assert cli.main(["report", str(where)]) == 0
    text = (where / "report.html").read_text(encoding="utf-8")
    found = hostile_page.Parts(text)
    assert not found.faults
    assert found.policy.keys() == hostile_page.MAY and found.policy["default-src"] == "'none'"
    assert hostile_page.RAN in text, "the texts are shown"
    assert not re.search("[\x00-\x08\x1b\u202e\u2066\ud800]", text + capsys.readouterr().out)
    for payload in hostile_page.PAYLOADS[:-2]:
        raw = hostile_page.Parts(text.replace("</body>", payload + "</body>"))
        assert raw.faults or "&lt;" in payload or payload.startswith(("<details", "<style")), (
            payload
        )


def test_routing_by_layer_is_at_equal_shares_of_training(folder):
    sweep = read(str(folder))
    [row, *_] = sweep.finished("good")
    lines = routing_lines(sweep, row)
    load_LQ, dropped_LQ, entropy_LQ = by_layer(lines)
    # The last tenth before three quarters, of 40 steps: 27 to 30, uneven by 32.5, 30, 27.5, 25 %.
    assert load_LQ[0, 2] == pytest.approx(1 + 3 * np.mean([0.32, 0.3, 0.28, 0.25]))
    assert dropped_LQ == pytest.approx(np.array([[0.0] * 4, [0.1] * 4]))
    assert entropy_LQ == pytest.approx(np.full((2, 4), 0.7))
    older = [{name: row[name] for name in ("count", "kept")} for row in lines]
    assert np.isnan(by_layer(older)[2]).all(), "runs of before have no entropy by layer"
    assert by_layer(lines[:1])[0][:, 0] == pytest.approx([1 + 3 * 0.98] * 2), "one line is enough"
    figure = layers(sweep, find(sweep))
    assert figure is not None
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][-1] == "seer"


def test_what_tuning_chose_is_told(folder):
    sweep = read(str(folder))
    [good] = [row for row in page.tuned(sweep, find(sweep)) if row[0] == "good"]
    assert good[1:4] == ("3", "0", "AdamW.learning_rate = 0.01")
    assert "<h2>What tuning chose</h2>" in page.page([sweep])


def test_a_name_cannot_break_the_markdown(tmp_path):
    wild = "x\n\n| <img src=x> & | y"
    sweep = read(str(synthetic_sweep.write(tmp_path / "s", {"base": 0.0, wild: -0.03})))
    text = page.markdown([sweep])
    assert "<img" not in text and "x  \\| &lt;img src=x> &amp; \\| y (-0.0" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


@pytest.mark.thorough
def test_several_sweeps_in_one_report(folder, tmp_path, capsys):
    other = synthetic_sweep.write(tmp_path / "other", {"base": 0.0, "x": 0.05})
    assert cli.main(["report", str(folder), str(other), f"--out={tmp_path}/new/both"]) == 0
    assert (tmp_path / "new/both/report.html").read_text().count("<h1>") == 2
    assert capsys.readouterr().out.count("Which arm is best?") == 2


@pytest.mark.thorough
def test_forty_arms_fit_in_every_figure(tmp_path):
    draw = np.random.default_rng(0)
    arms = {"base": 0.0} | {f"router_{i:02}": float(draw.normal(0, 0.05)) for i in range(40)}
    sweep = read(str(synthetic_sweep.write(tmp_path / "s", arms)))
    text = page.page([sweep])
    assert text.count("<svg") == 6 and "router_39" in text
    assert "and 3" in sentence(sweep, find(sweep)) or "more" in sentence(sweep, find(sweep))


def test_an_unfinished_sweep_is_reported_as_far_as_it_is(tmp_path):
    where = synthetic_sweep.write(tmp_path / "s", ARMS, controls=False)
    rows = [json.loads(line) for line in (where / "trials.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["trial"] != "bad/report-3"]
    (where / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    sweep = read(str(where))
    notes = page.notes(sweep, find(sweep))
    assert "UNFINISHED: 1 reported runs have not ended." in notes
    assert any("no negative control" in note for note in notes)
    kept = [row for row in kept if row["cell"] != "base" or row["phase"] != "report"]
    (where / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    sweep = read(str(where))
    assert sentence(sweep, find(sweep)).startswith("Nothing can be said: no run of the baseline")
    page.page([sweep])


def test_shuffled_runs_are_compared_seed_by_seed(tmp_path):
    """Of the baseline one is missing; each arm is the baseline with its own seed."""
    where = synthetic_sweep.write(tmp_path / "s", ARMS, seeds=4, controls=False, seed_sd=0.5)
    rows = [json.loads(line) for line in (where / "trials.jsonl").read_text().splitlines()]
    of = {(r["cell"], r["number"]): r for r in rows if r["phase"] == "report"}
    for (cell, number), row in of.items():
        if (cell, number) != ("base", 1):
            bits = {n: of["base", number][n] for n in ("bits_per_byte", "document_bits")}
            name = {"phase": "shuffled", "trial": f"{cell}/shuffled-{number}"}
            rows.append(row | bits | name)
    (where / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep = read(str(where))
    assert "On shuffled tokens none of 3 cells gains, as it must be." in page.notes(
        sweep, find(sweep)
    )


def edited(where, table, edit):
    """Replace each row of a table by what `edit` makes of it; rows of which it makes None go."""
    rows = [edit(json.loads(line)) for line in (where / table).read_text().splitlines()]
    (where / table).write_text("".join(json.dumps(row) + "\n" for row in rows if row))


def without(name):
    return lambda row: {key: value for key, value in row.items() if key != name}


def test_runs_without_a_loss_one_run_none_and_cells_that_are_gone(tmp_path):
    arms = {"base": 0.0, "nan": 0.0, "one": 0.0, "none": 0.0, "gone": 0.0}
    where = synthetic_sweep.write(tmp_path / "s", arms)

    def edit(row):
        if row["cell"] == "nan" and row["phase"] == "report":
            return row | {"bits_per_byte": None}
        if row["cell"] == "gone":
            return row | {"cell": "of old"}
        one = row["cell"] == "one" and row["phase"] == "report" and row["seed"] > 1
        return None if one or row["cell"] == "none" else row

    edited(where, "trials.jsonl", edit)
    sweep = read(str(where))
    findings = find(sweep)
    assert sentence(sweep, findings) == (
        "Beside base, at equal active FLOPs per token, in bits per byte: one (fewer than 2 seeds "
        "beside the baseline) is undecided; runs of nan have failed; none, gone have not run yet."
    )
    notes = page.notes(sweep, findings)
    assert "nan/report-1: diverged: its held-out loss is not finite" in notes
    assert "Left out, as the plan no longer has them: of old." in notes
    page.page([sweep])


def test_an_arm_whose_tuning_has_failed_whole_has_failed(tmp_path):
    where = synthetic_sweep.write(tmp_path / "s", ARMS)

    def edit(row):
        if row["cell"] != "bad":
            return row
        failed = row | {"bits_per_byte": None, "status": "diverged", "reason": "no loss"}
        return failed if row["phase"] == "tuning" else None

    edited(where, "trials.jsonl", edit)
    sweep = read(str(where))
    findings = find(sweep)
    [bad] = [f for f in findings if f.cell == "bad"]
    assert bad.word == "failed" and len(bad.failed) == 3 and not sweep.missing
    assert "runs of bad have failed" in sentence(sweep, findings)
    assert "bad/tuning-1: diverged: no loss" in page.notes(sweep, findings)
    sweep.rows.remove(bad.failed[0])
    assert [f.word for f in find(sweep) if f.cell == "bad"] == ["not run"] and sweep.missing == 3


def test_an_arm_that_fails_costs_the_others_no_verdict(tmp_path):
    """Of five arms that are one, four with a failed seed: the last is judged as if alone."""
    apart = {"seeds": 4, "seed_sd": 0.004, "document_sd": 0.001}
    lone = synthetic_sweep.write(tmp_path / "lone", {"base": 0.0, "x": -0.02}, **apart)
    [x] = [f for f in find(read(str(lone))) if f.cell == "x"]
    shaky = {f"y{i}": 0.0 for i in range(4)}
    arms = {"base": 0.0, "x": -0.02} | shaky
    many = synthetic_sweep.write(tmp_path / "many", arms, diverged=tuple(shaky), **apart)
    found = {f.cell: f for f in find(read(str(many)))}
    own = found["x"].verdict
    assert own.p_differs == own.difference.p_differs, "it is the whole family"
    assert x.verdict.p_differs == x.verdict.difference.p_differs
    assert {found[name].word for name in shaky} == {"unstable"}
    assert all(found[name].verdict is None for name in shaky)


def test_notes_say_what_is_so(tmp_path):
    where = synthetic_sweep.write(tmp_path / "s", {"base": 0.0, "x": 0.05}, seeds=1)
    sweep = read(str(where))
    assert control(sweep) == (
        "The baseline against itself: fewer than 2 runs each, which show nothing."
    )
    assert page.tuned_by(sweep).endswith("; 1 fresh seed.")
    sweep.rows[:] = [row for row in sweep.rows if row["phase"] != "tuning"]
    sweep.plan["tuning"] = {"trials": 0, "ranges": {}}
    sweep.plan["match"] = "nothing"
    notes = page.notes(sweep, find(sweep))
    assert notes[:2] == ["Matched: nothing.", "Tuned: nothing; 1 fresh seed."]
    sweep.plan.update(match="60 seconds of training", matched_by="wall_time")
    assert page.matched(sweep, find(sweep)) == (
        "Matched: 60 seconds of training, which is what each run was given."
    )
    wide = synthetic_sweep.write(tmp_path / "wide", {"base": 0.0, "x": 0.05}, seed_sd=0.1)
    assert "], no difference found." in control(read(str(wide)))


@pytest.mark.filterwarnings("error")
def test_a_flat_learning_curve_is_drawn(tmp_path):
    sweep = read(str(synthetic_sweep.write(tmp_path / "s", {"base": 0.0, "x": 0.05})))
    for row in (row for rows in sweep.curves.values() for row in rows):
        row["bits_per_byte"] = 2.0
    assert figures.as_svg(figures.curves(sweep, find(sweep)))


def test_several_baselines_have_colours_of_their_own(folder):
    sweep = read(str(folder))
    colours = figures.colours_of(find(sweep))
    assert colours["base"] == figures.BASELINE
    for cell in sweep.cells:
        cell["baseline"] = cell["cell"] if cell["cell"] in ("base", "bad") else "base"
    colours = figures.colours_of(find(sweep))
    assert len(set(colours.values())) == len(colours) == 6
    assert {colours["base"], colours["bad"]} == set(figures.COLOURS[:2])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / "sweep.json").unlink(), "there is no sweep.json in it"),
        (lambda p: (p / "sweep.json").write_text("{"), "sweep.json: damaged"),
        (lambda p: (p / "sweep.json").write_text('{"cells": 1, "version": 7}'), "version 7"),
        (lambda p: (p / "trials.jsonl").write_text('{"version": 0}\n'), "rows of version 0"),
        (lambda p: (p / "trials.jsonl").write_text('{"version'), "trials.jsonl: damaged, line 1"),
        (lambda p: (p / "trials.jsonl").unlink(), "no reported run has ended yet"),
        (lambda p: (p / "trials.jsonl").write_text("3\n"), "3 where an object is expected"),
        (lambda p: (p / "trials.jsonl").write_bytes(b"\xff"), "can't decode byte 0xff"),
        (lambda p: edited(p, "sweep.json", without("delta")), "sweep.json: damaged: no 'delta'"),
        (lambda p: edited(p, "trials.jsonl", without("seed")), "no 'seed' in {'bits_per_byte'"),
        (lambda p: edited(p, "curves.jsonl", without("flops")), "no 'flops' in {'trial'"),
        (
            lambda p: (p / "trials.jsonl").write_text(2 * (p / "trials.jsonl").read_text()),
            "trials.jsonl: damaged: two rows of the trial base/tuning-1",
        ),
        (
            lambda p: edited(p, "trials.jsonl", lambda row: row | {"document_bits": None}),
            "base/report-1 has no bits of single documents",
        ),
    ],
)
def test_a_folder_that_cannot_be_reported_is_one_line(damage, said, tmp_path, capsys):
    where = synthetic_sweep.write(tmp_path / "s", {"base": 0.0, "x": 0.05})
    damage(where)
    assert cli.main(["report", str(where)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    with pytest.raises(UserError):
        read(str(where))
