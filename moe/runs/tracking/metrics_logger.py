"""Metrics of optimizer steps: read from the device, checked, shown and written to the logs."""

from collections.abc import Sequence
import dataclasses

import jax
import numpy as np

from moe.runs.storage.checkpoint import Checkpoints
from moe.runs.tracking import progress
from moe.runs.tracking.logs import Logs
from moe.runs.tracking.throughput import ThroughputMeter
from moe.training import metrics
from moe.training.abstract_model import AbstractModel
from moe.training.bad_steps import Watch
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
        watch: judges each step.
    """

    model: AbstractModel
    meter: ThroughputMeter
    display: progress.Display
    logs: Logs | None
    saves: Checkpoints
    rate_N: np.ndarray
    own_metrics: Sequence[Metric]
    log_every: int
    watch: Watch
    _waiting: tuple[int, StepMetrics] | None = dataclasses.field(default=None, init=False)

    def step(self, step: int, measured: StepMetrics) -> None:
        """Read the metrics of the step before this one; raises as `read` does."""
        self.read()
        self._waiting = step, measured

    def read(self, last: bool = False) -> None:
        """Check the metrics that wait to be read, if any do; show and log them when due.

        last: no step follows, so that they are due.

        Raises:
            TrainingDiverged: the step is bad and was not skipped, or one too many was; names the
                last good checkpoint.
        """
        if self._waiting is None:
            return
        (step, measured), self._waiting = self._waiting, None
        measured = jax.device_get(measured)
        seconds = self.meter.tick()
        with self.meter.logging():
            self._judge(step, measured)
            slow = None if seconds is None else self.meter.pace.slow(seconds)
            if slow:
                self.display.say(f"step {step} {slow}")
            if step % self.log_every == 0 or step == len(self.rate_N) or last:
                self._log(step, measured)

    def _judge(self, step: int, measured: StepMetrics) -> None:
        """Raise TrainingDiverged for a bad step, unless it was skipped and more may be."""
        watch = self.watch
        if (fault := watch.fault(step, measured)) is None:
            return
        if not watch.skips:
            raise diverged(step, measured, fault, self.saves)
        assert watch.policy is not None
        watch.skipped += 1
        most = watch.policy.most
        if watch.skipped > most:
            fault = f"{fault}; {most} bad steps were skipped, as many as SkipBadSteps.most allows"
            raise diverged(step, measured, fault, self.saves)
        self.display.say(f"step {step} is skipped, {watch.skipped} of at most {most}: {fault}")

    def rewind(self, step: int) -> None:
        """Forget what was measured after a step, from whose checkpoint the run goes on."""
        self._waiting = None
        if self.logs is not None:
            self.logs.cut(step)
        self.meter.restart()

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
        if measured.distillation is not None:
            scalars["distillation"] = float(measured.distillation)
        if self.watch.policy is not None:
            scalars["bad_steps"] = self.watch.skipped + self.watch.rewinds
        if measured.mod is not None:
            scalars |= {f"depth/{name}": float(v.mean()) for name, v in measured.mod.items()}
        scalars = metrics.bounded(scalars)
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


def diverged(step: int, measured: StepMetrics, fault: str, saves: Checkpoints) -> TrainingDiverged:
    """The error of a bad step: with the layers' statistics and the last good checkpoint."""
    layers = []
    if measured.routers:
        routing = metrics.Routing.of(measured.routers)
        layers = [
            f"layer {i}: load {load:.2f}, dropped {dropped:.1%}, router logits {size:.3g}"
            for i, (load, dropped, size) in enumerate(
                zip(routing.load_L, routing.dropped_L, routing.logit_size_L, strict=True)
            )
        ]
    return TrainingDiverged(
        f"step {step}: {fault}; {saves.last_good()}. Lower the learning rate or clip_norm, or set "
        "train.bad_steps.\n  " + "\n  ".join(layers),
        step,
    )
