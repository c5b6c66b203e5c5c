"""A run's first state, from its own checkpoint, another run's, or the seed; and how it goes on."""

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe.data.tokens.tokenizer import Tokenizer
from moe.errors import UserError
from moe.runs.setup import Setup
from moe.runs.storage import checkpoint
from moe.runs.storage.folder import AnotherRun, RunFolder
from moe.training.precision import Precision
from moe.training.run_spec import RunSpec
from moe.training.train_step import Program, TrainState

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Source:
    """What a run without a checkpoint of its own starts from.

    Attributes:
        seed: of the first values.
        run: another run's folder, for its newest checkpoint, or one of its checkpoints, such as
            RUN/checkpoints/200; None for the seed's values alone.
        optimizer: whether that run's optimizer state is taken, too.
    """

    seed: int
    run: str | None
    optimizer: bool

    def folder_and_step(self) -> tuple[RunFolder, int | None]:
        """The other run's folder, and the step of the checkpoint that is named, if one is."""
        path = Path(self.run or "").expanduser()
        if path.parent.name == "checkpoints" and path.name.isdecimal():
            return RunFolder(path.parent.parent), int(path.name)
        return RunFolder(path), None


def first_state(
    saves: checkpoint.Checkpoints, setup: Setup, source: Source, say: Say
) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """The run's first state, restored from its own checkpoints or else made from `source`.

    Returns:
        The state; the JSON that its checkpoint holds beside it, empty where nothing was restored;
        and the entry of run.json that names the other run it started from, empty without one. A
        restored run has that entry from its checkpoint.

    Raises:
        UserError: checkpoints that can't be read, or of another text, batch size or seed; another
            run whose model differs.
    """
    program, tokenizer = setup.program, setup.text.tokenizer
    restored = saves.restore(program.abstract_state, say=say)
    if restored is not None:
        state, extra = restored
        _refuse_another_run(extra, setup.identity, saves.folder)
        return state, extra, {k: extra[k] for k in ("started_from",) if k in extra}
    try:
        state = program.init(source.seed)
    except ValueError as error:  # of a router that can't use this text, say
        raise UserError(str(error)) from error
    if source.run is None:
        return state, {}, {}
    state, step = from_run(source, state, program, tokenizer, say)
    return state, {}, {"started_from": {"run": source.run, "step": step}}


def state_again(
    saves: checkpoint.Checkpoints, setup: Setup, source: Source, say: Say
) -> tuple[TrainState, dict[str, Any]]:
    """The first two results of `first_state`, for a run that goes back to its newest checkpoint."""
    return first_state(saves, setup, source, say)[:2]


def _refuse_another_run(theirs: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    """AnotherRun where a checkpoint records another identity; config.gin may be lost or altered."""
    there, here = ({**given.get("data", {}), **given} for given in (theirs, ours))
    differs = [
        f"{name}: {there.get(name)} there, {value} here"
        for name, value in here.items()
        if name != "data" and there.get(name) != value
    ]
    if differs:
        raise AnotherRun(
            f"{folder} holds the checkpoints of another run; choose another --workdir, or the same "
            "settings to continue it. What differs: " + "; ".join(differs)
        )


def from_run(
    source: Source, state: TrainState, program: Program, tokenizer: Tokenizer, say: Say
) -> tuple[TrainState, int]:
    """The state with another run's values in it, and the step of the checkpoint they come from.

    The state's own step stays 0 and its schedule starts anew, even where the optimizer's moments
    are taken over. Float32 masters are taken over with the moments; without them they start at the
    values of the parameters.

    Raises:
        UserError: no such checkpoint, another tokenizer or another model.
    """
    where = f"train.start_from={source.run!r}"
    folder, step = source.folder_and_step()
    if not (folder.checkpoints.is_dir() and folder.tokenizer.is_dir()):
        raise UserError(f"{where}: no run with checkpoints there")
    if folder.own_tokenizer().fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{where}: that run has another tokenizer; take its own: TextData.tokenizer = "
            f"@TokenizerFile() and TokenizerFile.path = {str(folder.tokenizer)!r}"
        )
    kinds = ("params", "router_state", *(["opt_state"] if source.optimizer else []))
    abstract = checkpoint.as_tree(program.abstract_state)
    wanted = {name: a for name, a in abstract.items() if name.split(".")[0] in kinds}
    with checkpoint.opened(folder.checkpoints, read_only=True) as theirs:
        try:
            found = theirs.values(wanted, step, say)
        except checkpoint.NoOptimizer as error:
            raise UserError(f"{where}: {error}; leave out train.start_from_optimizer") from error
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if found is None:
        raise UserError(f"{where}: it holds no checkpoint yet")
    values, step = found
    leaves = [values.get(name, leaf) for name, leaf in checkpoint.as_tree(state).items()]
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    opt_state = _schedule_from_zero(state.opt_state)
    if not source.optimizer:
        opt_state = Precision.with_values(opt_state, state.params)
    state = dataclasses.replace(state, opt_state=opt_state)
    say(f"starting from step {step} of {source.run}: {', '.join(kinds).replace('_', ' ')}")
    return state, step


def _schedule_from_zero(opt_state: Any) -> Any:
    """The optimizer's state with the learning-rate schedule's step count set to 0."""

    def is_schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

    def reset(node):
        return node._replace(count=jnp.zeros_like(node.count)) if is_schedule(node) else node

    return jax.tree.map(reset, opt_state, is_leaf=is_schedule)


def report(first: int, spec: RunSpec, folder: RunFolder, rate_N: np.ndarray, say: Say) -> None:
    """Say at which step a restored run goes on, and by which schedule.

    first: steps that are trained already. rate_N: the learning rate of each of the run's N steps.
    """
    steps, stop_at, before = spec.steps, spec.stop_at, folder.steps
    if not first and folder.metrics.exists() and folder.metrics.stat().st_size:
        say(f"{folder.path} holds metrics and no checkpoint: the run starts anew, and so do they")
    if first:
        say(f"continuing at step {first} of {steps}")
    if first and before not in (None, steps) and first < steps:
        rate = float(dataclasses.replace(spec, steps=before).rates()[first - 1])
        say(
            f"train.steps was {before} and is {steps}: the schedule is built for all {steps}, so "
            f"that the learning rate of step {first + 1} is {rate_N[first]:.3g}; that of step "
            f"{first} was {rate:.3g}"
        )
    if stop_at is not None and stop_at <= first < steps:
        say(
            f"train.stop_at={stop_at} is reached already: nothing is trained; raise it, or take "
            "it out"
        )


def stopped_message(step: int, spec: RunSpec) -> str:
    """That the run stopped before its last step, and how it is continued."""
    at_stop = step == spec.stop_at
    way_on = "without train.stop_at it goes on" if at_stop else "the same command goes on"
    return f"stopped after step {step} of {spec.steps}; {way_on}"
