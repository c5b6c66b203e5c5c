"""Changes of a sweep that would change nothing: two names for one run would be compared."""

from collections.abc import Iterator, Mapping, Sequence

from moe.settings import read
from moe.sweeps.spec import SweepSpec, is_file


def own(changes: Sequence[str]) -> list[str]:
    """The settings that changes name themselves, without those of files."""
    written = [change for change in changes if not is_file(change)]
    return list(dict.fromkeys(setting.key for setting in read.read([], written).settings))


def set_by_sweep(spec: SweepSpec) -> dict[str, str]:
    """What sets it, for each setting that the sweep sets in every run."""
    found = {name: "sweep.tune" for name in spec.tune}
    found |= {"train.seed": "sweep.seeds"}
    found |= dict.fromkeys(("train.prompts", "train.artifacts"), "no run makes samples")
    if spec.tokens_per_parameter or spec.flops:
        by = "sweep.tokens_per_parameter" if spec.tokens_per_parameter else "sweep.flops"
        found["train.steps"] = by
    if spec.match == "wall_time":
        found |= dict.fromkeys(("train.max_seconds", "train.fit_steps"), "sweep.seconds")
    return found


def overwritten(spec: SweepSpec) -> Iterator[str]:
    """A line for each setting of an arm or axis that the sweep or an axis sets after it."""
    by_sweep = set_by_sweep(spec)
    for arm, changes in spec.arms.items():
        by_axes = set_by_axes(spec, arm)
        for name in own(changes):
            if name in by_sweep:
                yield f"sweep.arms: {arm!r}: {name!r} is set by the sweep ({by_sweep[name]})"
            elif name in by_axes:
                yield f"sweep.arms: {arm!r}: {name!r} is set by the axis {by_axes[name]!r}"
    for axis, values in spec.axes.items():
        if not isinstance(values, Mapping):
            if axis in by_sweep:
                yield f"sweep.axes: {axis!r} is set by the sweep ({by_sweep[axis]})"
            continue
        for value, changes in values.items():
            for name in set(own(changes)) & set(by_sweep):
                where = f"sweep.axes: {axis!r}: {value!r}"
                yield f"{where}: {name!r} is set by the sweep ({by_sweep[name]})"


def set_by_axes(spec: SweepSpec, arm: str) -> dict[str, str]:
    """The axis, for each setting that is set at all places of an axis that concerns the arm."""
    found = {}
    for axis, values in spec.axes.items():
        if not concerns(spec, axis, arm):
            continue
        if isinstance(values, Mapping):
            each = [set(own(changes)) for changes in values.values()]
            found |= dict.fromkeys(set.intersection(*each), axis)
        else:
            found[axis] = axis
    return found


def concerns(spec: SweepSpec, axis: str, arm: str) -> bool:
    """Whether an arm runs at the values of an axis."""
    place = spec.place_of(arm)
    return place is not None and axis not in place


def unread(
    spec: SweepSpec,
    places: Mapping[str, tuple[str, dict[str, object]]],
    unused: Mapping[str, frozenset[str]],
) -> Iterator[str]:
    """A line for each setting of an arm, or of a value of an axis, that none of its cells reads.

    Files may hold settings that another file makes useless; what is written by hand may not.

    places: arm and axes of each cell. unused: settings that nothing reads, by cell.
    """

    def missed(names: Sequence[str], cells: Sequence[str]) -> str:
        wrong = [n for n in names if cells and all(n in unused[cell] for cell in cells)]
        return ", ".join(wrong)

    for arm, changes in spec.arms.items():
        cells = [cell for cell in unused if places[cell][0] == arm]
        if names := missed(own(changes), cells):
            yield f"{arm}: nothing that this arm builds reads {names}"
    for axis, values in spec.axes.items():
        at = {cell: places[cell][1] for cell in unused if concerns(spec, axis, places[cell][0])}
        if not isinstance(values, Mapping):
            if names := missed([axis], list(at)):
                yield f"sweep.axes: nothing that any arm builds reads {names}"
            continue
        for value, changes in values.items():
            cells = [cell for cell in at if at[cell][axis] == value]
            if names := missed(own(changes), cells):
                yield f"sweep.axes: {axis!r}: {value!r}: nothing that any arm builds reads {names}"
