"""Processes that die or hang: the others end, with one line and a status that says why.

Seen red: without the relay the death of the first process is SIGABRT and a page of C++; without the
judgement by heartbeats a stopped process is waited for without an end.
"""

import dataclasses
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny

from moe.machine import exits
from moe.machine.verdict import State, judge

# Real processes.

# On SIGUSR1 the main thread sleeps, as in a hung device, and the heartbeat goes on.
SLEEPER = """
import signal
import time

signal.signal(signal.SIGUSR1, lambda *_: time.sleep(1000))
"""
STEPS = ("Transformer.num_layers = 1", "train.steps = 100000", "train.save_every = 10")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    (folder / "sleeping.py").write_text(SLEEPER)
    made = tiny.Runs(folder)
    made.config.write_text("import sleeping\n" + made.config.read_text())
    return made


def trained(runs, name, count, victim, number, *bindings):
    """The other processes' exit statuses and error lines after a signal to one, and the seconds."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    run = runs.folder / name
    given = [f"--gin_bindings={binding}" for binding in (*STEPS, *bindings)]
    command = [sys.executable, "-m", "moe", "train", f"--gin_file={runs.config}", *given]
    command += [f"--workdir={run}", f"--processes={count}", f"--coordinator=127.0.0.1:{port}"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen([*command, f"--process={i}"], env=tiny.environment(), **pipes)
        for i in range(count)
    ]
    try:
        end = time.monotonic() + 120
        while not (run / "checkpoints" / "10").exists():
            assert time.monotonic() < end and all(p.poll() is None for p in running)
            time.sleep(0.05)
        running[victim].send_signal(number)
        start = time.monotonic()
        others = [p for i, p in enumerate(running) if i != victim]
        said = [process.communicate(timeout=60)[1] for process in others]
        return [p.returncode for p in others], said, time.monotonic() - start
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("count", "victim"),
    [
        (2, 0),
        pytest.param(2, 1, marks=pytest.mark.thorough),
        pytest.param(4, 0, marks=pytest.mark.thorough),
        pytest.param(4, 3, marks=pytest.mark.thorough),
    ],
)
def test_a_killed_process_ends_the_others(runs, count, victim):
    name = f"killed {count} {victim}"
    codes, said, seconds = trained(
        runs, name, count, victim, signal.SIGKILL, "train.heartbeat_seconds = 10"
    )
    assert codes == [exits.PEER_LOST] * (count - 1), said
    assert seconds < 20
    for lines in said:
        assert len(lines.splitlines()) == 1
        assert lines.startswith(f"moe: process {victim} of {count} was ")
        assert "is saved; the same command goes on" in lines


@pytest.mark.thorough
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_ends_the_others(runs, victim):
    name = f"stopped {victim}"
    codes, said, seconds = trained(
        runs, name, 2, victim, signal.SIGSTOP, "train.heartbeat_seconds = 8"
    )
    assert codes == [exits.PEER_LOST] and seconds < 18
    assert len(said[0].splitlines()) == 1 and f"process {victim} of 2" in said[0]


@pytest.mark.thorough
@pytest.mark.parametrize("victim", [0, 1])
def test_a_hung_process_ends_the_others_and_is_named(runs, victim):
    """Its heartbeat goes on."""
    name = f"hung {victim}"
    codes, said, seconds = trained(runs, name, 2, victim, signal.SIGUSR1, "train.hang_seconds = 4")
    assert codes == [exits.HUNG] and seconds < 14
    assert len(said[0].splitlines()) == 1
    # Where it sleeps after its own part of a step, the other waits in the same one.
    named = f"process {victim} of 2 keeps the others waiting"
    assert named in said[0] or "no other is behind it" in said[0]
    assert "time.sleep" not in said[0] and (runs.folder / name / f"stacks-{victim}.txt").exists()


ABORTS = """
import ctypes, os, sys, threading
from moe.machine import aborts

def failed():
    print("asked", flush=True)
    if sys.argv[1] == "lost":
        os._exit(80)

aborts.ask_first(failed)
threading.Thread(target=NAME).start()
threading.Event().wait(20)
"""


@pytest.mark.parametrize("name", ["abort", "terminate"])
@pytest.mark.parametrize(("how", "code"), [("lost", 80), ("own", -signal.SIGABRT)])
def test_peers_are_asked_before_cpp_gives_up(how, code, name):
    """In another thread than Python's main one, as gloo's."""
    call = {"abort": "CDLL(None).abort", "terminate": "CDLL('libstdc++.so.6')._ZSt9terminatev"}
    program = ABORTS.replace("NAME", f"ctypes.{call[name]}")
    done = subprocess.run(
        [sys.executable, "-c", program, how],
        capture_output=True,
        text=True,
        env=tiny.environment(),
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "asked\n", "")


# The judgement.

WORKS = State(at=("step", 7))


def judged(states, silent=(0, 0, 0), ended=None, patience=30):
    return judge(dict(enumerate(states)), dict(enumerate(silent)), ended or {}, 3, patience)


def changed(**fields):
    return dataclasses.replace(WORKS, **fields)


@pytest.mark.parametrize(
    ("states", "silent", "ended", "expected"),
    [
        ([WORKS] * 3, (0, 29, 0), {}, None),
        ([WORKS] * 3, (0, 31, 0), {}, (exits.PEER_LOST, "process 1 of 3 was not heard of for 31")),
        # A connection broke in process 0: the one that is silent is dead.
        ([changed(failed=True), WORKS, WORKS], (0, 4, 0), {}, None),
        ([changed(failed=True), WORKS, WORKS], (0, 6, 0), {}, (exits.PEER_LOST, "process 1")),
        # The same error in all; an error of one.
        ([changed(failed=True)] * 3, (0, 0, 0), {}, (0, "")),
        ([changed(failed=True), changed(failed=True), WORKS], (0, 0, 0), {}, None),
        ([changed(done=True)] * 3, (0, 0, 0), {}, (0, "")),
        ([changed(done=True), changed(done=True), WORKS], (0, 0, 0), {}, None),
        ([WORKS, changed(code=2), WORKS], (0, 9, 0), {1: 3}, None),
        ([WORKS, changed(code=2), WORKS], (0, 9, 0), {1: 5}, (exits.PEER_LOST, "process 1 of 3")),
        ([WORKS, changed(code=143), WORKS], (0, 9, 0), {1: 5}, (143, "process 1 of 3")),
        # The watchdog of process 0 barks; process 2 is behind.
        (
            [changed(hung="step 7 hangs"), WORKS, changed(at=("step", 6))],
            (0, 0, 0),
            {},
            (exits.HUNG, "step 7 hangs; process 2 of 3 keeps the others waiting"),
        ),
        ([changed(hung="it hangs"), WORKS, WORKS], (0, 0, 0), {}, (exits.HUNG, "in process 0")),
    ],
)
def test_the_verdict(states, silent, ended, expected):
    found = judged(states, silent, ended)
    if expected is None:
        assert found is None
    else:
        assert found is not None and found.code == expected[0] and expected[1] in found.line
