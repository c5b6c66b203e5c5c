"""Named points of a run at which a process can be struck by a signal, and the phases they are in.

A point is a function of the program, before or after its call. `strike` is called in a forked
child; nothing of the program knows of it.
"""

from collections.abc import Callable
import importlib
import os
import threading
from typing import Any

# Name: module, name in it, and whether the signal comes before or after the call.
POINTS = {
    "the lock is taken": ("moe.runs.train", "Setup.of", "before"),
    "the text is read": ("moe.runs.train", "Setup.of", "after"),
    "before a checkpoint is read": ("moe.runs.train", "start.first_state", "before"),
    "a checkpoint is read": ("moe.runs.train", "start.first_state", "after"),
    "run.json is written": ("moe.runs.storage.folder", "write_json", "after"),
    "before the logs are cut": ("moe.runs.storage.folder", "RunFolder.cut_logs", "before"),
    "the folder is ready": ("moe.runs.storage.folder", "RunFolder.begin", "after"),
    "before a program is compiled": ("moe.runs.tracking.progress", "Display.compiling", "before"),
    "a step is trained": ("moe.runs.tracking.metrics_logger", "MetricsLogger.step", "before"),
    "before a line of metrics": ("moe.runs.tracking.logs", "Logs.scalars", "before"),
    "a line of metrics is written": ("moe.runs.tracking.logs", "Logs.scalars", "after"),
    "half a line of metrics": ("moe.runs.tracking.logs", "Logs.scalars", "half"),
    "before an evaluation": ("moe.training.evaluate", "evaluate", "before"),
    "an evaluation is done": ("moe.training.evaluate", "evaluate", "after"),
    "before a save": ("moe.runs.storage.checkpoint", "Checkpoints.save", "before"),
    "a save has begun": ("moe.runs.storage.checkpoint", "Checkpoints.save", "after"),
    "before the manifest": ("moe.runs.storage.manifest", "write", "before"),
    "the manifest is written": ("moe.runs.storage.manifest", "write", "after"),
    "a checkpoint is renamed": ("moe.runs.storage.manifest", "fsync_folder", "renamed"),
    "old checkpoints are to be deleted": ("moe.runs.storage.checkpoint", "shutil.rmtree", "before"),
    "before the last evaluation": ("moe.runs.artifacts", "final_evaluation", "before"),
    "before the results": ("moe.runs.artifacts", "write_documents", "before"),
    "documents are written": ("moe.runs.artifacts", "write_documents", "after"),
    "the summary is written": ("moe.runs.artifacts", "write_json", "after"),
}
# These come once in a process, so that a run struck there each time would not get further.
ONCE = [*POINTS][:8]
AT_THE_END = [*POINTS][-4:]
# Where runs are killed; at the others they are told to stop, or both where somebody asks.
KILLS = (
    *("the text is read", "a checkpoint is read", "run.json is written", "before the logs are cut"),
    *("half a line of metrics", "before an evaluation", "a save has begun", "before the manifest"),
    *("the manifest is written", "a checkpoint is renamed", "old checkpoints are to be deleted"),
    *("documents are written", "the summary is written"),
)

# The phases in which runs are told to stop, and where each begins.
STOPS = {
    "reading the text": "the lock is taken",
    "compiling": "before a program is compiled",
    "a step": "a step is trained",
    "an evaluation": "before an evaluation",
    "a save": "before a save",
    "the last evaluation": "before the last evaluation",
    "results": "before the results",
}


def strike(point: str, nth: int, number: int, delay: float = 0) -> None:
    """Let this process get a signal at the nth time that it comes to a point.

    delay: seconds from there on.
    """
    where, path, when = POINTS[point]
    owner: Any = importlib.import_module(where)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    call, count = getattr(owner, name), 0

    def send() -> None:
        if delay:
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()
        else:
            os.kill(os.getpid(), number)

    def struck(*given: Any, **named: Any) -> Any:
        nonlocal count
        counted = when != "renamed" or given[0].name == "checkpoints"
        count += counted
        now = counted and count == nth
        if now and when in ("before", "renamed"):
            send()
        if now and when == "half":
            half(given[0])
            send()
        result = call(*given, **named)
        if now and when == "after":
            send()
        return result

    is_class = isinstance(vars(owner).get(name) if isinstance(owner, type) else None, classmethod)
    setattr(owner, name, staticmethod(struck) if is_class else struck)


def half(logs: Any) -> None:
    """Write the beginning of a line of metrics."""
    logs._metrics.write('{"step": 1, "lo')
    logs._metrics.flush()


def at(
    point: str,
    nth: int,
    number: int,
    before: Callable[[], object] = lambda: None,
    delay: float = 0,
) -> Callable[[], None]:
    """A function that calls `before`, then `strike`."""

    def first() -> None:
        before()
        strike(point, nth, number, delay)

    return first
