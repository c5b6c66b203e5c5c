"""Runs that are struck at named points, raced for, or have filled a disk.

    python benchmarks/faults_runs.py [points signals races disk] --out OUT.json

Each run that is struck is continued by the same command; once it ends it is compared with an
uninterrupted one, bit for bit: curve, routing, kept checkpoints, scores and final weights. Parts:

    points   20 SIGKILLs at each named point of `fault_points.py`; the best checkpoint stays
    signals  20 SIGTERMs in each phase, from imports to results
    races    two processes that start together on one folder, 50 times
    disk     a disk that is full from a random moment on, 20 times: a small tmpfs for the superuser,
             and a limit on the size of files for others
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import json
import os
from pathlib import Path
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

# No device is touched before the fork.
from campaigns import prepared, tell
import fault_points
from faults_kills import Campaign, ended, same
import tiny

STEPS = 12
# The held-out loss goes up and down, so that the best checkpoint is none of the last.
MORE = ("train.eval_every = 2", "train.keep = 1", "AdamW.learning_rate = 0.3")
MEGABYTES = 6  # of the disk that fills
WHOLE = "it had written all"


class Runs:
    """A campaign with its uninterrupted run, and runs that are compared with it."""

    def __init__(self, folder: Path, steps: int = STEPS, more: tuple[str, ...] = MORE):
        self.runs, self.folder = Campaign(folder, steps, more), folder
        whole = folder / "whole"
        assert ended(self.runs.trains(folder / "warm")) == 0, self.runs.log.read_text()
        assert ended(self.runs.trains(whole)) == 0, self.runs.log.read_text()
        self.expected = self.runs.result(whole)
        self.arrays = self.runs.final_arrays(whole, folder / "whole.npz")
        self.files = names(whole)
        self.number, self.unequal, self.lost, self.best_lost, self.more_kept = 0, [], 0, 0, 0
        self.fresh()

    def fresh(self) -> None:
        """Begin another run."""
        self.number += 1
        self.run = self.folder / f"run {self.number}"
        self.newest, self.best, self.struck_at = 0, {}, []

    def struck(self, first: Callable[[], object] = lambda: None, at: str = "") -> int:
        """The exit status of a process that goes on with the run; a whole one is compared.

        at: where it is struck, to be told where something was lost.
        """
        self.struck_at += [at] if at else []
        return self.looked_at(ended(self.runs.trains(self.run, first)))

    def looked_at(self, status: int) -> int:
        """The status, after counting what was lost; a run that has ended well is compared."""
        newest = self.runs.newest(self.run)
        self.lost += newest < self.newest
        self.newest, there = newest, scores(self.run)
        self.best |= there
        if self.best:
            self.best_lost += min(self.best, key=lambda step: self.best[step]) not in there
        if status == 0 and self.complete():
            self.compare()
            self.fresh()
        return status

    def complete(self) -> bool:
        """Whether the run has its results."""
        return (self.run / "summary.json").exists()

    def compare(self) -> None:
        """Count a run that is not equal to the uninterrupted one."""
        found, out = self.runs.result(self.run), self.folder / f"run {self.number}.npz"
        # Killed after its last save, a run has no other that deletes the checkpoint before.
        kept, needed = set(found.pop("kept")), set(self.expected["kept"])
        self.more_kept += kept > needed
        differs = [name for name, value in found.items() if value != self.expected[name]]
        differs += ["kept"] if needed - kept else []
        if not same(self.runs.final_arrays(self.run, out), self.arrays):
            differs.append("weights")
        if differs:
            self.unequal.append({"struck at": self.struck_at, "differs": differs})
            print(self.unequal[-1], flush=True)
        shutil.rmtree(self.run)

    def end(self) -> None:
        """Let the last run end."""
        while self.run.exists():
            assert self.struck() == 0, self.runs.log.read_text()[-2000:]

    def found(self) -> dict[str, int]:
        return {
            "runs": self.number - 1,
            "runs_not_bit_identical": len(self.unequal),
            "differences": self.unequal,
            "runs_with_a_checkpoint_too_many": self.more_kept,
            "checkpoints_lost": self.lost,
            "best_checkpoints_lost": self.best_lost,
        }


def names(run: Path) -> list[str]:
    """The names of a run's files, those aside that differ from start to start."""
    found = (p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())
    return sorted(name for name in found if not name.startswith(("tensorboard", "checkpoints")))


def scores(run: Path) -> dict[int, float]:
    """The held-out loss of each checkpoint that has one, by step."""
    found = {}
    for path in (run / "checkpoints").glob("*/metrics/metrics"):
        if path.parents[1].name.isdecimal():
            found[int(path.parents[1].name)] = json.loads(path.read_text())["val_loss"]
    return found


def points(folder: Path, each: int, draw: random.Random) -> dict:
    """SIGKILL so many times at each named point."""
    runs, counts = Runs(folder), {}
    for point in fault_points.KILLS:
        count = tries = 0
        while count < each:
            tries += 1
            assert tries < 6 * each, (point, runs.runs.log.read_text()[-2000:])
            once = (*fault_points.ONCE, *fault_points.AT_THE_END)
            nth = 1 if point in once else draw.randint(1, 3)
            if point in fault_points.ONCE and tries % 3 == 0:  # so that the run gets further
                runs.struck(fault_points.at("a checkpoint is renamed", 2, signal.SIGKILL))
            status = runs.struck(fault_points.at(point, nth, signal.SIGKILL), f"{point} {nth}")
            assert status in (0, -signal.SIGKILL), runs.runs.log.read_text()[-2000:]
            count += status != 0
        counts[point] = count
        print(f"{point}: {count} kills", flush=True)
    runs.end()
    return {"kills": counts, **runs.found()}


def signals(folder: Path, each: int, draw: random.Random) -> dict:
    """SIGTERM so many times in each phase: each has to be gone in 30 s, with its state saved."""
    runs, counts, slowest = Runs(folder), {}, {}
    for _ in range(each):
        seconds = stopped_early(runs, draw.uniform(0.4, 2))
        slowest["imports"] = max(seconds, slowest.get("imports", 0))
    counts["imports"] = each
    for phase, point in fault_points.STOPS.items():
        count, slowest[phase] = 0, 0.0
        while count < each:
            once = point in (*fault_points.ONCE, *fault_points.AT_THE_END)
            nth, delay = 1 if once else draw.randint(1, 3), draw.uniform(0, 0.2)
            began = time.monotonic()
            status = runs.struck(
                fault_points.at(point, nth, signal.SIGTERM, delay=delay), f"{phase} {nth}"
            )
            assert status in (0, 128 + signal.SIGTERM), runs.runs.log.read_text()[-2000:]
            if status:
                count += 1
                slowest[phase] = max(slowest[phase], time.monotonic() - began)
        counts[phase] = count
        print(f"{phase}: {count} times told to stop", flush=True)
    runs.end()
    assert max(slowest.values()) < 30, slowest
    rounded = {phase: round(seconds, 2) for phase, seconds in slowest.items()}
    return {"signals": counts, "slowest_seconds_of_a_process": rounded, **runs.found()}


def stopped_early(runs: Runs, after: float) -> float:
    """The seconds that a process of its own takes which gets SIGTERM while it imports."""
    words = [sys.executable, "-m", "moe", "train", f"--gin_file={runs.runs.config}"]
    with runs.runs.log.open("ab") as log:
        began = time.monotonic()
        child = subprocess.Popen(
            [*words, f"--workdir={runs.run}"], stdout=log, stderr=log, env=tiny.environment()
        )
        time.sleep(after)
        child.terminate()
        status = child.wait(30)
    assert status == 128 + signal.SIGTERM, (status, after, runs.runs.log.read_text()[-2000:])
    return time.monotonic() - began


def races(folder: Path, number: int, draw: random.Random) -> dict:
    """Two processes that begin at the same time."""
    runs = Runs(folder, 3, ("train.eval_every = None",))
    winners = altered = late = 0
    slowest = 0.0
    for _ in range(number):
        read, write = os.pipe()
        delays = draw.uniform(0, 0.02), draw.uniform(0, 0.02)
        pair = {runs.runs.trains(runs.run, waiting(read, write, delay)): delay for delay in delays}
        os.close(read)
        os.close(write)
        began, statuses, first = time.monotonic(), {}, None
        while len(statuses) < len(pair):
            pid, status = os.wait()
            statuses[pid] = os.waitstatus_to_exitcode(status)
            first = first or (statuses[pid], time.monotonic() - began)
        assert first is not None
        winners += sorted(statuses.values()) == [0, 2]
        slowest = max(slowest, first[1])
        late += first[0] != 2 or first[1] > 5
        altered += names(runs.run) != runs.files
        runs.looked_at(0)
    said = runs.runs.log.read_text().count(" is in use by process ")
    return {
        "races": number,
        "one_wins": winners,
        "losers_that_name_the_holder": said,
        "losers_after_more_than_5_s": late,
        "slowest_loser_seconds": round(slowest, 2),
        "folders_with_other_files": altered,
        **runs.found(),
    }


def waiting(read: int, write: int, seconds: float) -> Callable[[], None]:
    """A function that waits until a pipe is closed elsewhere, and then so many seconds."""

    def waits() -> None:
        os.close(write)
        os.read(read, 1)
        time.sleep(seconds)

    return waits


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of a few megabytes on a folder, where it can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, draw: random.Random) -> None:
    """Leave none, or a few, of a disk's bytes."""
    free = shutil.disk_usage(disk).free
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        file.write(bytes(max(0, free - draw.choice((0, 0, 4096, 20_000, 100_000)))))


def no_larger_files(seconds: float, size: int) -> None:
    """After so many seconds, let this process make no file longer than `size`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for number in (1, 2):  # the log is a file, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)

    def limit() -> None:
        time.sleep(seconds)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    threading.Thread(target=limit, daemon=True).start()


def disk(folder: Path, number: int, draw: random.Random) -> dict:
    """A disk that is full from a random moment on; once there is room, the run goes on."""
    runs, statuses, pages = Runs(folder), {}, 0
    began = time.monotonic()
    assert ended(runs.runs.trains(folder / "timed")) == 0
    lasts = time.monotonic() - began
    with small_disk(folder / "disk") as mounted:
        while sum(statuses.values()) - statuses.get(WHOLE, 0) < number:
            runs.run = folder / "disk" / f"run {runs.number}"
            said = runs.runs.log.stat().st_size
            if mounted:
                pid = runs.runs.trains(runs.run)
                time.sleep(draw.uniform(0.1, 0.9) * lasts)
                fill(folder / "disk", draw)
                status = ended(pid)
                (folder / "disk" / "ballast").unlink(missing_ok=True)
            else:
                when, size = draw.uniform(0.1, 0.9) * lasts, draw.choice((0, 100, 5000, 20_000))
                status = ended(
                    runs.runs.trains(
                        runs.run, lambda when=when, size=size: no_larger_files(when, size)
                    )
                )
            key = WHOLE if status == 0 else str(status)
            statuses[key] = statuses.get(key, 0) + 1
            text = runs.runs.log.read_bytes()[said:].decode(errors="replace")
            if "Traceback" in text:
                pages += 1
                print(text[text.index("Traceback") - 500 :], flush=True)
            runs.looked_at(status)
            print("disk", statuses, flush=True)
        runs.run = folder / "disk" / f"run {runs.number}"
        runs.end()
    how = f"a tmpfs of {MEGABYTES} MB" if mounted else "a limit on the size of files"
    return {"how": how, "statuses": statuses, "tracebacks": pages, **runs.found()}


PARTS = {"points": (points, 20), "signals": (signals, 20), "races": (races, 50), "disk": (disk, 20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="all where none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--number", type=int, help="of faults (at each point, in each phase)")
    given, result = parser.parse_args(), {}
    with prepared() as temporary:
        for name in given.parts or PARTS:
            part, usual = PARTS[name]
            folder, began = temporary / name, time.monotonic()
            folder.mkdir()
            result[name] = part(folder, given.number or usual, random.Random(0))
            result[name]["minutes"] = round((time.monotonic() - began) / 60, 1)
            tell(result, given.out)


if __name__ == "__main__":
    main()
