"""The training run, read from top to bottom."""

from collections.abc import Callable, Sequence
import contextlib
import functools
import math
import signal
import time
from typing import Any

import gin
import jax
import numpy as np

from moe import settings
from moe.data.shards import TokenShards
from moe.data.text import TextData
from moe.errors import UserError
from moe.machine import hardware, processes
from moe.machine.allocator import keep_freed_memory
from moe.machine.signals import catching_signals
from moe.model.sharding import MeshShape
from moe.model.transformer import Transformer
from moe.runs import artifacts, start
from moe.runs.storage import checkpoint
from moe.runs.storage.folder import RunFolder
from moe.runs.summary import describe, describe_run, summary_of
from moe.runs.tracking import progress
from moe.runs.tracking.loggers import Logger
from moe.runs.tracking.logs import Logs
from moe.runs.tracking.recorder import Metric, Recorder
from moe.runs.tracking.throughput import Clock
from moe.training import assemble, evaluate
from moe.training.objective import NextToken, Objective
from moe.training.optimizer import AdamW, Optimizer
from moe.training.train_step import to_devices
from routing.ranges import Count, Natural, Positive, Size


@gin.configurable
def train(
    workdir: str,
    data: TextData | TokenShards = gin.REQUIRED,  # pyright: ignore[reportArgumentType]
    model: Callable[..., Transformer] = Transformer,
    objective: Objective | None = None,
    optimizer: Optimizer | None = None,
    mesh: MeshShape | None = None,
    steps: Count = 1000,
    batch_size: Count = 32,
    sequence_length: Count = 256,
    accumulate: Count = 1,
    seed: Natural = 0,
    log_every: Count = 10,
    eval_every: Count | None = None,
    eval_bytes: Size | None = 200_000,
    eval_stride: Count | None = None,
    final_eval_bytes: Size | None = None,
    save_every: Count | None = None,
    keep: Count = 2,
    stop_at: Count | None = None,
    max_seconds: Positive | None = None,
    prompts: tuple[str, ...] = ("",),
    start_from: str | None = None,
    start_from_optimizer: bool = False,
    loggers: Sequence[Logger] = (),
    metrics: Sequence[Metric] = (),
) -> dict[str, Any]:
    """Train, evaluate on the held-out documents, write samples and a summary; or go on with a run.

    Args:
        workdir: the run's folder; where it holds the checkpoints of this run, it is continued.
        data: the text.
        model: the transformer's class, with its settings.
        objective: `NextToken()` (where None) or `MaskedToken()`.
        optimizer: with its learning rate and schedule; `AdamW()` where None.
        mesh: sizes of the mesh axes; all devices on the data axis where None.
        steps: optimizer steps; the schedule ends there. More of them than a run has trained make it
            longer, with a schedule for all of them.
        batch_size: sequences per optimizer step, over all devices.
        sequence_length: tokens per sequence.
        accumulate: micro-batches per optimizer step; the result is the same.
        seed: of first values, data order and every random draw.
        log_every: steps between two lines of metrics.
        eval_every: steps between evaluations on part of the held-out documents, each followed by
            a checkpoint; only at the end where None.
        eval_bytes: how much of the held-out text those use.
        final_eval_bytes: how much of it the last evaluation uses; all where None.
        eval_stride: how far the windows of a long document advance; half the sequence where None.
        save_every: steps between checkpoints without an evaluation.
        keep: how many of the last checkpoints stay, beside the best.
        stop_at: pause after this step, as if interrupted; without it the same command goes on.
        max_seconds: end after so much training time, wherever the schedule is.
        prompts: texts to continue in samples.txt.
        start_from: the folder of another run, whose parameters and router state a new run starts
            with (fine-tuning); start_from_optimizer: and with its optimizer's state.
        loggers: where else the numbers go, such as `WandB()`.
        metrics: functions of a step's routing and numbers, which give further numbers.

    Returns:
        What summary.json holds; without an evaluation where the run was interrupted.

    Raises:
        UserError: settings or text that can't be; a folder that belongs to another run.
        TrainingDiverged: a loss or gradient that is not finite.
    """
    folder = RunFolder(workdir)
    started = time.monotonic()
    keep_freed_memory()
    quiet = not processes.is_first()
    objective = NextToken() if objective is None else objective
    optimizer = AdamW() if optimizer is None else optimizer
    check_counts(steps=steps, log_every=log_every, keep=keep, batch_size=batch_size)
    with contextlib.ExitStack() as stack:
        say = progress.Display(steps, quiet=quiet).say
        if not quiet:
            stack.enter_context(folder.locked())

        # The parts: data, model, mesh, program. Nothing is compiled before all are checked.
        device_mesh = user_error((MeshShape() if mesh is None else mesh).build)
        text = data.prepare(say)
        shape = batch_size, sequence_length
        built, program = assemble.for_training(
            model, objective, optimizer, device_mesh, text, shape, steps, seed, accumulate
        )
        train_batches = text.train_batches(*shape, seed)
        held_out = functools.partial(
            text.validation_batches, *shape, eval_stride, causal=objective.causal
        )
        all_held_out, some_held_out = held_out(final_eval_bytes), held_out(eval_bytes)
        settings.refuse_ignored(say, later=("eval",))
        config = settings.operative()
        folder.refuse_another_run(config, text.fingerprint(), steps)
        done = folder.complete(steps, max_seconds)
        if done:
            say(f"this run is complete at step {done['step']}; its results are in {folder.summary}")
            return done | {"samples": []}
        peak = hardware.matmul_peak(built.module.compute_dtype)
        describe(say, built, text, peak, folder)

        # The state: from the last checkpoint, from another run, or from the seed.
        saves = stack.enter_context(checkpoint.opened(folder.checkpoints, keep))
        given = start.Given(seed, start_from, start_from_optimizer)
        state, before, source = start.first_state(saves, program, text.tokenizer, given, say)
        first = int(state.step)
        rate_N = np.asarray(jax.vmap(optimizer.rate(steps))(np.arange(steps)))
        start.told(first, stop_at, folder, optimizer, rate_N, say)
        if stop_at is not None and stop_at <= first < steps:
            return {"interrupted": True, "signal": None, "step": first}
        run = describe_run(built, text, seed, peak) | source
        if not quiet:
            folder.begin(config, run, text.tokenizer, first)

        # The loop. Step n + 1 is dispatched before `record` reads the metrics of step n, so that
        # the device never waits for the host.
        display = stack.enter_context(progress.Display(steps, first, quiet))
        logs = Logs(folder, loggers, run, display.say) if not quiet else None
        stack.callback(logs.close if logs else lambda: None)
        interrupted = stack.enter_context(catching_signals())
        clock = Clock(peak, built, math.prod(shape), before.get("clock"), max_seconds)
        record = Recorder(
            built=built,
            clock=clock,
            display=display,
            logs=logs,
            saves=saves,
            rate_N=rate_N,
            own_metrics=metrics,
            log_every=log_every,
        )
        eval_step = evaluate.evaluation_step(built, device_mesh)
        eval_step = display.compiling(eval_step, "the evaluation")
        train_step = display.compiling(program.step, "the training step")
        extra = {"data": text.fingerprint(), "batch_size": batch_size, "seed": seed, **source}
        batches = train_batches.batches(first, processes.rows(program.batch_sharding, batch_size))
        step, saved = first, first if before else None
        stopped, late = processes.any_says(bool(interrupted), clock.over())
        while step < steps and step != stop_at and not stopped and not late:
            batch = to_devices(next(batches), program.batch_sharding, batch_size)
            state, measured = train_step(state, batch)
            step += 1
            record.step(step, measured)
            evaluating = bool(eval_every) and step % eval_every == 0 and step < steps
            if evaluating or (save_every and step % save_every == 0):
                record.read()  # so that nothing broken is saved
                part = None
                if evaluating:
                    part = evaluate.evaluate(eval_step, state, some_held_out, device_mesh)
                    record.held_out(step, part)
                saves.save(state, extra | {"clock": clock.total}, part and part.loss)
                saved = step
                clock.restart()
            # Several processes ask each other only when they wait for a step anyway.
            if step % log_every == 0 or jax.process_count() == 1:
                stopped, late = processes.any_says(bool(interrupted), clock.over())
        record.read(last=late)
        batches.close()
        if step < steps and late:
            display.say(f"train.max_seconds={max_seconds:g} is over at step {step} of {steps}")

        # The final checkpoint comes before the final evaluation: nothing can cost us the run.
        if saved != step:
            saves.save(state, extra | {"clock": clock.total})
        saves.wait()
        if stopped or step == stop_at != steps:
            at_stop = step == stop_at
            way = "without train.stop_at it goes on" if at_stop else "the same command goes on"
            display.say(f"stopped after step {step} of {steps}; {way}")
            # Of another process's signal it is only known that there was one.
            number = interrupted.signal or (signal.SIGTERM if stopped else None)
            return {"interrupted": True, "signal": number, "step": step}

        # The results; then what compressors reach, samples and a picture, never at their cost.
        result = artifacts.evaluated(eval_step, state, all_held_out, device_mesh, display)
        summary = {"step": step, **summary_of(result, built, text, peak), **clock.summary()}
        pages = artifacts.Pages(folder, built, text, prompts, shape, seed)
        return artifacts.written(pages, state, summary, display, started)


def check_counts(**counts: int) -> None:
    """Raise UserError for a count below one."""
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"train.{name}={value} must be at least 1")


def user_error(call: Callable[[], Any]) -> Any:
    """What a call returns; its ValueError becomes the user's."""
    try:
        return call()
    except ValueError as error:
        raise UserError(str(error)) from error
