"""Workers take trials from a sweep's folder until none is left, each trial in a process of its own.

Any number of workers, on any machines that share the folder, may come and go: a trial is claimed by
a lock that ends with its worker, a trial that was cut off goes on from its checkpoint, and which
trials there are follows from the plan and the results alone.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import fcntl
import os
from pathlib import Path
import subprocess
import sys
import threading
import time

from moe import received
from moe.errors import UserError
from moe.runs.storage.json_files import write_json
from moe.sweeps.cell import Trial
from moe.sweeps.plan import Plan
from moe.sweeps.record import VERSION, Row, SweepFolder, TrialFolder
from moe.sweeps.trial import INTERRUPTED

ATTEMPTS = 2  # of a trial that crashes
POLL_SECONDS = 0.2
WAIT_SECONDS = 30  # for a process that was told to save and end

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Place:
    """What one worker's trials run on.

    Attributes:
        cores: of the CPU; all where empty.
        device: an accelerator, by its number or name; None for all, or none.
    """

    cores: tuple[int, ...] = ()
    device: str | None = None

    def environment(self) -> dict[str, str]:
        """The environment of a trial's process."""
        chosen = {} if self.device is None else {"CUDA_VISIBLE_DEVICES": self.device}
        return os.environ | chosen


def places(workers: int) -> list[Place]:
    """A place for each worker: accelerators one by one, or else the cores divided among them."""
    devices = gpus()
    if devices and os.environ.get("JAX_PLATFORMS") != "cpu":
        return [Place(device=device) for device in devices[: workers or None]]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    number = workers or max(1, len(cores))
    if number > max(1, len(cores)):
        raise UserError(f"--workers={number}: this machine has {len(cores)} cores")
    return [Place(tuple(cores[i::number])) for i in range(number)]


def gpus() -> list[str]:
    """The GPUs that this process may use, by number or name."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device for device in given.split(",") if device]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


@dataclasses.dataclass
class Worker:
    """One worker.

    Attributes:
        ended: called with the trial and its row after each trial that has ended for good.
        stop: set from outside to end after saving.
    """

    folder: SweepFolder
    plan: Plan
    place: Place
    ended: Callable[[Trial, Row], None]
    stop: threading.Event

    def run(self) -> None:
        """Take trials until none is left or `stop` is set.

        Raises:
            UserError: the disk is full.
        """
        while not self.stop.is_set():
            results = self.folder.results()
            trials = self.plan.trials_now(results)
            left = [trial for trial in trials if trial.name not in results]
            if not left:
                return
            if not any(self.take(trial) for trial in left):
                self.stop.wait(5 * POLL_SECONDS)  # others run them

    def take(self, trial: Trial) -> bool:
        """Run a trial unless another worker has it; whether it was run."""
        folder = self.folder.trial(trial.name)
        folder.path.mkdir(parents=True, exist_ok=True)
        with claimed(folder) as mine:
            if not mine or folder.result.exists():
                return False
            row = self.attempts(trial, folder)
            if row is not None:
                self.ended(trial, row)
            return True

    def attempts(self, trial: Trial, folder: TrialFolder) -> Row | None:
        """The trial's row once it has ended for good; None where it was told to stop."""
        identity = identity_of(trial, self.plan)
        write_json(folder.identity, identity)
        if folder.config.exists() and folder.config.read_text(encoding="utf-8") != trial.text():
            folder.attempts.unlink(missing_ok=True)  # were of another config
        folder.config.write_text(trial.text(), encoding="utf-8")
        failed = received.read_json(folder.attempts) if folder.attempts.exists() else []
        while len(failed) < ATTEMPTS:
            code = self.process(trial, folder)
            if folder.result.exists():
                return received.read_json(folder.result)
            if self.stop.is_set():
                return None
            outcome = outcome_of(folder, code)
            if outcome["status"] == "busy":  # the last process of a killed worker still saves
                time.sleep(5 * POLL_SECONDS)
                continue
            if "No space left" in outcome["reason"]:
                raise UserError(f"{folder.path}: {outcome['reason']}; free some and start again")
            again = outcome.pop("again", True)
            failed.append(outcome)
            write_json(folder.attempts, failed)
            if outcome["status"] == "diverged" or not again:  # it would end alike
                break
        row = identity | failed[-1] | costs_of(trial)
        write_json(folder.result, row)
        return row

    def process(self, trial: Trial, folder: TrialFolder) -> int:
        """Run the trial's process to its end; returns its exit status."""
        folder.outcome.unlink(missing_ok=True)
        cores = ",".join(map(str, self.place.cores))
        command = [sys.executable, "-m", "moe.cli.sweep_trial", str(folder.path), cores]
        environment = self.place.environment()
        folders = [*trial.cell.folders, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        with open(folder.log, "ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
            )
            assert child.stdin is not None
            while child.poll() is None and not self.stop.is_set():
                time.sleep(POLL_SECONDS)
            child.stdin.close()  # tells a running one to save and end
            try:
                return child.wait(WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                return child.wait()


def identity_of(trial: Trial, plan: Plan) -> Row:
    """What a row says of its trial before it is run."""
    return {
        "version": VERSION,
        "sweep": plan.name,
        "trial": trial.name,
        "cell": trial.cell.name,
        "arm": trial.cell.arm,
        "axes": trial.cell.axes,
        "phase": trial.phase,
        "number": trial.number,
        "seed": trial.seed,
        "tuned": trial.tuned,
        "given": trial.text(),
    }


def costs_of(trial: Trial) -> Row:
    """The costs of a trial that failed, and no results."""
    facts = trial.cell.facts
    names = "parameters_total parameters_active flops_per_token steps tokens training_flops".split()
    missing = "bits_per_byte validation_bits_per_byte document_bits document_bytes".split()
    return {name: facts[name] for name in names} | dict.fromkeys(missing)


def outcome_of(folder: TrialFolder, code: int) -> Row:
    """Status and reason of an attempt that left no result.

    code: the process's exit status, negative for a signal.
    """
    found = received.read_json(folder.outcome) if folder.outcome.exists() else None
    if found is not None:
        busy = " is in use by " in found["reason"]
        return found | ({"status": "busy"} if busy else {})
    if code == -9:
        return {
            "status": "out of memory",
            "reason": "killed, as the system does for want of memory",
        }
    if code == INTERRUPTED:
        return {"status": "crashed", "reason": "it was told to stop from outside"}
    return {"status": "crashed", "reason": f"exit status {code}; see {folder.log}"}


@contextlib.contextmanager
def claimed(folder: TrialFolder) -> Iterator[bool]:
    """Whether the trial is this worker's, meanwhile; the claim ends with the process, too."""
    with open(folder.claim, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
