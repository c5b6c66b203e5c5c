"""`moe launch`: processes of one machine that end together and are started again.

The launcher's own rules are tried with processes of a few lines. Seen red: without the bound the
run that saves nothing starts without an end; with the others' lines printed at once each is there
twice; without the counter's reset a run that saves is given up.
"""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

from moe.cli import main as cli
from moe.machine import exits
from moe.runs.launch import launch
from moe.runs.storage import manifest
from moe.runs.storage.folder import RunFolder

# A launcher forks, with no JAX at work in it; here there is.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")

# What each process does, by its index i and the run's folder; `count` is how often it has started.
START = """
import os, pathlib, signal, sys, time
i, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
log = folder / f"starts{i}"
count = len(log.read_text()) + 1 if log.exists() else 1
log.write_text("x" * count)
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def launched(tmp_path, capfd):
    def run(body, count=2, restarts=2):
        said = []

        def command(address, process):
            return [sys.executable, "-c", START + body, str(process), str(tmp_path)]

        code = launch(command, count, RunFolder(tmp_path), restarts, said.append)
        return code, said, capfd.readouterr()

    return run


def test_one_that_is_killed_is_started_again_with_the_others(launched):
    body = "if count == 1: time.sleep(0.3); die() if i else time.sleep(60)\nprint('ended')"
    code, said, out = launched(body)
    assert code == 0 and out.out == "ended\n"
    assert said == [
        "process 1 of 2 was killed by SIGKILL; nothing is saved yet; starting again, restart 1 of "
        "at most 2 without a save"
    ]


def test_a_run_that_saves_nothing_is_given_up(launched, tmp_path):
    code, said, _ = launched("die()")
    assert code == exits.NO_PROGRESS and (tmp_path / "starts0").read_text() == "xxx"
    assert "2 restarts have saved nothing new: mend the cause" in said[-1]


def test_a_run_that_saves_is_started_as_often_as_it_takes(launched, tmp_path):
    for step in range(1, 6):
        folder = tmp_path / "saves" / str(step)
        folder.mkdir(parents=True)
        manifest.write(folder, step)
    body = """
(folder / "checkpoints").mkdir(exist_ok=True)
if count <= 5:
    (folder / "saves" / str(count)).rename(folder / "checkpoints" / str(count))
    die()
"""
    code, said, _ = launched(body, count=1, restarts=1)
    assert code == 0 and len(said) == 5 and "step 5 is saved" in said[-1]


@pytest.mark.parametrize("status", [exits.MISTAKE, 128 + signal.SIGTERM])
def test_neither_a_mistake_nor_an_interruption_is_tried_again(launched, tmp_path, status):
    code, said, _ = launched(f"sys.exit({status} if i else 80)")
    assert code == status and not said and (tmp_path / "starts0").read_text() == "x"


def test_what_the_others_say_is_shown_where_it_differs(launched):
    body = """
if i == 0: time.sleep(0.3)
print("[Gloo] connected", "step 1", f"own of {i}", sep="\\n")
"""
    code, _, out = launched(body, count=3)
    assert code == 0
    lines = out.out.splitlines()
    assert lines[:2] == ["step 1", "own of 0"]
    assert sorted(lines[2:]) == ["[1] own of 1", "[2] own of 2"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["eval"], "moe launch runs train, not 'eval'"),
        (["train", "--gin_file=a.gin"], "moe train needs --workdir=FOLDER"),
        (["train", "--workdir=a", "--process=1"], "moe launch sets --process itself"),
    ],
)
def test_what_cannot_be_launched_is_told_before(given, expected, capsys):
    assert cli.main(["launch", "--processes=2", "--", *given]) == exits.MISTAKE
    assert expected in capsys.readouterr().err


# Real runs.


def started(runs, processes, run, *bindings):
    command = [sys.executable, "-m", "moe", "launch", f"--processes={processes}", "--", "train"]
    given = [f"--gin_bindings={binding}" for binding in bindings]
    return subprocess.Popen(
        [*command, f"--gin_file={runs.config}", f"--workdir={run}", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=tiny.environment(),
    )


def children(launcher, part):
    """Process ids of a launcher's children with a word in their command."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (path / "cmdline").read_text()
        except (OSError, ValueError, IndexError):
            continue
        if parent == launcher.pid and part in command:
            found.append(int(path.name))
    return found


def wait_for(path, child, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and child.poll() is None:
        if path.exists():
            return
        time.sleep(0.05)
    pytest.fail(f"no {path}: {child.communicate()[0] if child.poll() is not None else 'waiting'}")


STEPS = ("Transformer.num_layers = 1", "train.save_every = 10", "train.batch_size = 8")


@pytest.mark.thorough
def test_a_killed_process_costs_nothing_and_the_number_may_change(tmp_path_factory):
    """Four processes, one of them killed; then stopped, and ended by two: the curve of one."""
    runs = tiny.Runs(tmp_path_factory.mktemp("launched"))
    run = runs.folder / "run"
    long = (*STEPS, "train.steps = 400")
    child = started(runs, 4, run, *long)
    wait_for(run / "checkpoints" / "20", child)
    os.kill(children(child, "--process=2")[0], signal.SIGKILL)
    wait_for(run / "checkpoints" / "200", child)
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 128 + signal.SIGTERM, said
    assert "process 2 of 4 was killed by SIGKILL" in said and "restart 1 of at most 3" in said
    child = started(runs, 2, run, *long)
    said = child.communicate(timeout=240)[0]
    assert child.returncode == 0 and "continuing at step" in said, said
    assert json.loads((run / "summary.json").read_text())["step"] == 400
    alone = runs.done("alone", *long)
    ours, theirs = tiny.measured(run), tiny.measured(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-3, err_msg=str(a["step"]))


@pytest.mark.thorough
def test_no_process_outlives_a_launcher_that_is_killed(tmp_path_factory):
    runs = tiny.Runs(tmp_path_factory.mktemp("orphans"))
    run = runs.folder / "run"
    child = started(runs, 2, run, *STEPS, "train.steps = 100000")
    wait_for(run / "checkpoints" / "10", child)
    there = children(child, "--process=")
    assert len(there) == 2
    child.kill()
    child.communicate()
    end = time.monotonic() + 60
    while time.monotonic() < end and any(map(runs_on, there)):
        time.sleep(0.2)
    assert not any(map(runs_on, there))


def runs_on(pid):
    """Whether a process is there, and not only its exit status, which nobody has asked for."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"
