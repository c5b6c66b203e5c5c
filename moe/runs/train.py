"""The training run, read from top to bottom."""

from collections.abc import Callable
import contextlib
import functools
import math
import signal
import time
from typing import Any

from moe import settings
from moe.machine import hardware, processes
from moe.machine.allocator import keep_freed_memory
from moe.machine.signals import Stopped, catching_signals
from moe.runs import artifacts, determinism, fit, start
from moe.runs.guard import guarded
from moe.runs.loop import Loop, require_finite_loss
from moe.runs.setup import Setup
from moe.runs.storage import checkpoint, space
from moe.runs.storage.folder import RunFolder
from moe.runs.summary import attention_of, describe, describe_run, layers_of, saved_of, summary_of
from moe.runs.tracking import progress
from moe.runs.tracking.logs import Logs
from moe.runs.tracking.metrics_logger import MetricsLogger
from moe.runs.tracking.throughput import ThroughputMeter
from moe.settings import resolved
from moe.training.bad_steps import Watch
from moe.training.run_spec import RunSpec

Say = Callable[[str], None]


def train(
    spec: RunSpec, workdir: str, config: Callable[[Say], str] = settings.record
) -> dict[str, Any]:
    """Train, evaluate on the held-out documents, and write samples and a summary.

    Args:
        spec: the run.
        workdir: the run's folder; a run whose checkpoints it holds is continued.
        config: returns the config text that repeats the run. It is called once text and model are
            prepared, so that it can refuse settings that nothing has read.

    Returns:
        What summary.json holds, and the samples; of an interrupted run the step and the signal.

    Raises:
        UserError: settings or text that can't be used; a folder that belongs to another run.
        TrainingDiverged: a loss or gradient that is not finite.
    """
    started, quiet = time.monotonic(), not processes.is_first()
    keep_freed_memory()
    folder = RunFolder(workdir)
    requested, spec = spec.steps, fit.with_fitted_steps(spec, folder)
    with contextlib.ExitStack() as stack:
        say = progress.Display(spec.steps, quiet=quiet).say
        if not quiet:
            stack.enter_context(folder.locked())

        # Text, model, mesh and program. Nothing is compiled before all are checked.
        complete = folder.complete(spec.steps, spec.max_seconds)
        setup = Setup.of(spec, say, teach=complete is None)
        determinism.check(setup)
        text, config_text = setup.text, config(say)
        folder.refuse_another_run(config_text, text.fingerprint(), spec.steps, spec.may_change())
        if complete is not None:
            say(fit.complete_message(complete["step"], spec, folder))
            return complete | {"samples": []}
        peak = hardware.matmul_peak(setup.model.module.compute_dtype)
        table = setup.settings
        describe(say, table, setup.model, text, peak, folder)
        say(f"attention: {attention_of(setup.model, setup.mesh)}")
        if spec.checks is not None:
            say(f"checks: {spec.checks.told(setup.program.abstract_state)}")
        if spec.weights is not None:
            say(
                f"weights: {spec.weights}; gradients pass straight through, checkpoints have floats"
            )
        say(f"layers: {layers_of(setup.model, setup.mesh)}")
        say(f"saved for the backward pass: {saved_of(setup.model)}")

        # The state: from the last checkpoint, from another run, or from the seed.
        saves = stack.enter_context(checkpoint.opened(folder.checkpoints, spec.keep))
        source = start.Source(spec.seed, spec.start_from, spec.start_from_optimizer)
        state, restored, origin = start.first_state(saves, setup, source, say)
        setup = setup.with_teacher(restored, say)
        first, clock = int(state.step), restored.get("clock")

        # The number of steps: as asked for, or as many as `train.max_seconds` has room for.
        setup = fit.fitted(setup, state, clock, folder, say)
        spec, model, rate_N = setup.spec, setup.model, setup.spec.rates()
        start.report(first, spec, folder, rate_N, say)
        if spec.stop_at is not None and spec.stop_at <= first < spec.steps:
            return {"interrupted": True, "signal": None, "step": first}
        if first < spec.steps:
            found = space.room(spec, setup.program.abstract_state, first, folder.checkpoints)
            space.check(found, folder.path, say)
        run = describe_run(model, text, spec.seed, peak) | origin
        run |= {"teacher": setup.teacher_record} if setup.teacher_record else {}
        if spec.steps != requested:
            run["fitted_steps"] = {str(requested): spec.steps}
            config_text, table = fit.with_steps(config_text, spec.steps), setup.settings
        if not quiet:
            folder.begin(config_text, resolved.text(table), run, text.tokenizer, first)

        # The optimizer steps, their metrics, evaluations and checkpoints.
        display = stack.enter_context(progress.Display(spec.steps, first, quiet))
        logs = Logs(folder, spec.loggers, run, display.say) if not quiet else None
        stack.callback(logs.close if logs else lambda: None)
        interrupted = stack.enter_context(catching_signals())
        meter = ThroughputMeter(peak, model, math.prod(spec.shape), clock, spec.max_seconds)
        watch = Watch.of(spec.bad_steps, restored.get("bad_steps"))
        metrics = MetricsLogger(
            model, meter, display, logs, saves, rate_N, spec.metrics, spec.log_every, watch
        )
        watchdog = stack.enter_context(guarded(spec, folder, processes.index()))
        again = functools.partial(start.state_again, saves, setup, source, display.say)
        saved = first if restored else None
        loop = Loop.of(setup, metrics, saves, interrupted, watchdog, origin, saved, again)
        state, step = loop.run(state)
        if step < spec.steps and loop.late:
            display.say(fit.late_message(step, spec))

        # The final checkpoint comes before the final evaluation: nothing can cost us the run.
        loop.save(state, step)
        saves.wait()
        if loop.stopped or step == spec.stop_at != spec.steps:
            display.say(start.stopped_message(step, spec))
            # Of another process's signal it is only known that there was one.
            number = interrupted.signal or (signal.SIGTERM if loop.stopped else None)
            return {"interrupted": True, "signal": number, "step": step}

        # The results; then compressors' figures, samples and a picture, which may fail.
        try:
            with interrupted.stopping():
                result = artifacts.final_evaluation(
                    loop.score_batch, state, setup, display, loop.evaluated
                )
                require_finite_loss(result, state, step, saves)
                if not quiet:
                    artifacts.write_documents(result, setup, folder)
                summary = {"step": step, **summary_of(result, model, text, peak), **meter.summary()}
                summary |= watch.summary()
                made = artifacts.Artifacts(folder, setup)
                return artifacts.write(made, state, summary, display, started)
        except Stopped:
            if processes.peers is not None:  # which are not at the end
                raise
            display.say(start.stopped_message(step, spec))
            return {"interrupted": True, "signal": interrupted.signal, "step": step}
