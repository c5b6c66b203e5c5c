"""The training run, read from top to bottom."""

import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import math
import signal
import time
from typing import Any

import gin
import jax

from moe import assemble, baselines, checkpoint, evaluate, gin_files, hardware, metrics, progress
from moe.allocator import keep_freed_memory
from moe.errors import UserError
from moe.generate import Sampling, generate
from moe.logs import Logs
from moe.model import Transformer
from moe.objective import NextToken, Objective
from moe.optimizer import AdamW, Optimizer
from moe.run_folder import RunFolder, versions
from moe.sharding import MeshShape
from moe.step import StepMetrics, TrainState, to_devices
from moe.text_data import PreparedData, TextData


class TrainingDiverged(UserError):
    """The loss or its gradient is no longer a number."""


@gin.configurable
def train(
    workdir: str,
    data: TextData = gin.REQUIRED,
    model: Callable[..., Transformer] = Transformer,
    objective: Objective | None = None,
    optimizer: Optimizer | None = None,
    mesh: MeshShape | None = None,
    steps: int = 1000,
    batch_size: int = 32,
    sequence_length: int = 256,
    accumulate: int = 1,
    seed: int = 0,
    log_every: int = 10,
    eval_every: int | None = None,
    eval_bytes: int | None = 200_000,
    eval_stride: int | None = None,
    save_every: int | None = None,
    keep: int = 2,
    stop_at: int | None = None,
    max_seconds: float | None = None,
    prompts: tuple[str, ...] = ("",),
) -> dict[str, Any]:
    """Train, evaluate on the held-out documents, write samples and a summary; or go on with a run.

    Args:
        workdir: the run's folder; where it holds the checkpoints of this run, it is continued.
        data: the text.
        model: the transformer's class, with its settings.
        objective: `NextToken()` (where None) or `MaskedToken()`.
        optimizer: with its learning rate and schedule; `AdamW()` where None.
        mesh: sizes of the mesh axes; all devices on the data axis where None.
        steps: optimizer steps; the schedule ends there.
        batch_size: sequences per optimizer step, over all devices.
        sequence_length: tokens per sequence.
        accumulate: micro-batches per optimizer step; the result is the same.
        seed: of first values, data order and every random draw.
        log_every: steps between two lines of metrics.
        eval_every: steps between evaluations on part of the held-out documents, each followed by
            a checkpoint; only at the end where None.
        eval_bytes: how much of the held-out text those use; the last evaluation uses all.
        eval_stride: how far the windows of a long document advance; half the sequence where None.
        save_every: steps between checkpoints without an evaluation.
        keep: how many of the last checkpoints stay, beside the best.
        stop_at: pause after this step, as if interrupted; the same command goes on.
        max_seconds: end after so much training time, wherever the schedule is.
        prompts: texts to continue in samples.txt.

    Returns:
        What summary.json holds; without an evaluation where the run was interrupted.

    Raises:
        UserError: settings or text that can't be; a folder that belongs to another run.
        TrainingDiverged: a loss or gradient that is not finite.
    """
    folder = RunFolder(workdir)
    started = time.monotonic()
    keep_freed_memory()
    quiet = jax.process_index() != 0
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
        built = assemble.assemble(
            model,
            objective,
            token_vocabulary=text.tokenizer.vocab_size,
            batch_size=batch_size,
            sequence_length=sequence_length,
        )
        program = assemble.program(
            built,
            optimizer,
            device_mesh,
            steps=steps,
            seed=seed,
            accumulate=accumulate,
            batch_size=batch_size,
        )
        train_batches = text.train_batches(batch_size, sequence_length, seed)
        ignored = gin_files.refuse_ignored(later=("eval",))
        if ignored:
            say(f"settings that this run does not use: {', '.join(ignored)}")
        config = gin_files.operative()
        folder.refuse_another_run(config, text.fingerprint())
        done = folder.complete(steps, max_seconds)
        if done:
            say(f"this run is complete at step {done['step']}; its results are in {folder.summary}")
            return done | {"samples": []}
        peak = hardware.matmul_peak(built.module.compute_dtype)
        describe(say, built, text, peak, folder)

        # The state: from the last checkpoint, or from the seed.
        saves = stack.enter_context(checkpoint.opened(folder.checkpoints, keep))
        restored = saves.restore(program.abstract_state, say=say)
        state = restored[0] if restored else program.init(seed)
        first = int(state.step)
        if restored:
            say(f"continuing at step {first} of {steps}")
        if not quiet:
            folder.write_json(folder.run, describe_run(built, text, seed, peak))
            folder.config.write_text(config, encoding="utf-8")
            text.tokenizer.save(folder.tokenizer)
            folder.cut_metrics(first)

        # The loop. Step n + 1 is dispatched before the metrics of step n are read, so that the
        # device never waits for the host.
        logs = None if quiet else stack.enter_context(contextlib.closing(Logs(folder)))
        display = stack.enter_context(progress.Display(steps, first, quiet))
        interrupted = stack.enter_context(catching_signals())
        before = restored[1].get("clock") if restored else None
        clock = Clock(peak, built, batch_size * sequence_length, before)
        eval_step = evaluate.evaluation_step(built, device_mesh)
        rate = optimizer.rate(steps)
        rows = evaluate.host_rows(batch_size)
        pending: tuple[int, StepMetrics] | None = None
        last_saved = first if restored else None
        extra = {"data": text.fingerprint(), "batch_size": batch_size, "seed": seed}

        def report(step: int, measured: StepMetrics) -> None:
            """Read a step's metrics; stop the run where they are not finite; log some of them."""
            measured = jax.device_get(measured)
            seconds = clock.tick()
            with clock.logging():
                log(step, measured, seconds)

        def log(step: int, measured: StepMetrics, seconds: float) -> None:
            finite(step, measured, folder, saves)
            slow = clock.pace.slow(seconds) if seconds is not None else None
            if slow:
                display.say(f"step {step} {slow}")
            if step % log_every and step != steps:
                return
            routing = metrics.Routing.of(measured.routers) if measured.routers else None
            loss = float(measured.loss)
            scalars = {
                "loss": loss,
                "bits_per_byte": metrics.bits_per_byte(loss, text.info.bytes_per_token),
                "learning_rate": float(rate(step - 1)),
                **{f"grad_norm/{k}": float(v) for k, v in measured.grad_norms.items()},
                "update_norm": float(measured.update_norm),
                **clock.speed(routing),
            }
            if routing is not None:
                scalars |= metrics.routing_scalars(routing, built.loss_coefficients)
            display.update(step, progress.line(scalars, metrics.health(routing)))
            if logs is not None:
                logs.scalars(step, scalars)
                if routing is not None:
                    logs.routing(routing.arrays(step))

        def held_out(state: TrainState, limit: int | None) -> evaluate.Evaluation:
            batches = text.validation_batches(batch_size, sequence_length, eval_stride, limit)
            return evaluate.evaluate(
                eval_step, state.params, state.router_state, batches, device_mesh
            )

        step = first
        batches = train_batches.batches(first, rows)
        while step < steps and not interrupted and step != stop_at and not clock.over(max_seconds):
            batch = to_devices(next(batches), program.batch_sharding, batch_size)
            state, measured = program.step(state, batch)
            step += 1
            if pending is not None:
                report(*pending)
            pending = (step, measured)
            evaluating = bool(eval_every) and step % eval_every == 0 and step < steps
            if evaluating or (save_every and step % save_every == 0):
                report(*pending)  # so that nothing broken is saved
                pending, val_loss = None, None
                if evaluating:
                    result = held_out(state, eval_bytes)
                    val_loss = result.loss
                    display.say(f"step {step} held out: {result.bits_per_byte:.3f} bits per byte")
                    if logs is not None:
                        logs.scalars(step, {"val/loss": val_loss, "val/bpb": result.bits_per_byte})
                saves.save(state, extra | {"clock": clock.total}, val_loss)
                last_saved = step
                clock.restart()
        if pending is not None:
            report(*pending)
        batches.close()
        if step < steps and clock.over(max_seconds):
            display.say(f"train.max_seconds={max_seconds:g} is over at step {step} of {steps}")

        # The final checkpoint comes before the final evaluation: nothing can cost us the run.
        if last_saved != step:
            saves.save(state, extra | {"clock": clock.total})
        saves.wait()
        if interrupted or step == stop_at != steps:
            display.say(
                f"stopped after step {step} of {steps}; the same command goes on from there"
            )
            return {"interrupted": True, "signal": interrupted.signal, "step": step}
        summary = {
            "step": step,
            **clock.summary(),
            **costs_of(built),
            "corpus": corpus_of(text),
            "matmul_peak_flops": peak,
        }
        display.say("evaluating on the held-out documents")
        result = held_out(state, None)
        summary |= {
            "val_bits_per_byte": result.bits_per_byte,
            "val_loss": result.loss,
            "val_documents": result.documents,
            "val_bytes": result.bytes,
            "baselines": baselines.baselines(text, display.say),
        }
        samples = []
        if objective.causal:
            samples = write_samples(folder, built, state, text, prompts, sequence_length, seed)
        summary |= {
            "peak_memory_bytes": hardware.peak_memory_bytes(),
            "wall_seconds": time.monotonic() - started,
        }
        if not quiet:
            folder.write_json(folder.summary, summary)
        return summary | {"samples": samples}


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


class Clock:
    """Training time without evaluations, checkpoints and the first, compiling step.

    total: sums over the whole run; `before` are those of the checkpoint that it goes on from.
    """

    def __init__(
        self, peak: float, built: assemble.Model, tokens_per_step: int, before: dict | None = None
    ):
        self.pace = progress.Pace()
        self.total = {"first_steps": 0.0, "seconds": 0.0, "steps": 0, "kept": 0.0, "logged": 0}
        self.total |= before or {}
        self._peak, self._built, self._tokens = peak, built, tokens_per_step
        self._recent: collections.deque[float] = collections.deque(maxlen=10)
        self._last = time.perf_counter()
        self._skip, self._logged = True, False

    def tick(self) -> float | None:
        """Seconds since the last step's metrics were there; None for the first, compiling step."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._skip:
            self.total["first_steps"] += seconds
            self._skip = False
            return None
        self.total["seconds"] += seconds
        self.total["steps"] += 1
        self._recent.append(seconds)
        return seconds

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """The first line of metrics compiles what it computes: its time is no step's."""
        yield
        if not self._logged:
            self._logged = True
            self.restart()

    def restart(self) -> None:
        """Forget the time since the last step: it was spent on something else."""
        self._last = time.perf_counter()

    @property
    def training_seconds(self) -> float:
        return self.total["seconds"] + self.total["first_steps"]

    def over(self, max_seconds: float | None) -> bool:
        """True when so much training time has passed."""
        return bool(max_seconds) and self.training_seconds > max_seconds

    def speed(self, routing: metrics.Routing | None) -> dict[str, float]:
        """Over the last ten steps."""
        kept = None if routing is None else routing.kept_per_token
        if kept is not None:
            self.total["kept"] += kept
            self.total["logged"] += 1
        recent = self._recent or [self.training_seconds]
        seconds = sum(recent) / len(recent)
        return metrics.speed_scalars(self._tokens, seconds, self._built.costs, kept, self._peak)

    def summary(self) -> dict[str, Any]:
        """Of the whole run, over all of its starts."""
        total = self.total
        seconds = total["seconds"] / total["steps"] if total["steps"] else total["first_steps"]
        kept = total["kept"] / total["logged"] if total["logged"] else None
        speed = metrics.speed_scalars(
            self._tokens, max(seconds, 1e-9), self._built.costs, kept, self._peak
        )
        return {
            "train_seconds": self.training_seconds,
            "first_step_seconds": total["first_steps"],
            **{name.removeprefix("speed/"): value for name, value in speed.items()},
            "kept_experts_per_token": kept,
        }


def finite(step: int, measured: StepMetrics, folder: RunFolder, saves) -> None:
    """Raise TrainingDiverged with the layers' statistics and the last good checkpoint."""
    norms = {f"gradient norm ({name})": value for name, value in measured.grad_norms.items()}
    values = {"loss": measured.loss, **norms, "update norm": measured.update_norm}
    broken = [name for name, value in values.items() if not math.isfinite(float(value))]
    if not broken:
        return
    saves.wait()
    good = saves.steps()
    told = []
    if measured.routers:
        routing = metrics.Routing.of(measured.routers)
        told = [
            f"layer {i}: load {load:.2f}, dropped {dropped:.1%}, router logits {size:.3g}"
            for i, (load, dropped, size) in enumerate(
                zip(routing.load_L, routing.dropped_L, routing.logit_size_L, strict=True)
            )
        ]
    where = f"{folder.checkpoints} holds step {good[-1]}" if good else "there is no checkpoint yet"
    raise TrainingDiverged(
        f"step {step}: not finite: {', '.join(broken)}; the last good checkpoint: {where}. "
        "Lower the learning rate or clip_norm.\n  " + "\n  ".join(told)
    )


class Signals:
    """True once SIGINT or SIGTERM came; a second one ends the program at once."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def catching_signals() -> Iterator[Signals]:
    """Finish the step and save when asked to stop. Only in the main thread."""
    caught, old = Signals(), {}

    def remember(number, frame):
        caught.signal = number
        signal.signal(number, old[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, remember)
    except ValueError:  # not the main thread: a notebook's worker, say
        old.clear()
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def describe(say, built: assemble.Model, text: PreparedData, peak: float, folder) -> None:
    """What is about to be trained, in a few lines."""
    costs, info = built.costs, text.info
    layer = built.moe_layer
    router = "none (dense)" if layer is None else type(layer.router).__name__
    losses = ", ".join(f"{c:g} * {n}" for n, c in built.loss_coefficients.items()) or "none"
    say(
        f"text: {info.name}, {info.train_bytes:,} bytes to learn from, "
        f"{info.validation_bytes:,} held out in {info.validation_documents} documents; "
        f"{info.bytes_per_token:.2f} bytes per token"
    )
    say(
        f"model: {costs.parameters_total:,} parameters, {costs.parameters_active:,} active; "
        f"{costs.flops_per_token:,} FLOPs per token; router: {router}; router losses: {losses}"
    )
    say(
        f"machine: {hardware.describe_device()}, {peak / 1e9:,.0f} GFLOP/s measured in "
        f"{built.module.compute_dtype} matmuls; run folder: {folder.path}"
    )


def costs_of(built: assemble.Model) -> dict[str, Any]:
    """Parameters and FLOPs, for run.json and summary.json."""
    costs = built.costs
    return {
        "parameters_total": costs.parameters_total,
        "parameters_active": costs.parameters_active,
        "flops_per_token": costs.flops_per_token,
    }


def corpus_of(text: PreparedData) -> dict[str, Any]:
    info = text.info
    return {"name": info.name, "bytes": info.bytes, "sha256": info.sha256}


def describe_run(built, text: PreparedData, seed: int, peak: float) -> dict[str, Any]:
    """What run.json holds: everything needed to say what this run was."""
    return {
        "versions": versions(),
        "device": hardware.describe_device(),
        "matmul_peak_flops": peak,
        "corpus": dataclasses.asdict(text.info),
        "data": text.fingerprint(),
        "tokenizer": text.tokenizer.fingerprint,
        "seed": seed,
        "router_losses": built.loss_coefficients,
        **costs_of(built),
    }


def write_samples(folder, built, state, text, prompts, context, seed) -> list[str]:
    """Continue every prompt with 160 tokens; the texts go to samples.txt."""
    made = []
    for prompt in prompts:
        made += generate(
            built,
            state.params,
            state.router_state,
            text.tokenizer,
            prompt=prompt,
            tokens=160,
            context=context,
            sampling=Sampling(temperature=0.7, top_p=0.95),
            seed=seed,
        )
    folder.samples.write_text(("\n" + "-" * 80 + "\n").join(made) + "\n", encoding="utf-8")
    return made
