"""One cell of a sweep, an arm at one place of the axes: its config, its costs, its trials."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import math
from pathlib import Path
import sys
import tempfile
from typing import Any

import jax

from moe import settings
from moe.errors import Problems, UserError
from moe.model.flops import Costs
from moe.settings import read
from moe.sweeps.spec import MATCHED, folder_name, is_file
from moe.training.abstract_model import AbstractModel, Vocabulary
from moe.training.run_spec import RunSpec
from routing.records import Causality

SHUFFLED = "TextData.shuffle_tokens"
DECODED_AT_ONCE = 16  # sequences, for the facts
Settings = dict[str, str]  # value by name, both as a config writes them


@dataclasses.dataclass(frozen=True)
class Config:
    """Gin text as data, in one piece: nothing that it once was read from can change it any more.

    Attributes:
        settings: the last value of each setting, as text.
        imports: statements.
        folders: where imported modules may lie.
    """

    settings: Settings
    imports: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def text(self, more: Mapping[str, object] | None = None) -> str:
        """The config's text, with further settings."""
        values = self.settings | {name: repr(value) for name, value in (more or {}).items()}
        # Macros first: a setting may name them.
        ordered = sorted(values.items(), key=lambda item: "." in item[0])
        lines = [*self.imports, *(f"{name} = {value}" for name, value in ordered)]
        return "\n".join(lines) + "\n"


def read_config(changes: Sequence[str]) -> Config:
    """The config that changes make up, each a gin file or a setting; later ones win.

    Raises:
        UserError: files that are missing, or text that can't be read.
    """
    values, imports, folders, problems = {}, {}, {}, []
    for change in changes:
        reading = read.read([change], []) if is_file(change) else read.read([], [change])
        problems += [line.removeprefix("--gin_file=") for line in reading.problems]
        for setting in reading.settings:
            values.pop(setting.key, None)
            values[setting.key] = repr(setting.value)
        imports |= dict.fromkeys(statement.format() for _, statement in reading.imports)
        if reading.imports:  # else a plan would name this machine's folders for nothing
            folders |= dict.fromkeys(map(str, reading.folders))
    if problems:
        raise Problems(problems)
    return Config(values, tuple(imports), tuple(folders))


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm at one place of the axes.

    Attributes:
        name: unique in the sweep.
        baseline: the name of the cell that this one is compared with.
        settings, imports, folders: of its config.
        tuned: settings that are searched; those that the arm doesn't read are left out.
        facts: costs, router and causality; and how it was matched.
    """

    name: str
    arm: str
    axes: dict[str, object]
    baseline: str
    settings: dict[str, str]
    imports: tuple[str, ...]
    folders: tuple[str, ...]
    tuned: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def config(self) -> Config:
        return Config(self.settings, self.imports, self.folders)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: a cell with a seed and tuned values.

    phase: `tuning`, `report`, or the control `same` or `shuffled`.
    part: of a widened range, as a word of its name; empty within the ranges as they were given.
    """

    cell: Cell
    phase: str
    number: int
    seed: int
    tuned: dict[str, float]
    part: str = ""

    @property
    def name(self) -> str:
        words = [self.phase, *filter(None, [self.part]), str(self.number)]
        return f"{folder_name(self.cell.name)}/{'-'.join(words)}"

    @property
    def changes(self) -> dict[str, object]:
        """What it sets beside its cell's config."""
        shuffled = {SHUFFLED: True} if self.phase == "shuffled" else {}
        return {"train.seed": self.seed, **self.tuned, **shuffled}

    def text(self) -> str:
        """The whole config as gin text."""
        return self.cell.config.text(self.changes)


@dataclasses.dataclass(frozen=True)
class Built:
    """A run's spec and its model without values."""

    spec: RunSpec
    model: AbstractModel
    unused: frozenset[str]

    @property
    def tokens(self) -> int:
        """Tokens of training."""
        return math.prod(self.spec.shape) * self.spec.steps

    def amount(self, match: str) -> float:
        """What `sweep.match` compares, but for time."""
        costs = self.model.costs
        return {
            "active_flops": costs.flops_per_token,
            "training_flops": costs.flops_per_token * self.tokens,
            "active_parameters": costs.parameters_active,
            "total_parameters": costs.parameters_total,
            "memory": self.state_bytes(),
            "data": self.tokens,
        }[match]

    def state_bytes(self) -> int:
        """Bytes of parameters, router state and optimizer state."""
        params, router_state = self.model.shapes
        declared, in_force = self.model.graph.declared, self.spec.in_force
        optimizer = in_force.optimizer.build(declared)
        kept = jax.eval_shape(lambda p: in_force.precision.init(optimizer, p, declared), params)
        arrays = jax.tree.leaves((kept, router_state))
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)

    def facts(self) -> dict[str, Any]:
        """Costs, router and causality, for the plan and the report."""
        costs, layer = self.model.costs, self.model.moe_layer
        found = {
            "parameters_total": costs.parameters_total,
            "parameters_active": costs.parameters_active,
            "flops_per_token": costs.flops_per_token,
            "steps": self.spec.steps,
            "tokens": self.tokens,
            "training_flops": float(costs.flops_per_token * self.tokens),
            "state_bytes": self.state_bytes(),
            "decode_parameters": parameters_read(costs, DECODED_AT_ONCE),
            "router": None,
            "causality": Causality.CAUSAL.value,
            "decoding": "dense: no token is routed",
            "leaks": bool(self.model.module.leak),
        }
        if layer is not None:
            found["router"] = type(layer.router).__name__
            found["causality"] = layer.router.causality.value
            found["decoding"] = layer.router.decoding
        return found


def parameters_read(costs: Costs, tokens: int) -> float:
    """The parameters that decoding reads for each of so many tokens at once.

    Tokens share what all of them use. Of E experts, K a token, they wake E (1 - (1 - K/E)^tokens)
    when each token chooses evenly and on its own.
    """
    experts, chosen = costs.num_experts, min(costs.experts_per_token, costs.num_experts)
    if experts <= chosen:
        return costs.parameters_active / tokens
    each = (costs.parameters_total - costs.parameters_active) / (experts - chosen)
    woken = experts * (1 - (1 - chosen / experts) ** tokens)
    return (costs.parameters_active + each * (woken - chosen)) / tokens


def build(config: Config, more: Mapping[str, object] | None = None) -> Built:
    """Load a config, with further settings, and trace its model; nothing is allocated.

    Raises:
        UserError: settings that are wrong, or sizes that don't fit together.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trial.gin")
        path.write_text(config.text(more), encoding="utf-8")
        with extended_path(config.folders):
            settings.load([str(path)], say=lambda line: None)
    spec = RunSpec()
    spec.in_force.optimizer.rate(spec.steps)  # makes the schedule, so that its settings are read
    model = spec.build_model(Vocabulary(spec.vocab_size))
    return Built(spec, model, frozenset(settings.unused(later=("eval",))))


def with_steps(
    config: Config, built: Built, tokens_per_parameter: float | None, flops: float | None
) -> Config:
    """The config with `train.steps` that follow from a budget; the same without one."""
    per_step = math.prod(built.spec.shape)
    if tokens_per_parameter is not None:
        steps = tokens_per_parameter * built.model.costs.parameters_active / per_step
    elif flops is not None:
        steps = flops / built.model.costs.flops_per_token / per_step
    else:
        return config
    return dataclasses.replace(
        config, settings=config.settings | {"train.steps": repr(max(1, round(steps)))}
    )


def matched(
    config: Config,
    first: Built,
    match: str,
    target: float,
    knobs: Sequence[str],
    tolerance: float,
) -> tuple[Config, Built, dict[str, int], float]:
    """The config with one setting changed so that its amount is the target.

    first: the config's model as it is.

    Returns:
        The config and its model; what was solved for, by setting; the relative difference left.

    Raises:
        UserError: no setting of `knobs` brings the amount within the tolerance.
    """
    off = first.amount(match) / target - 1
    if abs(off) <= tolerance:
        return config, first, {}, off
    best = (abs(off), "as it is")
    for knob in knobs:
        value = current_value(config, knob)
        if value is None or knob in first.unused:
            continue
        found = solve(config, match, target, knob, value, first)
        for number, built in found.items():
            off = built.amount(match) / target - 1
            best = min(best, (abs(off), f"{knob}={number}"))
        number = min(found, key=lambda n: abs(found[n].amount(match) / target - 1))
        off = found[number].amount(match) / target - 1
        if abs(off) <= tolerance:
            solved = dataclasses.replace(config, settings=config.settings | {knob: repr(number)})
            return solved, found[number], {knob: number}, off
    tried = ", ".join(knobs) or "nothing"
    raise UserError(
        f"{MATCHED[match]} can't be matched within {tolerance:.1%}: nearest is {best[1]} "
        f"with {best[0]:.1%}; sweep.solve may change {tried}"
    )


def solve(
    config: Config, match: str, target: float, knob: str, value: int, first: Built
) -> dict[int, Built]:
    """Models with values of a setting near the one that reaches the target, by value.

    The amount is taken for a straight line through the last two values, as FLOPs and parameters
    are in a width of experts or a number of steps.
    """
    found = {value: first}
    other = max(1, value // 2 if first.amount(match) > target else value * 2)
    for _ in range(4):
        if other in found:
            break
        try:
            found[other] = build(config, {knob: other})
        except UserError:  # a value that this model can't have
            break
        (b, at_b), (a, at_a) = [(n, m.amount(match)) for n, m in list(found.items())[-2:]]
        if at_a == at_b:
            break
        other = max(1, round(a + (target - at_a) * (b - a) / (at_b - at_a)))
    return found


def current_value(config: Config, knob: str) -> int | None:
    """A setting's whole number in a config; None without one."""
    text = config.settings.get(knob, "")
    return int(text) if text.isdecimal() else None


@contextlib.contextmanager
def extended_path(folders: Sequence[str]) -> Iterator[None]:
    """Meanwhile, modules are found in these folders, too."""
    added = [folder for folder in folders if folder not in sys.path]
    sys.path.extend(added)
    try:
        yield
    finally:
        sys.path[:] = [folder for folder in sys.path if folder not in added]
