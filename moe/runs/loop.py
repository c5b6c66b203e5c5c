"""The optimizer steps of a run, with evaluations and checkpoints between them."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import math
from typing import Any

import jax

from moe.data.batch import Batch
from moe.errors import UserError
from moe.machine import processes
from moe.machine.signals import Signals
from moe.machine.watchdog import Watchdog
from moe.runs.setup import Setup
from moe.runs.storage.checkpoint import Checkpoints, as_tree
from moe.runs.tracking.metrics_logger import MetricsLogger
from moe.training import evaluate
from moe.training.bad_steps import outside_vocabulary
from moe.training.corruption import Checker
from moe.training.finite import TrainingDiverged, in_words, not_finite
from moe.training.train_step import StepMetrics, TrainState, to_devices


@dataclasses.dataclass
class Loop:
    """Trains until the last step, `train.stop_at`, a signal or the end of `train.max_seconds`.

    Attributes:
        train_step, score_batch: the compiled functions of an optimizer step and of an evaluation.
        interrupted: true once a signal came.
        watchdog: is told of each step, and of each batch of an evaluation.
        checker: looks for devices that compute or remember wrongly.
        extra: what each checkpoint holds beside the state, as JSON.
        saved: the step of the newest checkpoint; None before the first.
        first_state: the run's first state and its `extra`, anew, from the newest checkpoint.
        stopped: a signal came to some process. late: `train.max_seconds` is over.
    """

    setup: Setup
    train_step: Callable
    score_batch: Callable
    metrics: MetricsLogger
    saves: Checkpoints
    interrupted: Signals
    watchdog: Watchdog
    checker: Checker
    extra: dict[str, Any]
    saved: int | None
    first_state: Callable[[], tuple[TrainState, dict[str, Any]]]
    stopped: bool = False
    late: bool = False

    @classmethod
    def of(
        cls,
        setup: Setup,
        metrics: MetricsLogger,
        saves: Checkpoints,
        interrupted: Signals,
        watchdog: Watchdog,
        origin: dict[str, Any],
        saved: int | None,
        first_state: Callable[[], tuple[TrainState, dict[str, Any]]],
    ) -> "Loop":
        """The loop of a run; origin: the entry of run.json that names the run it started from."""
        compiling = metrics.display.compiling
        train_step = compiling(setup.program.step, "the training step")
        score_batch = evaluate.batch_scorer(setup.model, setup.mesh)
        score_batch = compiling(score_batch, "the evaluation")
        extra = setup.identity | origin
        return cls(
            setup,
            train_step,
            score_batch,
            metrics,
            saves,
            interrupted,
            watchdog,
            Checker(setup.spec.checks, setup.mesh, saves.last_good),
            extra,
            saved,
            first_state,
        )

    def run(self, state: TrainState) -> tuple[TrainState, int]:
        """The state after the last step that was trained, and the number of that step.

        Raises:
            TrainingDiverged: a bad step that is neither skipped nor gone back from.
            Corrupted: a check has found a device at fault.
        """
        while True:
            try:
                return self._train(state)
            except TrainingDiverged as error:
                diverged = error.with_traceback(None)  # its frames hold a state, too
            del state
            state = self._rewound(diverged)

    def _train(self, state: TrainState) -> tuple[TrainState, int]:
        """As `run`, up to the first bad step that is not skipped.

        Step n + 1 is dispatched before the logger reads the metrics of step n, so that the device
        never waits for the host.
        """
        spec, sharding, watch = (
            self.setup.spec,
            self.setup.program.batch_sharding,
            self.metrics.watch,
        )
        step = int(state.step)
        made = self.setup.train_batches.batches(step + watch.left_out, self.setup.rows)
        self._ask_processes()
        with contextlib.closing(made) as batches:
            while step < spec.steps and step != spec.stop_at and not self.stopped and not self.late:
                self.watchdog.begins("step", step + 1)
                batch = to_devices(self._sound(next(batches), step + 1), sharding, spec.batch_size)
                limits = {"limits": watch.limits(step + 1)} if watch.skips else {}
                state, measured = self._step(state, batch, step + 1, limits)
                self.interrupted.at_once = False  # from here on there is something to save
                step += 1
                self.metrics.step(step, measured)
                evaluating = (
                    bool(spec.eval_every) and step % spec.eval_every == 0 and step < spec.steps
                )
                if evaluating or (spec.save_every and step % spec.save_every == 0):
                    self._evaluate_and_save(state, step, evaluating)
                elif self.checker.replicas_due(step):
                    with self._beside_steps():
                        self.checker.replicas(state, step)
                # Several processes exchange flags only at logged steps.
                if step % spec.log_every == 0 or jax.process_count() == 1:
                    self._ask_processes()
            self.metrics.read(last=self.late)
            self.watchdog.pause()
        return state, step

    def _sound(self, batch: Batch, step: int) -> Batch:
        """The same batch; UserError where it holds tokens that there are not."""
        fault = outside_vocabulary(batch, self.setup.text.tokenizer.vocab_size)
        if fault is None:
            return batch
        self.metrics.read()
        # With several processes only those whose rows are broken come here.
        saved = f"; {self.saves.last_good()}" if jax.process_count() == 1 else ""
        raise UserError(f"step {step}: {fault}; the text's cache or memory is damaged{saved}")

    def _step(
        self, state: TrainState, batch: Batch, step: int, given: dict[str, Any]
    ) -> tuple[TrainState, StepMetrics]:
        """An optimizer step; computed twice and compared, where that is due."""
        if not self.checker.recompute_due(step):
            return self.train_step(state, batch, **given)
        with self._beside_steps():
            trial = self.checker.trial(self.train_step, state, batch, **given)
        self.watchdog.begins("step", step)
        state, measured = self.train_step(state, batch, **given)
        self.checker.compare(trial, state, measured, step)
        return state, measured

    @contextlib.contextmanager
    def _beside_steps(self) -> Iterator[None]:
        """The block is neither timed nor watched as a step; all steps before it are looked at."""
        self.watchdog.pause()
        self.metrics.read()
        yield
        self.metrics.meter.restart()

    def _rewound(self, diverged: TrainingDiverged) -> TrainState:
        """The state of the newest checkpoint, or the run's first one, to go on from.

        Batches up to the bad step's are left out. Raises the error where that is not asked for.
        """
        self.watchdog.pause()
        watch = self.metrics.watch
        if watch.rewinds_left < 1:
            raise diverged
        self.saves.wait()
        state, extra = self.first_state()
        step = int(state.step)
        watch.rewound(diverged.step, step, extra.get("bad_steps"))
        self.saved = step if extra else None
        self.metrics.rewind(step)
        reason = str(diverged).split("; ")[0].splitlines()[0]
        self.metrics.display.say(
            f"{reason}; going on from step {step} without the batches of the "
            f"{diverged.step - step} steps after it, rewind {watch.rewinds} of at most "
            f"{watch.rewinds + watch.rewinds_left}"
        )
        return state

    def save(self, state: TrainState, step: int, val_loss: float | None = None) -> None:
        """Start writing a checkpoint, unless this step has one."""
        self.interrupted.at_once = False
        if self.saved != step:
            self.checker.replicas(state, step)  # so that nothing broken is saved
            clock = {"clock": self.metrics.meter.total}
            extra = self.extra | clock | self.metrics.watch.record()
            self.saves.save(state, extra, val_loss)
            self.saved = step

    def _evaluate_and_save(self, state: TrainState, step: int, evaluating: bool) -> None:
        with self._beside_steps():  # which have been looked at, so that nothing broken is saved
            result = None
            if evaluating:
                setup = self.setup
                result = evaluate.evaluate(
                    self.score_batch, state, setup.held_out, setup.mesh, self.evaluated
                )
                self.metrics.held_out(step, result)
                require_finite_loss(result, state, step, self.saves)
            self.save(state, step, result and result.loss)

    def evaluated(self, done: int, of: int) -> None:
        """Tell the watchdog that so many batches of an evaluation are done."""
        if done < of:
            self.watchdog.begins("evaluation batch", done + 1)
        else:
            self.watchdog.pause()

    def _ask_processes(self) -> None:
        flags = bool(self.interrupted), self.metrics.meter.over()
        self.stopped, self.late = processes.any_process(*flags)


def require_finite_loss(
    result: evaluate.Evaluation, state: TrainState, step: int, saves: Checkpoints
) -> None:
    """Raise TrainingDiverged where a held-out loss is not finite; it names the arrays at fault."""
    if math.isfinite(result.loss):
        return
    broken = in_words(not_finite(as_tree(state)))
    raise TrainingDiverged(
        f"step {step}: the held-out loss is {result.loss}; not finite: "
        f"{broken or 'no value of the state, so that the text or the model is at fault'}; "
        f"{saves.last_good(not_step=step)}",
        step,
    )
