"""Short forms of the campaigns in benchmarks/: kills, races, full disks and random faults.

Seen red: with a lock that both may hold, both racers win; with a point that is misspelt.
"""

import importlib
import json
import os
from pathlib import Path
import subprocess
import sys

import pytest
import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RACER = """
import sys, time
from moe.errors import UserError
from moe.runs.storage.folder import RunFolder
print("ready", flush=True)
sys.stdin.readline()
began = time.monotonic()
try:
    with RunFolder(sys.argv[1]).locked():
        time.sleep(0.7)
    print("won")
except UserError as error:
    print(f"{time.monotonic() - began:.1f} {error}")
"""


def test_of_two_that_start_together_one_has_the_folder(tmp_path):
    given = [sys.executable, "-c", RACER, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen(given, env=tiny.environment(), **pipes) for _ in range(2)]
    for child in pair:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in pair:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    said = sorted(child.communicate(timeout=30)[0].strip() for child in pair)
    assert said[1] == "won", said
    seconds, line = said[0].split(" ", 1)
    assert float(seconds) < 0.5 and f"is in use by process {holder(pair, said)}" in line


def holder(pair, said) -> str:
    """The processes' ids, as a pattern of what the loser may say."""
    named = [str(child.pid) for child in pair if f"process {child.pid} " in said[0]]
    return named[0] if named else "?"


def test_the_points_are_places_of_the_program(monkeypatch):
    """So that a name that changes is not a campaign that strikes nothing."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    points = importlib.import_module("fault_points")
    assert len(points.KILLS) >= 10 and points.POINTS.keys() >= {*points.KILLS}
    for where, path, _ in points.POINTS.values():
        owner = importlib.import_module(where)
        for part in path.split("."):
            owner = getattr(owner, part)
        assert callable(owner)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("program", "given"),
    [
        ("faults_runs.py", ("points", "signals", "races", "disk", "--number=1")),
        ("faults_soak.py", ("--minutes=1",)),
    ],
)
def test_nothing_is_lost(program, given, tmp_path):
    """In processes that touch no device before they fork."""
    out, env = tmp_path / "found.json", os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    command = [sys.executable, str(BENCHMARKS / program), *given, f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    for part in found.values() if program == "faults_runs.py" else [found]:
        assert part["runs"] > 0 and not part["differences"], part
        assert part["checkpoints_lost"] == part["best_checkpoints_lost"] == 0, part
