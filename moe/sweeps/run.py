"""`moe sweep --run`: workers on this machine, the progress of the whole, and the tables."""

from collections.abc import Callable
import concurrent.futures
import contextlib
import statistics
import threading
import time

from moe.errors import Problems, UserError
from moe.machine.signals import catching_signals
from moe.runs.storage.folder import RunFolder
from moe.runs.storage.json_files import write_json
from moe.sweeps import plan as plans
from moe.sweeps.cell import Trial
from moe.sweeps.plan import Plan
from moe.sweeps.record import Row, SweepFolder
from moe.sweeps.worker import Place, Worker

Say = Callable[[str], None]


def begin(plan: Plan, folder: SweepFolder, say: Say, retry: bool = False) -> dict[str, Row]:
    """Write the plan, if the folder's finished trials are of it; returns their rows.

    retry: failed trials will run again, so that what they were may change.

    Raises:
        UserError: another sweep's folder, or settings that would change a finished trial.
    """
    before = folder.read_plan()
    if before is not None and before["name"] != plan.name:
        raise UserError(
            f"{folder.path} holds the sweep {before['name']!r}, not {plan.name!r}; name another "
            "--folder"
        )
    results = folder.results()
    kept = {n: row for n, row in results.items() if not retry or row["status"] == "finished"}
    changed = plans.differences(plan, kept)
    if changed:
        raise Problems(
            [
                f"{folder.path}: {len(changed)} finished trials would change; take the change back "
                "or name another --folder:",
                *changed[:10],
            ]
        )
    for name in missing(folder, results, say):
        say(f"{name} has ended before, but its folder is gone: it runs again")
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.plan, plan.as_json())
    return results


def missing(folder: SweepFolder, results: dict[str, Row], say: Say) -> list[str]:
    """Trials in the table whose own folder was deleted."""
    return [row["trial"] for row in folder.table(say) if row["trial"] not in results]


def forget_failures(folder: SweepFolder, results: dict[str, Row]) -> list[str]:
    """Let failed trials run again, from their checkpoints; returns their names."""
    failed = [name for name, row in results.items() if row["status"] != "finished"]
    for name in failed:
        trial = folder.trial(name)
        trial.attempts.unlink(missing_ok=True)
        trial.result.unlink(missing_ok=True)
    return failed


def run(plan: Plan, folder: SweepFolder, places: list[Place], say: Say) -> bool:
    """Run the trials that are left; whether all have ended.

    Raises:
        UserError: another process runs this sweep, or the disk is full.
    """
    with one_driver(folder), catching_signals() as interrupted:
        progress = Progress(plan, folder, say, len(places))
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
            workers = [Worker(folder, plan, place, progress.ended, stop) for place in places]
            running = [pool.submit(worker.run) for worker in workers]
            while not all(future.done() for future in running):
                failed = any(future.done() and future.exception() for future in running)
                if (interrupted or failed) and not stop.is_set():
                    say("stopping: running trials save their state")
                    stop.set()
                time.sleep(0.1)
        ended = finish(plan, folder)
        for future in running:
            future.result()
        return ended and not interrupted


def one_driver(folder: SweepFolder) -> contextlib.AbstractContextManager:
    """Holds the sweep meanwhile. UserError where another process does."""
    return RunFolder(folder.path).locked("wait until it ends, or name another --folder")


def finish(plan: Plan, folder: SweepFolder) -> bool:
    """Write the tables; whether all trials have ended."""
    results = folder.results()
    order = [trial.name for trial in plan.trials_now(results)]
    return len(folder.write_tables(results, order)) == len(order)


class Progress:
    """A line for each trial that ends, with the time left."""

    def __init__(self, plan: Plan, folder: SweepFolder, say: Say, workers: int):
        self.plan, self.folder, self.say, self.workers = plan, folder, say, workers
        self.started, self.seconds = time.monotonic(), []
        self.lock = threading.Lock()

    def ended(self, trial: Trial, row: Row) -> None:
        """Say what a trial came to, and write the tables anew."""
        with self.lock:
            results = self.folder.results()
            order = [t.name for t in self.plan.trials_now(results)]
            rows = self.folder.write_tables(results, order)
            total = max(self.plan.number_of_trials(results), len(order))
            if row.get("wall_seconds"):  # a failed one doesn't say
                self.seconds.append(row["wall_seconds"])
            left = ""
            if self.seconds:
                seconds = statistics.mean(self.seconds) * (total - len(rows)) / self.workers
                left = f"; {minutes(seconds)} left"
            self.say(f"{len(rows)}/{total} {trial.name}: {described(row)}{left}")

    def tell_new(self, told: set[str]) -> None:
        """Say what trials came to that have ended since; `told` has their names from then on."""
        results = self.folder.results()
        trials = {trial.name: trial for trial in self.plan.trials_now(results)}
        for name in sorted(results.keys() - told, key=list(trials).index):
            told.add(name)
            self.ended(trials[name], results[name])


def described(row: Row) -> str:
    """A row in some words."""
    if row["status"] != "finished":
        return f"{row['status']}: {row['reason']}"
    name = "validation_bits_per_byte" if row["phase"] == "tuning" else "bits_per_byte"
    values = ", ".join(f"{k.rsplit('.', 1)[-1]} {v:g}" for k, v in row["tuned"].items())
    with_values = f" with {values}" if values else ""
    return f"{row[name]:.4f} bits per byte{with_values}"


def minutes(seconds: float) -> str:
    """A time in hours and minutes."""
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if hours else f"{rest} min"
