"""A signal in every phase: saved where there is something to save, and gone with one status.

Seen red: without `of_the_program` an early signal is an exception somewhere; without `stopping`
a signal in the final evaluation is swallowed; without `watch` a second one waits for the step; with
the wall clock Ctrl-Z is a hang.
"""

import json
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny

from moe.machine import exits

BOTH = (signal.SIGINT, signal.SIGTERM)
# A metric that sleeps at a step, as a hung disk or a hung device would.
SLEEPER = """
import time

import gin


@gin.configurable
def sleeper(routing, scalars, calls=[0]):
    calls[0] += 1
    if calls[0] == 5:
        print("asleep", flush=True)
        time.sleep(1000)
    return {}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    (folder / "sleeping.py").write_text(SLEEPER)
    return tiny.Runs(folder)


def started(runs, name, *bindings, imports=""):
    config = runs.folder / f"{name}.gin"
    config.write_text(f"include 'tiny.gin'\n{imports}\nTransformer.num_layers = 1\n")
    given = [f"--gin_bindings={binding}" for binding in bindings]
    command = [sys.executable, "-m", "moe", "train", f"--gin_file={config}", *given]
    return subprocess.Popen(
        [*command, f"--workdir={runs.folder / name}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=tiny.environment(),
    )


def until(child, part):
    """What the process has said until a line with this part."""
    assert child.stdout is not None
    said = ""
    for line in child.stdout:
        said += line
        if part in line:
            return said
    pytest.fail(f"it never said {part!r}: {said}")


def until_it_listens(child):
    """Until SIGTERM is handled: before the first lines of the program it ends any process."""
    caught = 0
    while not caught >> signal.SIGTERM - 1 & 1:
        time.sleep(0.01)
        assert child.poll() is None
        status = Path(f"/proc/{child.pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*([0-9a-f]+)", status)[1], 16)


def ended(child, seconds=30):
    """The rest of what it says, once it has ended."""
    try:
        return child.communicate(timeout=seconds)[0]
    finally:
        child.kill()
        child.communicate()  # closes its pipe, too


def checkpoints(runs, name):
    folder = runs.folder / name / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


@pytest.mark.parametrize(
    ("number", "seconds"),
    [
        *((number, s) for number in BOTH for s in (0.1, 0.5)),
        *(
            pytest.param(number, s, marks=pytest.mark.thorough)
            for number in BOTH
            for s in (0, 0.2, 0.6, 1, 2, 4)
        ),
    ],
)
def test_a_signal_at_the_start_ends_it_at_once(runs, number, seconds):
    """While it imports, reads the text and compiles: no traceback, no segmentation fault."""
    child = started(runs, f"early {number} {seconds}", "train.steps = 100000")
    until_it_listens(child)
    time.sleep(seconds)
    child.send_signal(number)
    said = ended(child)
    assert child.returncode == 128 + number, said
    assert said.splitlines()[-1].startswith("moe: interrupted by SIG")


KEPT = "final evaluation"


@pytest.mark.parametrize(
    "phase",
    [
        KEPT,
        pytest.param("evaluating on", marks=pytest.mark.thorough),
        pytest.param("compiling the training step", marks=pytest.mark.thorough),
        pytest.param("compiled the training step", marks=pytest.mark.thorough),
        pytest.param("compiling the evaluation", marks=pytest.mark.thorough),
        pytest.param("step 3 held out", marks=pytest.mark.thorough),
    ],
)
def test_a_signal_later_leaves_a_run_that_goes_on(runs, phase):
    """The final evaluation is the first phase after the last save."""
    name = phase.replace(" ", "_")
    bindings = ("train.steps = 6", "TextData.validation_fraction = 0.5")
    bindings += ("train.eval_every = 3",) if phase != KEPT else ()
    child = started(runs, name, *bindings)
    part = "evaluating on" if phase == KEPT else phase
    until(child, part)
    child.send_signal(signal.SIGTERM)
    said = ended(child)
    assert child.returncode == 128 + signal.SIGTERM, said
    if part == "evaluating on":
        assert checkpoints(runs, name)[-1] == 6
        assert "stopped after step 6 of 6; the same command goes on" in said
        assert not (runs.folder / name / "summary.json").exists()
    if phase == KEPT:
        return  # the others go on to the end
    again = started(runs, name, *bindings)
    said = ended(again, 120)
    assert again.returncode == 0, said
    assert json.loads((runs.folder / name / "summary.json").read_text())["step"] == 6


STUCK = ("train.steps = 20", "train.metrics = [@sleeper]")


@pytest.mark.thorough
def test_a_second_signal_ends_a_step_that_hangs(runs):
    child = started(runs, "twice", *STUCK, imports="import sleeping")
    until(child, "asleep")
    ends_by_the_second(child)


REMEMBERS = """
import time
from moe.machine import signals
with signals.of_the_program() as caught:
    caught.at_once = False
    print("asleep", flush=True)
    time.sleep(1000)
"""


def test_a_second_signal_ends_a_process_that_is_busy():
    child = subprocess.Popen(
        [sys.executable, "-c", REMEMBERS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=tiny.environment(),
    )
    until(child, "asleep")
    child.send_signal(signal.SIGINT)  # and again, as `timeout` does
    ends_by_the_second(child)


LATE = """
import os, signal, sys, time
from moe.machine import signals
sys.setswitchinterval(0.6)  # the thread that watches learns of the signal that much later
with signals.of_the_program() as caught:
    try:
        with caught.stopping():
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                pass
    except signals.Stopped:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            pass
    time.sleep(0.2)
    print("ended by itself", flush=True)
"""


def test_one_signal_is_one_whoever_learns_of_it_first():
    """On a busy machine the main thread may have left the block before the other one reads."""
    command = [sys.executable, "-c", LATE]
    done = subprocess.run(
        command, capture_output=True, text=True, env=tiny.environment(), timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "ended by itself\n"), done.stderr


def ends_by_the_second(child):
    child.send_signal(signal.SIGINT)
    time.sleep(1)
    assert child.poll() is None, "the first signal waits for the step"
    child.send_signal(signal.SIGINT)
    said = ended(child)
    assert child.returncode == 128 + signal.SIGINT, said
    assert said.splitlines()[-1].startswith("moe: interrupted by SIGINT")


def test_a_step_that_hangs_ends_the_run_and_tells_where(runs):
    bindings = (*STUCK, "train.save_every = 2", "train.hang_seconds = 1")
    child = started(runs, "hung", *bindings, imports="import sleeping")
    said = ended(child, seconds=60)
    assert child.returncode == exits.HUNG, said
    line = said.splitlines()[-1]
    assert "it hangs; stacks in " in line and "step 4 is saved; the same command goes on" in line
    stacks = (runs.folder / "hung" / "stacks-0.txt").read_text()
    assert "in sleeper" in stacks and stacks.count("Thread 0x") > 1


WATCHED = """
import sys, time
from moe.machine.watchdog import Watchdog
with Watchdog(lambda line: print(line, flush=True), seconds=3, least=0) as dog:
    for i in range(3):
        dog.begins("step", i)
        time.sleep(0.05)
    print("ready", flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.mark.thorough
@pytest.mark.parametrize(("works", "barks"), [(5, False), (8, True)])
def test_only_the_time_counts_in_which_a_process_runs(works, barks):
    """Ctrl-Z for four seconds, and `fg`."""
    command = [sys.executable, "-c", WATCHED, str(works)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=tiny.environment())
    until(child, "ready")
    child.send_signal(signal.SIGSTOP)
    time.sleep(4)
    child.send_signal(signal.SIGCONT)
    assert ("it hangs" in ended(child)) == barks
