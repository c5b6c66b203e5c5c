"""A run's log files, metrics.jsonl and routing.jsonl, and the loggers beside them."""

from collections.abc import Callable, Sequence
import json
from typing import IO, Any

from moe.runs.storage.folder import RunFolder
from moe.runs.storage.json_files import finite
from moe.runs.tracking.loggers import TensorBoard, Writers
from moe.training.logger import Logger


class Logs:
    """Appends a line for each logged step. Only the first process of a run has them.

    Args:
        loggers: further ones beside TensorBoard, opened first: a package may be missing.
        run: the content of run.json.
        say: prints the failure of a logger.
    """

    def __init__(
        self,
        folder: RunFolder,
        loggers: Sequence[Logger] = (),
        run: dict[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ):
        every = [*loggers, TensorBoard()]
        self._writers = Writers({str(one): one.open(folder.path, run or {}) for one in every}, say)
        self._folder = folder
        self._open()

    def _open(self) -> None:
        self._metrics: IO[str] = open(self._folder.metrics, "a", encoding="utf-8")
        self._routing: IO[str] = open(self._folder.routing, "a", encoding="utf-8")

    def cut(self, step: int) -> None:
        """Delete the lines after a step, from which the run goes on."""
        self._metrics.close()
        self._routing.close()
        self._folder.cut_logs(step)
        self._open()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write a line of metrics.jsonl, and the same numbers to every logger."""
        self._metrics.write(_json({"step": step, **values}) + "\n")
        self._metrics.flush()
        self._writers.scalars(step, values)

    def routing(self, arrays: dict) -> None:
        """Write a line of routing.jsonl: the arrays of `metrics.Routing.arrays`."""
        self._routing.write(_json(arrays) + "\n")
        self._routing.flush()

    def close(self) -> None:
        self._metrics.close()
        self._routing.close()
        self._writers.close()


def _json(content: Any) -> str:
    """JSON, which has no NaN and no infinity: null stands for them."""
    try:
        return json.dumps(content, allow_nan=False)
    except ValueError:
        return json.dumps(finite(content), allow_nan=False)
