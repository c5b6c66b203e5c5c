"""The weights that `moe eval` and `moe generate` compute with: `--weights` and `train.weights`."""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp

from moe.errors import UserError, nearest
from moe.inference.calibration import calibrated
from moe.model import sharding
from moe.runs.restore import Restored, restore_run
from moe.training import objective as objectives
from moe.training.quantisation import Quantisation
from moe.training.run_spec import RunSpec
from moe.training.train_step import to_devices
from routing.inputs import Tokens

ROUNDINGS = ("nearest", "gptq")
CALIBRATION_BYTES = 200_000
ROWS = 2**15  # of experts' slots, in one batch


def restored_with_weights(
    flags, spec: RunSpec, step: int | None = None
) -> tuple[Restored, dict[str, Any]]:
    """A run with its weights rounded by `--weights`, or else by its own config, and what a report
    says of them.

    Raises:
        UserError: what can't be read, or doesn't fit the model; a package that is missing.
    """
    _check_flags(flags)
    how, by_inputs = spec.weights, flags.rounding == "gptq"
    if flags.weights:
        how = Quantisation.read(flags.weights, flags.weights_of)
        if spec.weights is not None:
            _say(f"the run computes with {spec.weights} (train.weights)")
            _say(f"its float weights are rounded to {how} instead")
    # Rounded once, and by one of them.
    first = dataclasses.replace(spec, weights=None if by_inputs else how)
    run = restore_run(flags.workdir, first, step)
    if how is None:
        return run, {}
    size = how.size(run.params, run.model.graph.declared)
    said = {"weights": str(how), "bits_per_weight": size.bits_per_weight}
    said |= {"parameter_bytes": size.bytes}
    if flags.weights:
        said |= {"rounding": flags.rounding}
    if not by_inputs:
        return run, said
    run, calibration_bytes = with_second_order(run, how, flags.calibration_bytes)
    return run, said | {"calibration_bytes": calibration_bytes}


def _check_flags(flags) -> None:
    """Raise UserError for flags that say nothing, or nothing together."""
    if flags.rounding not in ROUNDINGS:
        hint = nearest(flags.rounding, ROUNDINGS) or f"; there are {', '.join(ROUNDINGS)}"
        raise UserError(f"--rounding={flags.rounding}: no such rounding{hint}")
    if not flags.weights and flags.weights_of:
        raise UserError(f"--weights_of={flags.weights_of} needs --weights=FORMAT")
    if not flags.weights and flags.rounding != "nearest":
        raise UserError(f"--rounding={flags.rounding} needs --weights=FORMAT")
    if flags.calibration_bytes and flags.rounding != "gptq":
        raise UserError(f"--calibration_bytes={flags.calibration_bytes} needs --rounding=gptq")


def with_second_order(
    run: Restored, how: Quantisation, num_bytes: int | None = None
) -> tuple[Restored, int]:
    """The run with its weights rounded by their inputs, and the bytes of training text for them.

    run: with its float weights.

    Raises:
        UserError: as `Quantisation.check`; the run's text is not what it was.
    """
    how.check(run.params, run.model.graph.declared)
    batches, num_bytes = calibration_tokens(run, num_bytes or CALIBRATION_BYTES)
    model = run.model
    stacks = model.module.stacks
    found = calibrated(how, model.graph, stacks, run.params, run.router_state, batches, run.mesh)
    if found.nearest:
        _say(
            f"rounded to the nearest, as no layer sums over their rows: {', '.join(found.nearest)}"
        )
    if found.starved:
        layers = ", ".join(f"{count} in layer {n}" for n, count in found.starved.items())
        _say(f"experts with fewer tokens than inputs, more damped for it: {layers}")
    return dataclasses.replace(run, params=found.params), num_bytes


def calibration_tokens(run: Restored, num_bytes: int) -> tuple[list[Tokens], int]:
    """The first windows of the run's training text, as at evaluation, and about how many bytes."""
    data, spec, model = run.text(": nothing to calibrate with"), run.spec, run.model
    experts = model.moe_layer.num_experts if model.moe_layer else 1
    per_device = max(1, min(8, ROWS // (experts * spec.sequence_length)))
    batch_size = per_device * sharding.batch_shards(run.mesh)
    window_bytes = spec.sequence_length * data.info.bytes_per_token
    made = data.train_batches(batch_size, spec.sequence_length, spec.seed)
    windows = min(num_bytes / window_bytes, made.windows_per_epoch)
    where = sharding.by_batch(run.mesh)
    key = objectives.step_key(0, objectives.EVALUATION)
    count = max(1, round(windows / batch_size))

    @jax.jit
    def tokens_of(batch):
        batch = objectives.prepared(model.objective, batch, key, jnp.asarray(model.num_bytes_2V))
        return objectives.tokens_of(batch, key, train=False)

    batches = [tokens_of(to_devices(made.batch(i), where, batch_size)) for i in range(count)]
    return batches, round(count * batch_size * window_bytes)


def _say(line: str) -> None:
    print(f"moe: {line}", file=sys.stderr)
