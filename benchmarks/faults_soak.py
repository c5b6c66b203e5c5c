"""Short runs with random faults, unattended, for as long as is asked for.

    python benchmarks/faults_soak.py --minutes=600 --out benchmarks/results/faults_soak.json

Each process goes on with a run and meets one fault, drawn at random; whatever the fault, the same
command follows. Each run that ends is compared with an uninterrupted one, bit for bit.
"""

import argparse
import collections
from collections.abc import Callable
import os
from pathlib import Path
import random
import shutil
import signal
import time

# No device is touched before the fork.
from campaigns import prepared, tell
import fault_points
from faults_kills import ended, killed
from faults_runs import Runs, no_larger_files


class Soak(Runs):
    """Faults for a run, each a method that returns the exit status of the process it strikes."""

    def __init__(self, folder: Path, draw: random.Random):
        super().__init__(folder)
        self.draw, self.unnoticed = draw, 0
        began = time.monotonic()
        assert ended(self.runs.trains(folder / "timed")) == 0
        self.lasts = time.monotonic() - began

    def kill_at_a_random_moment(self) -> int:
        return killed(self.runs.trains(self.run), self.draw.uniform(0, self.lasts))

    def kill_at_a_point(self) -> int:
        point, nth = self.draw.choice([*fault_points.POINTS]), self.draw.randint(1, 3)
        return ended(self.runs.trains(self.run, fault_points.at(point, nth, signal.SIGKILL)))

    def terminate(self) -> int:
        pid = self.runs.trains(self.run)
        time.sleep(self.draw.uniform(0.1, self.lasts))
        os.kill(pid, signal.SIGTERM)
        return ended(pid)

    def stop_for_a_second(self) -> int:
        pid = self.runs.trains(self.run)
        time.sleep(self.draw.uniform(0, self.lasts) / 2)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1)
        os.kill(pid, signal.SIGCONT)
        return ended(pid)

    def start_a_second_process(self) -> int:
        first = self.runs.trains(self.run)
        time.sleep(self.draw.uniform(0.3, self.lasts) / 2)
        second = self.runs.trains(self.run)
        both = sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in (first, second))
        # The second may have come after the first had ended: then it finds the run complete.
        assert both in ([0, 2], [0, 0]), both
        return 0

    def fill_the_disk(self) -> int:
        when, size = self.draw.uniform(0, self.lasts), self.draw.choice((0, 100, 5000, 20_000))
        return ended(self.runs.trains(self.run, lambda: no_larger_files(when, size)))

    def damage_a_checkpoint(self) -> int:
        """One bit of the newest checkpoint, or the end of one of its files, if it has another."""
        steps = [p for p in (self.run / "checkpoints").glob("*") if p.name.isdecimal()]
        complete = (self.run / "summary.json").exists()  # its command reads no checkpoint
        if len(steps) < 2 or complete:
            return self.kill_at_a_point()
        newest = max(steps, key=lambda path: int(path.name))
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        path = self.draw.choice([p for p in files if p.name != "commit_success.txt"])
        content = bytearray(path.read_bytes())
        content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        path.write_bytes(content if self.draw.random() < 0.5 else content[:-1])
        status = ended(self.runs.trains(self.run))
        aside = list(self.run.glob("damaged-checkpoint-*"))
        self.unnoticed += not aside
        for folder in aside:
            shutil.rmtree(folder)
        self.newest, self.best = 0, {}  # this loss is asked for
        return status

    def damage_the_log(self) -> int:
        """A line of metrics.jsonl that a crash has torn, after the newest checkpoint."""
        if (self.run / "metrics.jsonl").exists():
            with (self.run / "metrics.jsonl").open("ab") as file:
                file.write(
                    self.draw.choice((b'{"step": 99, "lo', b"\0" * 100, b"[1]\n", b"\xff\n"))
                )
        return self.kill_at_a_random_moment()


ALLOWED = (0, 2, 143, -signal.SIGKILL, -signal.SIGTERM)


def soak(folder: Path, minutes: float, draw: random.Random) -> dict:
    """Faults until the time is over; then the last run ends."""
    runs, counts, statuses = Soak(folder, draw), collections.Counter(), collections.Counter()
    began = time.monotonic()
    faults: list[Callable[[Soak], int]] = [
        *(Soak.kill_at_a_random_moment, Soak.kill_at_a_point, Soak.terminate),
        *(Soak.stop_for_a_second, Soak.start_a_second_process, Soak.fill_the_disk),
        *(Soak.damage_a_checkpoint, Soak.damage_the_log),
    ]
    while time.monotonic() - began < minutes * 60:
        fault = draw.choice(faults)
        runs.struck_at.append(fault.__name__)
        status = fault(runs)
        assert status in ALLOWED, (fault.__name__, status, runs.runs.log.read_text()[-2000:])
        counts[fault.__name__.replace("_", " ")] += 1
        statuses[str(status)] += 1
        runs.looked_at(status)
    runs.end()
    return {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "faults": dict(sorted(counts.items())),
        "statuses": dict(sorted(statuses.items())),
        "damage_unnoticed": runs.unnoticed,
        **runs.found(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with prepared() as folder:
        result = soak(folder, given.minutes, random.Random(given.seed))
    tell(result, given.out)


if __name__ == "__main__":
    main()
