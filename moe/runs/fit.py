"""As many steps as a time allows, measured before them, so that the schedule ends there."""

from collections.abc import Iterator
import dataclasses
import json
import re
import statistics
import time

import jax
import jax.numpy as jnp

from moe.data.batch import Batch
from moe.errors import UserError
from moe.machine import processes
from moe.runs.storage.folder import RunFolder
from moe.training.run_spec import RunSpec
from moe.training.train_step import Program, TrainState, to_devices

MEASURED = 4  # steps, after the one that compiles
SHARE = 0.95  # of the time is planned for; logging and a busy machine take the rest


def as_before(spec: RunSpec, folder: RunFolder) -> RunSpec:
    """With the number of steps that this folder's run was given, if it was given another one."""
    if not (spec.fit_steps and folder.run.exists()):
        return spec
    fitted = json.loads(folder.run.read_text(encoding="utf-8")).get("fitted_steps", {})
    return dataclasses.replace(spec, steps=fitted.get(str(spec.steps), spec.steps))


def steps_that_fit(
    spec: RunSpec, program: Program, state: TrainState, batches: Iterator[Batch], used: float
) -> int:
    """How many steps, with those of the state, `max_seconds` has room for; at most `spec.steps`.

    They are tried on a copy of the state. used: seconds of training that are spent already.

    Raises:
        UserError: there is room for none beyond those that are trained.
    """
    assert spec.max_seconds is not None
    trial, seconds = jax.tree.map(jnp.copy, state), []
    for _ in range(1 + MEASURED):
        batch = to_devices(next(batches), program.batch_sharding, spec.batch_size)
        start = time.perf_counter()
        trial, measured = program.step(trial, batch)
        jax.block_until_ready(measured.loss)
        seconds.append(time.perf_counter() - start)
    compiling, pace = seconds[0], statistics.median(seconds[1:])
    first, room = int(state.step), (SHARE * spec.max_seconds - used - compiling) / pace
    room = processes.least(int(max(room, 0 if first else 1)))
    if room < 1:
        raise UserError(
            f"{used:.0f} of train.max_seconds={spec.max_seconds:g} are spent on {first} steps, and "
            f"there is no room for more; to train on, give more of both: train.steps={spec.steps} "
            f"would take about {used + compiling + pace * (spec.steps - first):.0f} seconds"
        )
    return min(spec.steps, first + room)


def told(spec: RunSpec, steps: int) -> str:
    """What became of the number of steps that was asked for."""
    return (
        f"train.max_seconds={spec.max_seconds:g} has room for {steps} of train.steps={spec.steps} "
        f"here, so that the schedule ends at {steps}"
    )


def ended(step: int, spec: RunSpec, folder: RunFolder) -> str:
    """That a run is complete, and why where it is before its last step."""
    where = f"its results are in {folder.summary}"
    if step >= spec.steps:
        return f"this run is complete at step {step}; {where}"
    return (
        f"this run ended at step {step} of {spec.steps}, when train.max_seconds="
        f"{spec.max_seconds:g} was over; {where}. To train on, give more of both"
    )


def with_steps(config: str, steps: int) -> str:
    """A config's text with this number of steps."""
    return re.sub(r"^((?:.*/)?train\.steps) = .*$", rf"\1 = {steps}", config, flags=re.MULTILINE)
