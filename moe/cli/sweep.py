"""`moe sweep`: compares arms at matched budgets; without `--run` it only prints the plan."""

import json
from pathlib import Path
import sys

from moe import settings
from moe.cli import config
from moe.errors import UserError, nearest, printable
from moe.machine import hardware
from moe.runs.tracking import progress
from moe.settings import read
from moe.sweeps import plan as plans
from moe.sweeps import ray_workers, slurm
from moe.sweeps import run as runs
from moe.sweeps.plan import Plan
from moe.sweeps.record import SweepFolder
from moe.sweeps.report import listed, planned
from moe.sweeps.spec import SweepSpec
from moe.sweeps.worker import Place, places


def run(flags) -> int:
    """Print the plan, or run what is left of it; `--json` also writes the plan."""
    folder = SweepFolder(folder_of(flags.folder, flags.gin_file))
    if flags.list:
        if flags.folder and not folder.plan.exists():
            raise UserError(f"--folder={flags.folder} holds no sweep{others_than(folder.path)}")
        print(printable(listed(folder)))
        return 0
    ray = ray_workers.connected(flags.ray) if flags.ray else None
    workers, _ = ray_workers.size(ray, flags.workers) if ray else (0, None)
    where = [] if ray else places(flags.workers)
    plan = read_plan(flags.gin_file, flags.gin_bindings)
    print(planned(plan, folder.table(warn), hardware.matmul_peak("float32"), workers or len(where)))
    if flags.json:
        Path(flags.json).write_text(json.dumps(plan.as_json(), indent=2) + "\n", encoding="utf-8")
    if not (flags.run or flags.slurm):
        print(f"\nnothing has run: --run starts it in {folder.path}")
        return 0
    with runs.one_driver(folder):  # nothing is written beside another that runs
        results = runs.begin(plan, folder, print, retry=flags.retry_failed)
        for name in runs.forget_failures(folder, results) if flags.retry_failed else ():
            print(f"{name} runs again")
    if flags.slurm:
        print(slurm.write(folder, Path(flags.slurm), flags.workers or 8))
        return 0
    done = drive(plan, folder, where, ray, flags.workers)
    if not done:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"\n{listed(folder)}")
    ended = folder.results().values()
    if not any(row["phase"] == "report" and row["status"] == "finished" for row in ended):
        raise UserError(
            f"{folder.path}: nothing can be reported, as no run of any arm has finished: mend what "
            "is named above, and add --retry_failed"
        )
    print(f"\nmoe report {folder.path} draws and judges them")
    return 0


def warn(line: str) -> None:
    print(line, file=sys.stderr)


def others_than(path: Path) -> str:
    """A hint at the sweeps beside a folder that holds none."""
    beside = [found.parent for found in sorted(path.absolute().parent.glob("*/sweep.json"))]
    names = [folder.name for folder in beside]
    return nearest(path.name, names) or (f"; beside it are {', '.join(names[:5])}" if names else "")


def folder_of(given: str | None, gin_files: list[str]) -> Path:
    """The sweep's folder: the one given, or runs/ with the name of the last config.

    Raises:
        UserError: neither is there.
    """
    if given:
        return Path(given)
    if not gin_files:
        shipped = [n for n in read.shipped_names() if n.startswith("sweeps/")]
        raise UserError(
            "moe sweep needs --gin_file=NAME, or the --folder=FOLDER of one that has begun; "
            f"shipped are {', '.join(shipped)}"
        )
    return Path("runs") / Path(gin_files[-1]).stem


def drive(plan: Plan, folder: SweepFolder, where: list[Place], ray, workers: int) -> bool:
    """Run what is left, at these places or on a Ray cluster; whether all has ended."""

    def say(line: str) -> None:
        print(line, flush=True)

    if ray:
        return ray_workers.run(plan, folder, ray, workers, say)
    return runs.run(plan, folder, where, say)


def read_plan(gin_files: list[str], gin_bindings: list[str]) -> Plan:
    """The plan of a sweep's config, its cells built and matched.

    Raises:
        UserError: no config, or mistakes in it, with a line for each.
    """
    if not gin_files:
        shipped = [n for n in read.shipped_names() if n.startswith("sweeps/")]
        raise UserError(f"moe sweep needs --gin_file=NAME; shipped are {', '.join(shipped)}")
    config.bind(gin_files, gin_bindings)
    spec = SweepSpec()  # pyright: ignore[reportCallIssue]
    settings.refuse_ignored(print)
    name = Path(gin_files[-1]).stem

    def work(say):
        yield plans.make(spec, name, say)

    [plan] = progress.with_status(work)
    return plan
