"""A sweep as a config describes it: a question, arms, axes, what is held equal, tuning, seeds."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import math
import re
from typing import Literal

import gin

from moe.errors import Problems, UserError, nearest
from routing.ranges import Count, Natural, NonNegative, Positive

LONGEST = 200  # bytes of a folder's name
Changes = Sequence[str]  # gin files and settings, in the order in which they take effect
Match = Literal[
    "active_flops",
    "training_flops",
    "active_parameters",
    "total_parameters",
    "memory",
    "data",
    "wall_time",
]
MATCHED = {  # `sweep.match` in words
    None: "nothing",
    "active_flops": "active FLOPs per token",
    "training_flops": "training FLOPs",
    "active_parameters": "active parameters",
    "total_parameters": "total parameters",
    "memory": "bytes of parameters and optimizer state",
    "data": "training tokens",
    "wall_time": "seconds of training",
}


@gin.configurable("sweep")  # pyright: ignore[reportCallIssue]
@dataclasses.dataclass(frozen=True)
class SweepSpec:
    """A sweep; in a config it is `sweep`.

    Changes are gin files and settings, such as `('routers/switch.gin', 'Switch.jitter = 0.0')`, and
    take effect in their order: those of `base`, of the arm, of the axes, and what is tuned.

    Attributes:
        question: what the sweep answers, in a sentence.
        base: changes that all runs share; the first is a whole run's file.
        arms: changes of each arm, by its name.
        baseline: the arm that the others are compared with.
        axes: by name, the values of a setting (`{'MoELayer.num_experts': (8, 32)}`), or the changes
            of each value (`{'size': {'small': (...), 'large': (...)}}`). Every arm runs at every
            combination.
        outside: arms that the axes don't concern: each runs once. Or, by the arm's name, its place
            on those axes that don't concern it: `{'dense': {'MoELayer.num_experts': 1}}`. It is
            noted and changes nothing.
        match: what every arm has as much of as the baseline at the same axes: `active_flops` (FLOPs
            per token), `training_flops`, `active_parameters`, `total_parameters`, `memory` (bytes
            of parameters and optimizer state), `data` (tokens), `wall_time` (measured; see
            `seconds`); None matches nothing.
        solve: whole-numbered settings that may be changed to match. Of an arm, the first that
            changes what is matched.
        tolerance: the largest relative difference that is left.
        seconds: of training for each run, with `match = 'wall_time'`.
        tokens_per_parameter: where given, `train.steps` follow from the active parameters.
        flops: where given, `train.steps` follow from these training FLOPs.
        tune: ranges that are searched for every arm alike, by setting: `(low, high, 'log')` or
            `(low, high, 'linear')`. An arm that doesn't read a setting is tuned without it.
        trials: runs that tune each arm at each place of the axes.
        widen: how often the ranges are widened, for all arms, while an arm's best value is the
            lowest or highest that was tried.
        seeds: runs that are reported for each arm, at its best values, with seeds that tuning did
            not use.
        delta: the smallest difference that matters, in bits per byte.
        controls: negative controls: `same` runs the baseline again under another name, `shuffled`
            runs every arm on documents whose tokens are shuffled.
        seed: of the search; tuning trains with this seed, and reported runs with the next ones.
    """

    question: str
    base: Changes
    arms: Mapping[str, Changes]
    baseline: str
    axes: Mapping[str, Sequence | Mapping[str, Changes]] = dataclasses.field(default_factory=dict)
    outside: Sequence[str] | Mapping[str, Mapping[str, object]] = ()
    match: Match | None = "active_flops"
    solve: Sequence[str] = ("MoELayer.d_ff", "FeedForward.d_ff")
    tolerance: Positive = 0.01
    seconds: Positive | None = None
    tokens_per_parameter: Positive | None = None
    flops: Positive | None = None
    tune: Mapping[str, Sequence] = dataclasses.field(default_factory=dict)
    trials: Natural = 0
    widen: Natural = 0
    seeds: Count = 3
    delta: NonNegative = 0.005
    controls: Sequence[str] = ("same",)
    seed: Natural = 0

    def __post_init__(self):
        problems = [*self._problems()]
        if problems:
            raise Problems(problems)

    def _problems(self):
        """A line for each mistake."""
        for name in ("base", "outside", "solve", "controls"):
            if isinstance(getattr(self, name), str):
                yield f"sweep.{name}={getattr(self, name)!r}: write a list, as ['...']"
        if not self.arms:
            yield "sweep.arms is empty: name at least the baseline"
        for name, changes in self.arms.items():
            if isinstance(changes, str):
                yield f"sweep.arms: {name!r}: write a list of changes, as [{changes!r}]"
        for given, where in ((self.baseline, "baseline"), *((n, "outside") for n in self.outside)):
            if given not in self.arms:
                hint = nearest(given, self.arms) or f"; there are {', '.join(self.arms)}"
                yield f"sweep.{where}: no arm {given!r}{hint}"
        for name, values in self.axes.items():
            if isinstance(values, str) or not values:
                yield f"sweep.axes: {name!r}: expected some values, got {values!r}"
            elif not isinstance(values, Mapping) and "." not in name:
                yield f"sweep.axes: {name!r} is no setting; give each value its changes, by name"
            elif not isinstance(values, Mapping) and not all(map(_is_plain, values)):
                yield (
                    f"sweep.axes: {name!r}: references take named changes, as "
                    f"{{'switch': ('{name} = @Switch',)}}"
                )
        if isinstance(self.outside, Mapping):
            for arm, place in self.outside.items():
                yield from self._outside_problems(arm, place)
        for name, given in self.tune.items():
            yield from _range_problems(name, given)
        if self.tune and not self.trials:
            yield "sweep.tune has ranges, but sweep.trials=0 runs to search them"
        if self.trials and not self.tune:
            yield f"sweep.trials={self.trials}, but sweep.tune names no range"
        for name in self.controls:
            if name not in ("same", "shuffled"):
                yield f"sweep.controls: {name!r}: expected 'same' or 'shuffled'"
        if self.match == "wall_time" and self.seconds is None:
            yield "sweep.match='wall_time' needs sweep.seconds: of training for each run"
        if self.tokens_per_parameter and self.flops:
            yield "sweep.tokens_per_parameter and sweep.flops both set train.steps; give one"

    def _outside_problems(self, arm: str, place: object):
        if not isinstance(place, Mapping):
            yield f"sweep.outside: {arm!r}: expected its place by axis, as {{'axis': 1}}"
            return
        for name in place:
            if name not in self.axes:
                hint = nearest(name, self.axes) or f"; there are {', '.join(self.axes)}"
                yield f"sweep.outside: {arm!r}: no axis {name!r}{hint}"

    def place_of(self, arm: str) -> dict[str, object] | None:
        """An arm's place on axes that don't concern it, by name; None where it is outside of all.

        None of them where all concern it.
        """
        if not isinstance(self.outside, Mapping):
            return None if arm in self.outside else {}
        return dict(self.outside.get(arm, {}))

    def places(self) -> list[tuple[str, dict[str, object], list[str]]]:
        """(arm, its values on the axes, its changes) of every cell, in order."""
        found = []
        for arm, changes in self.arms.items():
            fixed = self.place_of(arm)
            axes = self.axes if fixed is not None else {}
            choices = [
                [(name, fixed[name], [])]
                if fixed and name in fixed
                else list(_choices(name, values))
                for name, values in axes.items()
            ]
            for chosen in itertools.product(*choices):
                values = {name: value for name, value, _ in chosen}
                more = [change for _, _, changes in chosen for change in changes]
                found.append((arm, values, [*self.base, *changes, *more]))
        return found


def _choices(name: str, values: Sequence | Mapping[str, Changes]):
    """(axis, value, changes) of each value of an axis."""
    if isinstance(values, Mapping):
        return ((name, value, changes) for value, changes in values.items())
    return ((name, value, [f"{name} = {value!r}"]) for value in values)


def _is_plain(value: object) -> bool:
    """Whether a value is written as it is read, unlike a reference."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, [*value.keys(), *value.values()]))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore[reportArgumentType]


def _range_problems(name: str, given: Sequence):
    shape = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 3
    if not shape or given[2] not in ("log", "linear"):
        yield f"sweep.tune: {name!r}: expected (low, high, 'log' or 'linear'), got {given!r}"
    elif not all(map(_is_number, given[:2])):
        yield f"sweep.tune: {name!r}: expected two numbers, got {given[0]!r}, {given[1]!r}"
    elif not given[0] < given[1] or (given[2] == "log" and float(given[0]) <= 0):
        yield f"sweep.tune: {name!r}: expected 0 < low < high, got {given[0]!r}, {given[1]!r}"


def is_file(change: str) -> bool:
    """Whether a change is a gin file's name, and no setting."""
    return change.strip().endswith(".gin") and "=" not in change


def cell_name(arm: str, axes: Mapping[str, object]) -> str:
    """The arm and its place on the axes, such as "switch, num_experts=8"."""
    values = [f"{name.rsplit('.', 1)[-1]}={value}" for name, value in axes.items()]
    return ", ".join([arm, *values])


def folder_name(cell: str) -> str:
    """A cell's name as a folder's."""
    return re.sub(r"[^\w.=+-]+", "_", cell)


def check_folder_names(cells: Sequence[str]) -> None:
    """Refuse cells whose folders would be one, or none below the sweep's."""
    by_folder: dict[str, str] = {}
    for cell in cells:
        folder = folder_name(cell)
        if folder in ("", ".", "..") or len(folder.encode()) > LONGEST:
            shown = cell if len(cell) < 60 else f"{cell[:60]}..."
            raise UserError(
                f"sweep: {shown!r} can't name a folder; name the arm with 1 to {LONGEST} letters"
            )
        other = by_folder.setdefault(folder_name(cell).casefold(), cell)
        if other != cell:
            raise UserError(f"sweep: {other!r} and {cell!r} would share a folder; rename an arm")
