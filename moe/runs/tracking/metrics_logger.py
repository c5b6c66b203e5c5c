"""Metrics of optimizer steps: read from the device, checked, shown and written to the logs."""

from collections.abc import Sequence
import dataclasses
import math

import jax
import numpy as np

from moe.runs.storage.checkpoint import Checkpoints
from moe.runs.tracking import progress
from moe.runs.tracking.logs import Logs
from moe.runs.tracking.throughput import ThroughputMeter
from moe.training import metrics
from moe.training.abstract_model import AbstractModel
from moe.training.evaluate import Evaluation
from moe.training.finite import TrainingDiverged
from moe.training.logger import Metric
from moe.training.train_step import StepMetrics


@dataclasses.dataclass
class MetricsLogger:
    """Reads each step's metrics when the next step runs, so that the device never waits for it.

    Every step is checked; those that `log_every` divides are shown, and written to the logs.

    Attributes:
        logs: None in all processes but the first.
        rate_N: the learning rate of each of the run's N steps. As an array: a JAX schedule would
            be queued behind the running step, and the log would wait for it.
        own_metrics: the user's functions, of `train.metrics`.
    """

    model: AbstractModel
    meter: ThroughputMeter
    display: progress.Display
    logs: Logs | None
    saves: Checkpoints
    rate_N: np.ndarray
    own_metrics: Sequence[Metric]
    log_every: int
    _waiting: tuple[int, StepMetrics] | None = dataclasses.field(default=None, init=False)

    def step(self, step: int, measured: StepMetrics) -> None:
        """Read the metrics of the step before this one; raises as `read` does."""
        self.read()
        self._waiting = step, measured

    def read(self, last: bool = False) -> None:
        """Check the metrics that wait to be read, if any do; show and log them when due.

        last: no step follows, so that they are due.

        Raises:
            TrainingDiverged: something is not finite; names the last good checkpoint.
        """
        if self._waiting is None:
            return
        (step, measured), self._waiting = self._waiting, None
        measured = jax.device_get(measured)
        seconds = self.meter.tick()
        with self.meter.logging():
            require_finite(step, measured, self.saves)
            slow = None if seconds is None else self.meter.pace.slow(seconds)
            if slow:
                self.display.say(f"step {step} {slow}")
            if step % self.log_every == 0 or step == len(self.rate_N) or last:
                self._log(step, measured)

    def _log(self, step: int, measured: StepMetrics) -> None:
        routing = metrics.Routing.of(measured.routers) if measured.routers else None
        scalars = self._scalars(step, measured, routing)
        kind = self.model.kind
        line = progress.line(scalars, metrics.health(routing, kind), loads=kind == metrics.CHOICES)
        self.display.update(step, line, self.meter.left)
        if self.logs is not None:
            self.logs.scalars(step, scalars)
            if routing is not None:
                self.logs.routing(routing.arrays(step))

    def _scalars(self, step, measured, routing: metrics.Routing | None) -> dict[str, float]:
        nats, num_bytes = float(measured.text_nats), int(measured.text_bytes)
        bits = {"bits_per_byte": metrics.bits_per_byte(nats, num_bytes)} if num_bytes else {}
        scalars = {
            "loss": float(measured.loss),
            **bits,  # none where only document tokens are scored
            "learning_rate": float(self.rate_N[step - 1]),
            **{f"grad_norm/{k}": float(v) for k, v in measured.grad_norms.items()},
            "update_norm": float(measured.update_norm),
            **self.meter.speed(routing),
        }
        if routing is not None:
            scalars |= metrics.routing_scalars(
                routing, self.model.loss_coefficients, self.model.kind
            )
        if measured.mod is not None:
            scalars |= {f"depth/{name}": float(v.mean()) for name, v in measured.mod.items()}
        assert len(scalars) <= metrics.MOST_SCALARS, sorted(scalars)
        for metric in tuple(self.own_metrics):
            scalars |= self._own(metric, routing, dict(scalars))
        return scalars

    def _own(self, metric: Metric, routing, scalars) -> dict[str, float]:
        """A user's numbers; a function that fails is named once, and not called again."""
        try:
            return {str(key): float(value) for key, value in metric(routing, scalars).items()}
        except Exception as error:  # errors of the user's code
            name = getattr(metric, "__name__", str(metric))
            self.display.say(f"train.metrics: {name} is left out: {type(error).__name__}: {error}")
            self.own_metrics = [one for one in self.own_metrics if one is not metric]
            return {}

    def held_out(self, step: int, result: Evaluation) -> None:
        """Show and log an evaluation after this step."""
        self.display.say(f"step {step} held out: {result.bits_per_byte:.3f} bits per byte")
        if self.logs is not None:
            self.logs.scalars(step, {"val/loss": result.loss, "val/bpb": result.bits_per_byte})


def require_finite(step: int, measured: StepMetrics, saves: Checkpoints) -> None:
    """Raise TrainingDiverged where the loss, a gradient or the update is not finite.

    The error has the layers' statistics and the last good checkpoint.
    """
    norms = {f"gradient norm ({name})": value for name, value in measured.grad_norms.items()}
    values = {"loss": measured.loss, **norms, "update norm": measured.update_norm}
    broken = [name for name, value in values.items() if not math.isfinite(float(value))]
    if not broken:
        return
    layers, first = [], ""
    if measured.routers:
        routing = metrics.Routing.of(measured.routers)
        layers = [
            f"layer {i}: load {load:.2f}, dropped {dropped:.1%}, router logits {size:.3g}"
            for i, (load, dropped, size) in enumerate(
                zip(routing.load_L, routing.dropped_L, routing.logit_size_L, strict=True)
            )
        ]
        at = [i for i, size in enumerate(routing.logit_size_L) if not math.isfinite(size)]
        first = f", first in layer {at[0]} or before it" if at else ""
    raise TrainingDiverged(
        f"step {step}: not finite: {', '.join(broken)}{first}; {saves.last_good()}. "
        "Lower the learning rate or clip_norm.\n  " + "\n  ".join(layers)
    )
