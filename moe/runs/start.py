"""Where a run's first state comes from: its own checkpoint, another run's, or the seed."""

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe.data.tokens.tokenizer import Tokenizer, load_tokenizer
from moe.errors import UserError
from moe.runs.storage import checkpoint
from moe.runs.storage.folder import RunFolder
from moe.training.run_spec import RunSpec
from moe.training.train_step import Program, TrainState

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Given:
    """What a run without a checkpoint of its own starts from.

    run: another run's folder, for its newest checkpoint, or one of its checkpoints, such as
    RUN/checkpoints/200. optimizer: with its optimizer's state.
    """

    seed: int
    run: str | None
    optimizer: bool

    def place(self) -> tuple[RunFolder, int | None]:
        """The other run's folder, and the step that is named, if one is."""
        path = Path(self.run or "").expanduser()
        if path.parent.name == "checkpoints" and path.name.isdecimal():
            return RunFolder(path.parent.parent), int(path.name)
        return RunFolder(path), None


def first_state(
    saves: checkpoint.Checkpoints, program: Program, tokenizer: Tokenizer, given: Given, say: Say
) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """The state, what its checkpoint holds beside it, and what run.json is to say of its source.

    A run that goes on holds that in its own checkpoints, and does not look at `given`.

    Raises:
        UserError: checkpoints that can't be read; another run that is not of this model.
    """
    restored = saves.restore(program.abstract_state, say=say)
    if restored is not None:
        state, extra = restored
        return state, extra, {k: extra[k] for k in ("started_from",) if k in extra}
    try:
        state = program.init(given.seed)
    except ValueError as error:  # a router that looks at the text, say
        raise UserError(str(error)) from error
    if given.run is None:
        return state, {}, {}
    state, step = from_run(given, state, program, tokenizer, say)
    return state, {}, {"started_from": {"run": given.run, "step": step}}


def from_run(
    given: Given, state: TrainState, program: Program, tokenizer: Tokenizer, say: Say
) -> tuple[TrainState, int]:
    """The first state with another run's values, and the step that they are of.

    The step is 0 and the schedule starts anew, with the optimizer's moments too.
    """
    where = f"train.start_from={given.run!r}"
    folder, step = given.place()
    if not (folder.checkpoints.is_dir() and folder.tokenizer.is_dir()):
        raise UserError(f"{where}: no run with checkpoints there")
    if load_tokenizer(folder.tokenizer).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{where}: that run has another tokenizer; take its own: TextData.tokenizer = "
            f"@TokenizerFile() and TokenizerFile.path = {str(folder.tokenizer)!r}"
        )
    kinds = ("params", "router_state", *(["opt_state"] if given.optimizer else []))
    abstract = checkpoint.as_tree(program.abstract_state)
    wanted = {name: a for name, a in abstract.items() if name.split(".")[0] in kinds}
    with checkpoint.opened(folder.checkpoints, read_only=True) as theirs:
        try:
            found = theirs.values(wanted, step, say)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if found is None:
        raise UserError(f"{where}: it holds no checkpoint yet")
    values, step = found
    leaves = [values.get(name, leaf) for name, leaf in checkpoint.as_tree(state).items()]
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    state = dataclasses.replace(state, opt_state=_schedule_from_zero(state.opt_state))
    say(f"starting from step {step} of {given.run}: {', '.join(kinds).replace('_', ' ')}")
    return state, step


def _schedule_from_zero(opt_state: Any) -> Any:
    """The optimizer's state with the learning rate's own step at its beginning."""

    def is_schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

    def reset(node):
        return node._replace(count=jnp.zeros_like(node.count)) if is_schedule(node) else node

    return jax.tree.map(reset, opt_state, is_leaf=is_schedule)


def told(first: int, spec: RunSpec, folder: RunFolder, rate_N: np.ndarray, say: Say) -> None:
    """Say how a run goes on that has trained `first` steps: of how many, by which schedule."""
    steps, stop_at, before = spec.steps, spec.stop_at, folder.steps
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
