"""`moe sweep` on real runs: killed, started again, edited; tables that pandas would read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny import BASE, Runs, corpus, environment, lines

from moe.cli import main as cli
from moe.sweeps.plan import Plan
from moe.sweeps.record import SweepFolder
from moe.sweeps.trial import is_for_tuning

SWEEP = """
sweep.question = 'Which is better?'
sweep.base = ({base!r}, 'train.steps = 30', 'train.save_every = 5')
sweep.arms = {{
    'two': (),
    'one': ('TopK.k = 1',),
    'wild': ('train.optimizer = @AdamW()', 'AdamW.learning_rate = 1e30'),
}}
sweep.baseline = 'two'
sweep.seeds = 1
sweep.match = None
sweep.controls = ()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a sweep's config, and the folder of the sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    text = corpus(folder / "text")
    base = folder / "base.gin"
    base.write_text(BASE + f"TextFiles.paths = {str(text)!r}\nTextData.validation_fraction = 0.3\n")
    (folder / "ours.gin").write_text(SWEEP.format(base=str(base)))
    return folder


def command(place, *more: str) -> list[str]:
    given = [f"--gin_file={place / 'ours.gin'}", f"--folder={place / 'ours'}", *more]
    return ["sweep", *given]


def started(place) -> subprocess.Popen:
    words = [sys.executable, "-m", "moe", *command(place, "--run", "--workers=1")]
    return subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True)


def wait_for(found, process: subprocess.Popen):
    while not found():
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def swept(place):
    """The sweep, killed in the second trial and then run to its end; when the first result came."""
    folder = SweepFolder(place / "ours")
    first, second = folder.trial("two/report-1"), folder.trial("one/report-1")
    process = started(place)
    wait_for(first.result.exists, process)
    at = first.result.stat().st_mtime_ns
    wait_for((second.run / "checkpoints" / "10").exists, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not second.result.exists()
    # As an edit or another version may leave a trial that has not ended.
    third = folder.trial("wild/report-1")
    shutil.copytree(second.run, third.run)
    trials = Plan.of_json(folder.read_plan()).trials_now(folder.results())
    third.begun.write_text(next(t.text() for t in trials if t.name == "wild/report-1"))
    again = started(place)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    return folder, at, said


def test_a_killed_sweep_goes_on_where_it_was(swept, place):
    folder, at, said = swept
    assert folder.trial("two/report-1").result.stat().st_mtime_ns == at, "it ran again"
    log = folder.trial("one/report-1").log.read_text()
    assert "continuing at step" in log
    assert "3/3 wild/report-1: diverged: " in said and "; 0 min left" in said
    # The interrupted trial is bit for bit the run that nothing has interrupted.
    row = json.loads(folder.trial("one/report-1").result.read_text())
    config = place / "alone.gin"
    config.write_text(row["given"])
    alone = lines(Runs(place / "alone").done("run", config=config) / "documents.jsonl")
    assert row["document_bits"] == [d["bits"] for d in alone if not is_for_tuning(d["name"])]


def test_a_trial_that_other_settings_began_starts_anew(swept):
    log = swept[0].trial("wild/report-1").log.read_text()
    assert "starting anew: " in log and "What differs:" in log
    assert "AdamW.learning_rate" in log.split("What differs:")[1]


def test_the_table_has_a_row_for_each_trial_also_for_those_that_failed(swept):
    folder, *_ = swept
    rows = {row["cell"]: row for row in lines(folder.trials)}
    assert list(rows) == ["two", "one", "wild"]
    good, wild = rows["one"], rows["wild"]
    assert good["status"] == "finished" and good["seed"] == 1 and good["axes"] == {}
    assert sum(good["document_bits"]) / sum(good["document_bytes"]) == good["bits_per_byte"]
    assert good["validation_bits_per_byte"] != good["bits_per_byte"]
    assert good["training_rule_bits_per_byte"] == pytest.approx(good["bits_per_byte"], abs=0.05)
    assert good["training_flops"] == good["flops_per_token"] * good["tokens"]
    assert good["tokens"] == 30 * 4 * 32 and "TopK.k = 1" in good["config"]
    assert wild["status"] == "diverged" and wild["bits_per_byte"] is None and wild["reason"]
    curves = [row for row in lines(folder.curves) if row["cell"] == "one"]
    assert [row["step"] for row in curves] == list(range(1, 31))
    assert curves[-1]["tokens"] == good["tokens"] and curves[-1]["flops"] == good["training_flops"]
    assert not (folder.trial("one/report-1").run / "checkpoints").exists()


def test_nothing_that_ended_runs_again_and_edits_are_refused(swept, place, capsys):
    folder, *_ = swept
    assert cli.main(command(place, "--list")) == 0
    listed = capsys.readouterr().out
    assert "3 of 3 trials" in listed and "diverged" in listed
    assert cli.main(command(place, "--run")) == 0
    assert "two/report-1:" not in capsys.readouterr().out
    text = (place / "ours.gin").read_text()
    try:
        (place / "ours.gin").write_text(text.replace("TopK.k = 1", "TopK.k = 3"))
        assert cli.main(command(place, "--run")) == 2
        said = capsys.readouterr().err
        assert "1 finished trials would change" in said
        assert "one/report-1: TopK.k = 1 there, TopK.k = 3 here" in said
    finally:
        (place / "ours.gin").write_text(text)
    other = place / "other.gin"
    other.write_text(text)
    assert cli.main(["sweep", f"--gin_file={other}", f"--folder={folder.path}", "--run"]) == 2
    assert "holds the sweep 'ours', not 'other'" in capsys.readouterr().err


def test_without_run_only_the_plan_is_printed(place, capsys):
    where = place / "planned"
    given = [f"--gin_file={place / 'ours.gin'}", f"--folder={where}"]
    assert cli.main(["sweep", *given, f"--json={place / 'plan.json'}"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"nothing has run: --run starts it in {where}"
    assert "Which is better?" in said and "3 trials" in said and not where.exists()
    cells = json.loads((place / "plan.json").read_text())["cells"]
    assert [cell["cell"] for cell in cells] == ["two", "one", "wild"]


def test_every_cell_that_cannot_be_is_told_before_anything_runs(place, capsys):
    wrong = place / "wrong.gin"
    base = str(place / "base.gin")
    wrong.write_text(
        f"sweep.question = '?'\nsweep.base = ({base!r},)\nsweep.baseline = 'a'\n"
        "sweep.arms = {'a': (), 'b': ('TopK.kk = 1',), 'c': ('nowhere.gin',)}\n"
        "sweep.axes = {'MoELayer.num_experts': (1, 4)}\n"
    )
    assert cli.main(["sweep", f"--gin_file={wrong}", f"--folder={place / 'wrong'}", "--run"]) == 2
    said = capsys.readouterr().err
    assert "c, num_experts=1: nowhere.gin: no such file" in said
    wrong.write_text(wrong.read_text().replace(", 'c': ('nowhere.gin',)", ""))
    assert cli.main(["sweep", f"--gin_file={wrong}", f"--folder={place / 'wrong'}", "--run"]) == 2
    said = capsys.readouterr().err
    assert "a, num_experts=1: " in said and "b, num_experts=4: " in said and "TopK has no" in said
    assert not (place / "wrong").exists()
    assert cli.main(["sweep", f"--folder={place / 'wrong'}"]) == 2
    assert "shipped are sweeps/balance.gin" in capsys.readouterr().err
    assert cli.main(["sweep"]) == 2
    assert "needs --gin_file=NAME, or the --folder" in capsys.readouterr().err
    assert cli.main(["sweep", "--list", "--gin_file=sweeps/x.gin"]) == 0
    assert "runs/x: no trial has ended yet" in capsys.readouterr().out


@pytest.mark.thorough
def test_a_slurm_array_of_workers_finishes_a_sweep(swept, place, capsys):
    """The line of the script that each task runs, on a sweep with a trial left."""
    folder, *_ = swept
    script = place / "job.sh"
    assert cli.main(command(place, f"--slurm={script}", "--workers=2")) == 0
    text = script.read_text()
    assert "#SBATCH --array=1-2" in text and "#SBATCH --signal=B:TERM@" in text
    wild = folder.trial("wild/report-1")
    wild.result.unlink()
    wild.begun.write_text("as before an edit\n")
    (line,) = [line for line in text.splitlines() if line.startswith("exec ")]
    ended = subprocess.run(line.split()[1:], env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert wild.result.exists()
    assert "starting anew: the trial has begun with another config" in wild.log.read_text()
