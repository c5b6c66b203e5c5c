"""Where a run's numbers go: metrics.jsonl, routing.jsonl, and the loggers beside them."""

from collections.abc import Callable, Sequence
import json
from typing import IO, Any

from moe.runs.storage.folder import RunFolder
from moe.runs.tracking.loggers import Fed, TensorBoard
from moe.training.logger import Logger


class Logs:
    """Appends a line for every logged step. One process of a run writes them.

    loggers: further ones beside TensorBoard. run: what run.json holds. say: for one that fails.
    """

    def __init__(
        self,
        folder: RunFolder,
        loggers: Sequence[Logger] = (),
        run: dict[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ):
        every = [TensorBoard(), *loggers]
        self._fed = Fed({str(one): one.open(folder.path, run or {}) for one in every}, say)
        self._metrics: IO[str] = open(folder.metrics, "a", encoding="utf-8")
        self._routing: IO[str] = open(folder.routing, "a", encoding="utf-8")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same numbers to every logger."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        self._fed.scalars(step, values)

    def routing(self, arrays: dict) -> None:
        """One line of routing.jsonl: counts, kept and mean scores by layer and expert."""
        self._routing.write(json.dumps(arrays) + "\n")
        self._routing.flush()

    def close(self) -> None:
        self._metrics.close()
        self._routing.close()
        self._fed.close()
