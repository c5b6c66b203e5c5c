"""Interfaces of what receives a run's metrics beside its own logs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from moe.training.metrics import Routing

Scalars = Mapping[str, float]


@runtime_checkable
@runtime_checkable
class Writer(Protocol):
    """Receives the metrics of a run, from one start of it to its end or pause."""

    def scalars(self, step: int, values: Scalars) -> None:
        """Receive the metrics of a logged optimizer step, by name."""
        ...

    def close(self) -> None:
        """Finish: the run ends or pauses."""
        ...


@runtime_checkable
class Logger(Protocol):
    """Settings of a writer, such as `WandB(project="moe")`."""

    def open(self, folder: Path, run: dict[str, Any]) -> Writer:
        """A writer that continues the log of the run's earlier starts, if there were any.

        Args:
            folder: the run's.
            run: the contents of its run.json.

        Raises:
            UserError: a package is missing, or a service refuses.
        """
        ...


# From a step's routing (None for a dense model) and metrics to further metrics.
Metric = Callable[[Routing | None, dict[str, float]], dict[str, float]]
