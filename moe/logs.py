"""Where a run's numbers go: metrics.jsonl, routing.jsonl and TensorBoard."""

import json
from typing import IO

from moe.metrics import MOST_SCALARS
from moe.run_folder import RunFolder


class Logs:
    """Appends a line for every logged step. One process of a run writes them."""

    def __init__(self, folder: RunFolder):
        from tensorboardX import SummaryWriter

        self._metrics: IO[str] = open(folder.metrics, "a", encoding="utf-8")
        self._routing: IO[str] = open(folder.routing, "a", encoding="utf-8")
        self._board = SummaryWriter(str(folder.tensorboard))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point of every TensorBoard curve."""
        assert len(values) <= MOST_SCALARS, sorted(values)
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def routing(self, arrays: dict) -> None:
        """One line of routing.jsonl: counts, kept and mean scores by layer and expert."""
        self._routing.write(json.dumps(arrays) + "\n")
        self._routing.flush()

    def close(self) -> None:
        self._metrics.close()
        self._routing.close()
        self._board.close()
