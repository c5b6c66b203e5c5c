"""What a run's numbers may be given to, beside its own logs: interfaces alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from moe.training.metrics import Routing

Scalars = Mapping[str, float]


@runtime_checkable
class Writer(Protocol):
    """What takes the numbers of one start of a run."""

    def scalars(self, step: int, values: Scalars) -> None:
        """The numbers of a logged step, by name; `step` counts optimizer updates."""
        ...

    def close(self) -> None:
        """The run ends or pauses."""
        ...


@runtime_checkable
class Logger(Protocol):
    """Settings of a writer, such as `WandB(project="moe")`."""

    def open(self, folder: Path, run: dict[str, Any]) -> Writer:
        """Start, or go on with what an earlier start of the same run wrote.

        folder: the run's. run: what its run.json holds.

        Raises:
            UserError: a package that is missing, or a service that refuses.
        """
        ...


# A function of a step's routing (None for a dense model) and numbers, which gives further numbers.
Metric = Callable[[Routing | None, dict[str, float]], dict[str, float]]
