"""The training run, read from top to bottom."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import math
import signal
import time
from typing import Any

import jax

from moe import settings
from moe.machine import hardware, processes
from moe.machine.allocator import keep_freed_memory
from moe.machine.signals import catching_signals
from moe.runs import artifacts, fit, start
from moe.runs.storage import checkpoint
from moe.runs.storage.folder import RunFolder
from moe.runs.summary import describe, describe_run, summary_of
from moe.runs.tracking import progress
from moe.runs.tracking.logs import Logs
from moe.runs.tracking.recorder import Recorder
from moe.runs.tracking.throughput import Clock, clock_seconds
from moe.settings import resolved
from moe.training import evaluate
from moe.training.abstract_model import Vocabulary
from moe.training.run_spec import RunSpec, check_memory
from moe.training.train_step import to_devices

Say = Callable[[str], None]


def train(
    spec: RunSpec, workdir: str, config: Callable[[Say], str] = settings.record
) -> dict[str, Any]:
    """Train, evaluate on the held-out documents, write samples and a summary; or go on with a run.

    Args:
        spec: the run.
        workdir: the run's folder; where it holds the checkpoints of this run, it is continued.
        config: the text that repeats the run; asked for once data and model are built, so that it
            can refuse settings that nothing has read.

    Returns:
        What summary.json holds; without an evaluation where the run was interrupted.

    Raises:
        UserError: settings or text that can't be; a folder that belongs to another run.
        TrainingDiverged: a loss or gradient that is not finite.
    """
    folder = RunFolder(workdir)
    asked, spec = spec, fit.as_before(spec, folder)
    batch_size, stop_at, max_seconds = spec.batch_size, spec.stop_at, spec.max_seconds
    eval_every, save_every, log_every = spec.eval_every, spec.save_every, spec.log_every
    started = time.monotonic()
    keep_freed_memory()
    quiet = not processes.is_first()
    with contextlib.ExitStack() as stack:
        say = progress.Display(spec.steps, quiet=quiet).say
        if not quiet:
            stack.enter_context(folder.locked())

        # The parts: data, model, mesh, program. Nothing is compiled before all are checked.
        mesh = spec.build_mesh()
        text = spec.prepare_data(say)
        vocabulary = Vocabulary.of(text.tokenizer)
        model, program = spec.build(vocabulary, mesh, text.train.token_N)
        check_memory(program)
        train_batches = text.train_batches(*spec.shape, spec.seed)
        held_out = functools.partial(
            text.validation_batches, *spec.shape, spec.eval_stride, causal=model.objective.causal
        )
        all_held_out, some_held_out = held_out(spec.final_eval_bytes), held_out(spec.eval_bytes)
        config_text = config(say)
        folder.refuse_another_run(config_text, text.fingerprint(), spec.steps, spec.may_change())
        done = folder.complete(spec.steps, max_seconds)
        if done:
            say(fit.ended(done["step"], spec, folder))
            return done | {"samples": []}
        peak = hardware.matmul_peak(model.module.compute_dtype)
        table = resolved.rows(spec, *spec.in_force, model.module)
        describe(say, table, model, text, peak, folder)

        # The state: from the last checkpoint, from another run, or from the seed.
        saves = stack.enter_context(checkpoint.opened(folder.checkpoints, spec.keep))
        given = start.Given(spec.seed, spec.start_from, spec.start_from_optimizer)
        state, before, source = start.first_state(saves, program, text.tokenizer, given, say)
        first = int(state.step)
        rows = processes.rows(program.batch_sharding, batch_size)
        if spec.fit_steps and max_seconds is not None and folder.steps != spec.steps:
            say("timing some steps")
            used = clock_seconds(before.get("clock"))
            batches = train_batches.batches(first, rows)
            steps = fit.steps_that_fit(spec, program, state, batches, used)
            batches.close()
            if steps < spec.steps:
                say(fit.told(spec, steps))
                spec = dataclasses.replace(spec, steps=steps)
                model, program = spec.build(vocabulary, mesh, text.train.token_N)
        steps, rate_N = spec.steps, spec.rates()
        start.told(first, spec, folder, rate_N, say)
        if stop_at is not None and stop_at <= first < steps:
            return {"interrupted": True, "signal": None, "step": first}
        run = describe_run(model, text, spec.seed, peak) | source
        if steps != asked.steps:
            run["fitted_steps"] = {str(asked.steps): steps}
            config_text = fit.with_steps(config_text, steps)
            table = resolved.rows(spec, *spec.in_force, model.module)
        if not quiet:
            folder.begin(config_text, resolved.text(table), run, text.tokenizer, first)

        # The loop. Step n + 1 is dispatched before `record` reads the metrics of step n, so that
        # the device never waits for the host.
        display = stack.enter_context(progress.Display(steps, first, quiet))
        logs = Logs(folder, spec.loggers, run, display.say) if not quiet else None
        stack.callback(logs.close if logs else lambda: None)
        interrupted = stack.enter_context(catching_signals())
        clock = Clock(peak, model, math.prod(spec.shape), before.get("clock"), max_seconds)
        record = Recorder(
            built=model,
            clock=clock,
            display=display,
            logs=logs,
            saves=saves,
            rate_N=rate_N,
            own_metrics=spec.metrics,
            log_every=log_every,
        )
        eval_step = evaluate.evaluation_step(model, mesh)
        eval_step = display.compiling(eval_step, "the evaluation")
        train_step = display.compiling(program.step, "the training step")
        extra = {"data": text.fingerprint(), "batch_size": batch_size, "seed": spec.seed, **source}
        batches = train_batches.batches(first, rows)
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
                    part = evaluate.evaluate(eval_step, state, some_held_out, mesh)
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
            display.say(
                f"train.max_seconds={max_seconds:g} is over at step {step} of {steps}, before the "
                "schedule's end: more of it, or fewer train.steps, would train on to a low rate"
            )

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
        result = artifacts.evaluated(eval_step, state, all_held_out, mesh, display)
        summary = {"step": step, **summary_of(result, model, text, peak), **clock.summary()}
        pages = artifacts.Pages(folder, model, text, spec.prompts, spec.shape, spec.seed)
        return artifacts.written(pages, state, summary, display, started)
