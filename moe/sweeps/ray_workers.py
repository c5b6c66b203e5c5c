"""Workers of a sweep on a Ray cluster whose machines share the sweep's folder (extra `sweep`).

A worker is a Ray task, which takes trials from the folder until none is left. Ray only places the
workers: claims, results and progress are those of the folder, so that a cluster that is lost loses
nothing, and local workers may help at the same time.
"""

from collections.abc import Callable
import logging
from pathlib import Path
import socket
import threading
from typing import Any

from moe.errors import UserError, first_line
from moe.machine.signals import catching_signals
from moe.sweeps.plan import Plan
from moe.sweeps.record import SweepFolder
from moe.sweeps.run import Progress, finish, one_driver
from moe.sweeps.worker import Place, Worker

POLL_SECONDS = 1.0
RETRIES = 3  # of a worker whose machine is lost


def work(path: str) -> None:
    """A task: take trials of the sweep in this folder until none is left."""
    folder = SweepFolder(Path(path))
    found = folder.read_plan()
    if found is None:
        raise UserError(f"{path} holds no sweep on this machine; its disk must be shared")
    Worker(folder, Plan.of_json(found), Place(), lambda trial, row: None, threading.Event()).run()


def connected(address: str) -> Any:
    """Ray, connected to a cluster; `auto` finds the one that this machine belongs to.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--ray needs the extra `sweep`: pip install 'moe-routing[sweep]'"
        ) from error
    try:
        reach(address)
        ray.init(
            address, log_to_driver=False, logging_level=logging.WARNING, ignore_reinit_error=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--ray={address}: no cluster answers ({first_line(error)}); start one with "
            "`ray start --head`"
        ) from error
    return ray


def reach(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def size(ray: Any, workers: int) -> tuple[int, dict[str, int]]:
    """How many workers, and what each takes of the cluster.

    A GPU each; without any, one worker a machine, which takes its cores. workers: as many; 0 for
    these.

    Raises:
        UserError: the cluster is too small.
    """
    has = ray.cluster_resources()
    cores, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
    machines = sum(node["Alive"] for node in ray.nodes())
    if workers > (gpus or cores):
        told = f"{gpus} GPUs" if gpus else f"{cores} cores"
        raise UserError(f"--workers={workers}: the Ray cluster has {told}")
    if gpus:
        return workers or gpus, {"num_gpus": 1}
    number = workers or machines
    return number, {"num_cpus": max(1, cores // number)}


def run(
    plan: Plan, folder: SweepFolder, ray: Any, workers: int, say: Callable[[str], None]
) -> bool:
    """Run the trials that are left on the cluster; whether all have ended.

    ray: as of `connected`. workers: as in `size`. Ray places a worker anew whose machine is lost.

    Raises:
        UserError: another process runs this sweep, or a worker's disk is full.
    """
    number, takes = size(ray, workers)
    task = ray.remote(max_retries=RETRIES, **takes)(work)
    with one_driver(folder), catching_signals() as interrupted:
        progress = Progress(plan, folder, say, number)
        told = set(folder.results())
        running = [task.remote(str(folder.path.absolute())) for _ in range(number)]
        while running and not interrupted:
            done, running = ray.wait(running, timeout=POLL_SECONDS)
            progress.tell_new(told)
            for one in done:
                check(ray, one, say)
        if interrupted:
            say("stopping: running trials save their state")
            for one in running:  # its trial notices, saves and ends
                ray.cancel(one, force=True)
        return finish(plan, folder) and not interrupted


def check(ray: Any, task: Any, say: Callable[[str], None]) -> None:
    """Raise what a worker has raised; say where it was lost, since others take its trials."""
    try:
        ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        say(f"a worker was lost: {first_line(error)}")
