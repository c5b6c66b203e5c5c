"""A small run that is killed at random moments and always continued by the same command.

    python benchmarks/faults_kills.py --out benchmarks/results/faults_kills.json

Each process trains until SIGKILL, at a moment drawn uniformly from the time that a whole
uninterrupted run takes; a run that ends before is compared with the uninterrupted one, bit for bit,
and the next run begins. Processes are forked from one that has imported everything and started
nothing, and share a cache of compiled programs: 100 kills take some ten minutes on two cores.
"""

import argparse
import collections
from collections.abc import Callable
import json
import os
from pathlib import Path
import random
import signal
import sys
import time

# No device is touched before the fork.
from campaigns import prepared, tell
import grain
import numpy as np
import orbax.checkpoint as ocp
import tiny
import tokenizers

from moe.cli import config
from moe.cli import main as cli
from moe.machine import hardware
from moe.runs import train
from moe.runs.storage import manifest

IMPORTED = grain, tokenizers, config, train
CONFIG = """
include 'tiny.gin'
TextFiles.paths = {text!r}
TopK.losses = ()
TopK.balancer = @BiasBalancer
train.optimizer = @AdamW()
train.bad_steps = @SkipBadSteps()
SkipBadSteps.sigmas = 3.0
SkipBadSteps.window = 4
SkipBadSteps.most = 1000
train.steps = {steps}
train.save_every = 3
train.eval_every = 10
train.eval_bytes = 500
train.artifacts = False
"""
SPEED = ("speed/", "step_seconds")


class Campaign:
    """A folder with a text, a config and runs; `trains` does in a process what `moe train` does."""

    def __init__(self, folder: Path, steps: int, more: tuple[str, ...] = ()):
        self.folder, self.log = folder, folder / "log.txt"
        (folder / "tiny.gin").write_text(tiny.BASE, encoding="utf-8")
        self.config = folder / "run.gin"
        given = CONFIG.format(text=str(tiny.corpus(folder / "text")), steps=steps)
        names = tuple(setting.split(" = ")[0] + " =" for setting in more)
        kept = [line for line in given.splitlines() if not line.startswith(names)] if more else []
        given = "\n".join([*kept, *more, ""]) if more else given
        self.config.write_text(given, encoding="utf-8")
        self.steps = steps

    def trains(self, run: Path, first: Callable[[], object] = lambda: None) -> int:
        """The id of a process that trains, or goes on with, a run, after the call of `first`."""
        hardware.matmul_peak = lambda dtype=None: 1e11  # not measured each time

        def work() -> int:
            first()
            return cli.main(["train", f"--gin_file={self.config}", f"--workdir={run}"])

        return forked(work, self.log)

    def newest(self, run: Path) -> int:
        """The step of the newest checkpoint; each has to be sound, and none set aside."""
        assert not list(run.glob("damaged-checkpoint-*")), "a kill looked like damage"
        found = [p for p in (run / "checkpoints").glob("*") if p.name.isdecimal()]
        for path in found:
            assert not (faults := manifest.faults(path)), (path, faults)
        return max((int(path.name) for path in found), default=0)

    def result(self, run: Path) -> dict:
        """All that has to be equal: the curve, the routing, the kept steps and the scores."""
        curves = {
            name: [
                {k: v for k, v in json.loads(line).items() if not k.startswith(SPEED)}
                for line in (run / name).read_text(encoding="utf-8").splitlines()
            ]
            for name in ("metrics.jsonl", "routing.jsonl", "documents.jsonl")
        }
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        kept = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
        scores = {k: summary[k] for k in ("step", "val_loss", "skipped_steps")}
        return {**curves, "kept": kept, "scores": scores}

    def final_arrays(self, run: Path, out: Path) -> dict[str, np.ndarray]:
        """The arrays of the last checkpoint, read in a process of their own."""

        def read() -> int:
            path = (run / "checkpoints" / str(self.steps) / "state").absolute()
            found = ocp.StandardCheckpointer().restore(path)
            np.savez(out, **{name: np.asarray(a) for name, a in found.items()})
            return 0

        assert ended(forked(read, self.log)) == 0
        with np.load(out) as arrays:
            return dict(arrays)


def forked(work: Callable[[], int], log: Path) -> int:
    """A process that does the work and writes what it prints to a log."""
    pid = os.fork()
    if pid:
        return pid
    try:
        with log.open("a", encoding="utf-8") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
            status = work()
            sys.stdout.flush()
        os._exit(status)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:  # also where nothing can be printed: the child must not go on as its parent
        os._exit(70)


def ended(pid: int) -> int:
    """A process's exit status, negative for a signal, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(pid: int, seconds: float) -> int:
    """The status of a process that gets SIGKILL after so many seconds, if it is still there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return ended(pid)


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    """Whether two sets of arrays are equal, bit for bit."""
    return ours.keys() == theirs.keys() and all(
        ours[n].dtype == theirs[n].dtype and ours[n].tobytes() == theirs[n].tobytes() for n in ours
    )


def campaign(folder: Path, kills: int, steps: int, most_seconds: float, seed: int = 0) -> dict:
    """Kill until there are so many kills, or the time is over, then let the last run end."""
    runs, draw, began = Campaign(folder, steps), random.Random(seed), time.monotonic()
    whole = folder / "whole"
    assert ended(runs.trains(folder / "warm")) == 0, runs.log.read_text()
    start = time.monotonic()
    assert ended(runs.trains(whole)) == 0, runs.log.read_text()
    lasts = time.monotonic() - start
    expected, arrays = runs.result(whole), runs.final_arrays(whole, folder / "whole.npz")
    count, number, lost, unequal, at = 0, 0, 0, 0, collections.Counter()
    run, before = folder / "run 0", 0
    while True:
        over = count >= kills or time.monotonic() - began > most_seconds
        pid = runs.trains(run)
        status = ended(pid) if over else killed(pid, draw.uniform(0, lasts))
        assert status in (0, -signal.SIGKILL), (status, runs.log.read_text()[-2000:])
        newest = runs.newest(run)
        lost += newest < before
        before = newest
        if status:
            count += 1
            at["before a checkpoint" if not newest else f"from step {newest // 10 * 10}"] += 1
            continue
        equal = runs.result(run) == expected
        equal &= same(runs.final_arrays(run, folder / f"run {number}.npz"), arrays)
        unequal += not equal
        number += 1
        run, before = folder / f"run {number}", 0
        if over:
            break
    return {
        "kills": count,
        "runs": number,
        "runs_not_bit_identical": unequal,
        "checkpoints_lost": lost,
        "kills_by_newest_checkpoint": dict(sorted(at.items())),
        "steps": steps,
        "seconds_of_a_whole_run": round(lasts, 2),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--most_seconds", type=float, default=1e9)
    given = parser.parse_args()
    with prepared() as folder:
        result = campaign(folder, given.kills, given.steps, given.most_seconds)
    tell(result, given.out)


if __name__ == "__main__":
    main()
