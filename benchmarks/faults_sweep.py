"""A sweep of a hundred tiny trials that is killed at random moments and always started again.

    python benchmarks/faults_sweep.py --out benchmarks/results/faults_sweep.json

The same sweep runs twice: undisturbed, and with SIGKILL at moments drawn uniformly, of the sweep's
process alone or of its trials too, until it has ended. No finished trial may run again, and every
row's losses have to be those of the undisturbed sweep, bit for bit. Half an hour on two cores.
"""

import argparse
import json
import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import time

from campaigns import prepared, tell
import tiny

from moe.sweeps.record import SweepFolder

SWEEP = """
sweep.question = 'Which is better?'
sweep.base = (
    {base!r}, 'TextData.validation_fraction = 0.3', 'train.steps = 30', 'train.save_every = 5'
)
sweep.arms = {{'two': (), 'one': ('TopK.k = 1',)}}
sweep.baseline = 'two'
sweep.seeds = {seeds}
sweep.match = None
sweep.controls = ()
"""
# What a trial finds, and no clock touches.
FOUND = ("status", "seed", "tokens", "document_bits", "bits_per_byte", "validation_bits_per_byte")


class Campaign:
    """A folder with a text and a sweep's config.

    trials: how many, half of them for each arm.
    """

    def __init__(self, folder: Path, trials: int):
        self.folder, self.trials = folder, trials
        base = folder / "base.gin"
        text = tiny.corpus(folder / "text")
        base.write_text(f"{tiny.BASE}TextFiles.paths = {str(text)!r}\n", encoding="utf-8")
        self.sweep = folder / "ours.gin"
        text = SWEEP.format(base=str(base), seeds=trials // 2)
        self.sweep.write_text(text, encoding="utf-8")

    def starts(self, name: str) -> subprocess.Popen:
        """The process of the sweep, in a session of its own."""
        words = [sys.executable, "-m", "moe", "sweep", f"--gin_file={self.sweep}", "--run"]
        with (self.folder / f"{name}.txt").open("ab") as log:
            return subprocess.Popen(
                [*words, f"--folder={self.folder / name}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=tiny.environment(),
                start_new_session=True,
            )

    def undisturbed(self) -> tuple[dict, float]:
        """The rows of a sweep that nothing kills, and the seconds that it takes."""
        began = time.monotonic()
        assert self.starts("whole").wait() == 0, (self.folder / "whole.txt").read_text()[-2000:]
        return SweepFolder(self.folder / "whole").results(), time.monotonic() - began

    def killed(self, kills: int, lasts: float, draw: random.Random) -> dict:
        """Kill the sweep so many times, then let it end.

        lasts: seconds of the undisturbed one, over which the kills are spread.
        """
        folder = SweepFolder(self.folder / "killed")
        ended, again, with_trials, done = {}, 0, 0, 0
        while True:
            process, status = self.starts("killed"), None
            try:
                # Kills would otherwise only ever meet the time in which it plans.
                most = 2 * lasts / kills + 10 if done < kills else None
                status = process.wait(most and draw.uniform(0, most))
            except subprocess.TimeoutExpired:
                if draw.random() < 0.5:
                    for child in descendants(process.pid):
                        os.kill(child, signal.SIGKILL)
                    with_trials += 1
                process.kill()
                process.wait()
                done += 1
            now = {path: path.stat().st_mtime_ns for path in results(folder)}
            again += sum(now.get(path) != at for path, at in ended.items())
            ended = now
            if status is not None:
                assert status == 0, (self.folder / "killed.txt").read_text()[-2000:]
                return {
                    "kills": done,
                    "of_them_with_the_trials": with_trials,
                    "finished_trials_that_ran_again": again,
                }


def results(folder: SweepFolder) -> list[Path]:
    """The files of the trials that have ended."""
    return list(folder.path.glob("trials/*/*/result.json"))


def descendants(process: int) -> list[int]:
    """Processes that a process has started, and those of these."""
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                stat = (path / "stat").read_text()
            except OSError:
                continue
            parents[int(path.name)] = int(stat.rsplit(")", 1)[1].split()[1])
    found = [process]
    for parent in found:
        found.extend(child for child, of in parents.items() if of == parent)
    return found[1:]


def campaign(folder: Path, trials: int, kills: int, seed: int = 0) -> dict:
    """Both sweeps, and in what they differ."""
    runs, began = Campaign(folder, trials), time.monotonic()
    whole, lasts = runs.undisturbed()
    result = runs.killed(kills, lasts, random.Random(seed))
    folder_killed = SweepFolder(folder / "killed")
    rows = folder_killed.results()
    table = [json.loads(line) for line in folder_killed.trials.read_text().splitlines()]
    return {
        "trials": trials,
        **result,
        "trials_missing": len(whole.keys() - rows.keys()),
        "rows_in_the_table": len(table),
        "rows_not_bit_identical": sum(
            any(rows[name][k] != whole[name][k] for k in FOUND) for name in rows
        ),
        "trials_that_went_on_from_a_checkpoint": sum(
            "continuing at step" in folder_killed.trial(name).log.read_text() for name in rows
        ),
        "minutes_undisturbed": round(lasts / 60, 1),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--kills", type=int, default=30)
    given = parser.parse_args()
    with prepared() as folder:
        tell(campaign(folder, given.trials, given.kills), given.out)


if __name__ == "__main__":
    main()
