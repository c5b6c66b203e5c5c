"""As many steps as a time allows: measured before training, so that the schedule ends with it."""

from collections.abc import Callable, Iterator
import dataclasses
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from moe.data.batch import Batch
from moe.errors import UserError
from moe.machine import processes
from moe.runs.setup import Setup
from moe.runs.storage.folder import RunFolder
from moe.runs.tracking.throughput import trained_seconds
from moe.training.run_spec import RunSpec
from moe.training.train_step import TrainState, to_devices

TIMED_STEPS = 4  # after the one that compiles
SHARE = 0.95  # of the time is planned for; logging and a busy machine take the rest


def with_fitted_steps(spec: RunSpec, folder: RunFolder) -> RunSpec:
    """The spec with the number of steps that the folder's run was shortened to, if it was."""
    if not (spec.fit_steps and folder.run.exists()):
        return spec
    fitted = folder.read_json(folder.run, data=dict).get("fitted_steps", {})
    return dataclasses.replace(spec, steps=fitted.get(str(spec.steps), spec.steps))


def fitted(
    setup: Setup,
    state: TrainState,
    clock: dict[str, Any] | None,
    folder: RunFolder,
    say: Callable[[str], None],
) -> Setup:
    """The setup with as many steps as `train.max_seconds` has room for, where `fit_steps` asks.

    A run that the folder holds for this number of steps already keeps it.
    clock: sums of the throughput meter from the run's checkpoint, None for a new run.

    Raises:
        UserError: there is no time for a step beyond those that are trained.
    """
    spec = setup.spec
    held = clock is not None and folder.steps == spec.steps
    if not spec.fit_steps or spec.max_seconds is None or held:
        return setup
    say("timing some steps")
    batches = setup.train_batches.batches(int(state.step), setup.rows)
    steps = steps_that_fit(setup, state, batches, trained_seconds(clock))
    batches.close()
    if steps >= spec.steps:
        return setup
    say(
        f"train.max_seconds={spec.max_seconds:g} has room for {steps} of train.steps={spec.steps} "
        f"here, so that the schedule ends at {steps}"
    )
    return setup.with_steps(steps)


def steps_that_fit(
    setup: Setup, state: TrainState, batches: Iterator[Batch], used_seconds: float
) -> int:
    """The number of steps, from the run's first one, that fit in `max_seconds`; at most `steps`.

    Some are timed on a copy of the state, which then is discarded.
    used_seconds: seconds of training before this state.

    Raises:
        UserError: as `fitted`.
    """
    spec, program = setup.spec, setup.program
    assert spec.max_seconds is not None
    trial, seconds = jax.tree.map(jnp.copy, state), []
    for _ in range(1 + TIMED_STEPS):
        batch = to_devices(next(batches), program.batch_sharding, spec.batch_size)
        start = time.perf_counter()
        trial, measured = program.step(trial, batch)
        jax.block_until_ready(measured.loss)
        seconds.append(time.perf_counter() - start)
    compiling, pace = seconds[0], statistics.median(seconds[1:])
    first, room = int(state.step), (SHARE * spec.max_seconds - used_seconds - compiling) / pace
    room = processes.minimum(int(max(room, 0 if first else 1)))
    if room < 1:
        needed = used_seconds + compiling + pace * (spec.steps - first)
        raise UserError(
            f"{used_seconds:.0f} of train.max_seconds={spec.max_seconds:g} are spent on {first} "
            "steps, and no further step fits; to train on, raise train.steps and "
            f"train.max_seconds: train.steps={spec.steps} would take about {needed:.0f} seconds"
        )
    return min(spec.steps, first + room)


def complete_message(step: int, spec: RunSpec, folder: RunFolder) -> str:
    """That a run is complete, and why, where it ended before its last step."""
    where = f"its results are in {folder.summary}"
    if step >= spec.steps:
        return f"this run is complete at step {step}; {where}"
    return (
        f"this run ended at step {step} of {spec.steps}, when train.max_seconds="
        f"{spec.max_seconds:g} was over; {where}. To train on, raise both"
    )


def late_message(step: int, spec: RunSpec) -> str:
    """That the time is over before the last step, and what helps."""
    return (
        f"train.max_seconds={spec.max_seconds:g} is over at step {step} of {spec.steps}, before "
        "the schedule's end; raise it, or lower train.steps, for the learning rate to end low"
    )


def with_steps(config: str, steps: int) -> str:
    """A config's text with this number of steps."""
    return re.sub(r"^((?:.*/)?train\.steps) = .*$", rf"\1 = {steps}", config, flags=re.MULTILINE)
