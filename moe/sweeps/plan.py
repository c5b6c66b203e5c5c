"""A sweep's plan: its cells with matched costs, and the trials that results so far call for."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from moe.errors import Problems, UserError, first_line
from moe.sweeps import effects, search, tune
from moe.sweeps.cell import (
    SHUFFLED,
    Built,
    Cell,
    Config,
    Trial,
    build,
    matched,
    read_config,
    with_steps,
)
from moe.sweeps.record import VERSION, Row
from moe.sweeps.spec import MATCHED, SweepSpec, cell_name, check_folder_names

Say = Callable[[str], None]
FRESH = 10_000  # is added to the seeds of the baseline's second name


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep with its cells built and matched."""

    name: str
    question: str
    baseline: str
    delta: float
    match: str | None
    tolerance: float
    ranges: dict[str, tuple[float, float, str]]
    trials: int
    widen: int
    seeds: int
    controls: tuple[str, ...]
    seed: int
    cells: tuple[Cell, ...]

    @property
    def search(self) -> search.Search:
        """The tuning of its cells."""
        ranges = {name: tune.Range(*span) for name, span in self.ranges.items()}
        return search.Search(self.cells, ranges, self.trials, self.widen, self.seed)

    @property
    def reported_seeds(self) -> list[int]:
        """Seeds that tuning did not use."""
        return [self.seed + 1 + i for i in range(self.seeds)]

    def as_json(self) -> dict[str, Any]:
        """The content of sweep.json."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        cells = [
            {"cell": cell.name, **cell.facts, **dataclasses.asdict(cell)} for cell in self.cells
        ]
        tuning = {"ranges": self.ranges, "trials": self.trials, "seed": self.seed}
        return own | {
            "version": VERSION,
            "match": MATCHED[self.match],
            "matched_by": self.match,
            "tuning": tuning | {"widen": self.widen},
            "seed_count": self.seeds,
            "seeds": self.reported_seeds,
            "early_stopping": None,
            "cells": cells,
        }

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> "Plan":
        """The plan that `as_json` has written; UserError where it has not written this."""
        try:
            return cls._of_json(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"{type(error).__name__}: {first_line(error)[:80]}"
            raise UserError(f"sweep.json is damaged: {why}") from error

    @classmethod
    def _of_json(cls, found: Mapping[str, Any]) -> "Plan":
        fields = [field.name for field in dataclasses.fields(Cell)]
        cells = []
        for row in found["cells"]:
            own: dict[str, Any] = {name: row[name] for name in fields}
            own |= {name: tuple(own[name]) for name in ("imports", "folders", "tuned")}
            cells.append(Cell(**own))
        whole: dict[str, Any] = {f.name: found[f.name] for f in dataclasses.fields(cls)}
        whole |= {
            "match": found["matched_by"],
            "seeds": found["seed_count"],
            "controls": tuple(found["controls"]),
            "ranges": {name: tuple(span) for name, span in found["ranges"].items()},
            "cells": tuple(cells),
        }
        return cls(**whole)

    def trials_now(self, results: Mapping[str, Row]) -> list[Trial]:
        """All trials that can be named with these results, finished ones included.

        Tuning comes first; a cell's reported runs follow once the tuning of all cells has ended,
        as only then it is known whether ranges are widened.

        Raises:
            UserError: tuning went on after runs were reported, and has found better values.
        """
        tuning = self.search.trials(results)
        if not all(trial.name in results for trial in tuning):
            return tuning
        reported = self.reported(results, tuning)
        ended = [trial for trial in reported if trial.name in results]
        stale = [trial.name for trial in ended if trial.tuned != results[trial.name]["tuned"]]
        if stale:
            raise UserError(
                f"tuning has found better values since {', '.join(stale[:3])} ran ({len(stale)} in "
                "all): delete their folders below trials/, and they run again"
            )
        return tuning + reported

    def reported(self, results: Mapping[str, Row], tuning: list[Trial]) -> list[Trial]:
        """The reported runs, seed by seed over all cells; then the controls."""
        chosen = {cell.name: search.best_of(cell, results, tuning) for cell in self.cells}
        found = []
        for number, seed in enumerate(self.reported_seeds, 1):
            for cell in self.cells:
                values = chosen[cell.name]
                if values is not None:
                    found.append(Trial(cell, "report", number, seed, values))
        for control in self.controls:
            for number, seed in enumerate(self.reported_seeds, 1):
                for cell in self.cells:
                    values, same = chosen[cell.name], control == "same"
                    if values is None or (same and cell.name != cell.baseline):
                        continue
                    fresh = seed + FRESH if same else seed
                    found.append(Trial(cell, control, number, fresh, values))
        return found

    def number_of_trials(self, results: Mapping[str, Row] | None = None) -> int:
        """As many as there will be, if no range is widened any more."""
        tuning, untuned = self.search.trials(results or {}), self.untuned(results or {})
        reported = [cell for cell in self.cells if cell.name not in untuned]
        baselines = [cell for cell in reported if cell.name == cell.baseline]
        controls = ("same" in self.controls) * len(baselines)
        controls += ("shuffled" in self.controls) * len(reported)
        return len(tuning) + self.seeds * (len(reported) + controls)

    def untuned(self, results: Mapping[str, Row]) -> list[str]:
        """The cells whose tuning has failed throughout: they have nothing to report."""
        tuning = self.search.trials(results)
        if not all(trial.name in results for trial in tuning):
            return []
        cells = self.cells
        return [cell.name for cell in cells if search.best_of(cell, results, tuning) is None]


def make(spec: SweepSpec, name: str, say: Say) -> Plan:
    """Build and match every cell of a sweep.

    Raises:
        UserError: with a line for each cell that can't be built or matched.
    """
    configs: dict[str, tuple[str, dict[str, object], Config]] = {}
    problems = list(effects.overwritten(spec))
    for arm, axes, changes in spec.places():
        cell = cell_name(arm, axes)
        try:
            configs[cell] = arm, axes, read_config(changes)
        except UserError as error:
            problems += [f"{cell}: {line}" for line in str(error).splitlines()]
    if problems:
        raise Problems(problems)
    check_folder_names(list(configs))
    built, unused = {}, {}
    first = [cell for cell in configs if baseline_of(cell, configs, spec) == cell]
    for cell in [*first, *(cell for cell in configs if cell not in first)]:
        say(f"building {cell} ({len(built) + len(problems) + 1} of {len(configs)})")
        try:
            built[cell], unused[cell] = one_cell(cell, configs, spec, built)
        except UserError as error:
            problems += [f"{cell}: {line}" for line in str(error).splitlines()]
    cells = [built[cell] for cell in configs if cell in built]
    places = {cell: (arm, axes) for cell, (arm, axes, _) in configs.items()}
    problems += effects.unread(spec, places, unused)
    if problems:
        raise Problems(problems)
    if lost := [n for n in spec.tune if not any(n in cell.tuned for cell in cells)]:
        raise UserError(f"sweep.tune: no arm reads {', '.join(lost)}")
    return Plan(
        name=name,
        question=spec.question,
        baseline=spec.baseline,
        delta=spec.delta,
        match=spec.match,
        tolerance=spec.tolerance,
        ranges={n: (float(low), float(high), how) for n, (low, high, how) in spec.tune.items()},
        trials=spec.trials,
        widen=spec.widen,
        seeds=spec.seeds,
        controls=tuple(spec.controls),
        seed=spec.seed,
        cells=tuple(cells),
    )


def baseline_of(cell: str, configs, spec: SweepSpec) -> str:
    """The name of the baseline's cell at the same place of those axes that concern it."""
    _, axes, _ = configs[cell]
    fixed = spec.place_of(spec.baseline)
    return cell_name(spec.baseline, {} if fixed is None else axes | fixed)


def one_cell(
    cell: str, configs, spec: SweepSpec, built: Mapping[str, Cell]
) -> tuple[Cell, frozenset[str]]:
    """A cell with its steps set and its amount matched to its baseline's; what it doesn't read."""
    arm, axes, config = configs[cell]
    baseline = baseline_of(cell, configs, spec)
    if baseline not in configs:
        raise UserError(f"the baseline {spec.baseline!r} doesn't run at {axes}")
    fixed = {"train.prompts": (), "train.artifacts": False, "train.seed": spec.seed}
    if spec.match == "wall_time":
        fixed |= {"train.max_seconds": spec.seconds, "train.fit_steps": True}
    settings = config.settings | {name: repr(value) for name, value in fixed.items()}
    config = dataclasses.replace(config, settings=settings)
    model: Built = build(config)
    if spec.match not in (None, "wall_time") and (model.spec.fit_steps or model.spec.max_seconds):
        raise UserError(
            "its trials would end by the clock, at unequal tokens: add 'train.max_seconds = None' "
            "and 'train.fit_steps = False' to sweep.base, or set sweep.match = 'wall_time'"
        )
    config, model = by_budget(config, model, spec)
    solved, off, words = {}, 0.0, "nothing"
    if spec.match == "wall_time":
        words = f"{spec.seconds:g} seconds of training"
    elif spec.match is not None:
        words = MATCHED[spec.match]
        if cell != baseline:
            if baseline not in built:
                raise UserError(f"its baseline {baseline} can't be built")
            target = built[baseline].facts["amount"]
            config, model, solved, off = matched(
                config, model, spec.match, target, spec.solve, spec.tolerance
            )
            if spec.match not in ("training_flops", "data"):  # the size that was solved for counts
                config, model = by_budget(config, model, spec)
    middle = {name: tune.Range(*span).at(0.5) for name, span in spec.tune.items()}
    unused = build(config, middle).unused if middle else frozenset()
    if "shuffled" in spec.controls and SHUFFLED in build(config, {SHUFFLED: True}).unused:
        raise UserError("sweep.controls: 'shuffled' needs train.data = @TextData()")
    facts = model.facts() | {"matched": words, "solved": solved, "residual": off}
    if spec.match not in (None, "wall_time"):
        facts["amount"] = model.amount(spec.match)
    done = Cell(
        name=cell,
        arm=arm,
        axes=axes,
        baseline=baseline,
        settings=config.settings,
        imports=config.imports,
        folders=config.folders,
        tuned=tuple(name for name in spec.tune if name not in unused),
        facts=facts,
    )
    return done, model.unused


def by_budget(config: Config, model: Built, spec: SweepSpec) -> tuple[Config, Built]:
    """The config with the steps that the sweep's budget gives its model, and the model then."""
    changed = with_steps(config, model, spec.tokens_per_parameter, spec.flops)
    return (config, model) if changed is config else (changed, build(changed))


def differences(plan: Plan, results: Mapping[str, Row]) -> list[str]:
    """A line for each finished trial that this plan would train otherwise."""
    cells = {cell.name: cell for cell in plan.cells}
    ours = {trial.name: trial for trial in plan.trials_now(results)}
    found = []
    for name, row in results.items():
        cell = cells.get(row["cell"])
        if cell is None:
            found.append(f"{name}: the sweep has no {row['cell']!r} any more")
            continue
        as_it_was = Trial(cell, row["phase"], row["number"], row["seed"], row["tuned"])
        if row["phase"] == "tuning" and row["number"] > plan.trials:
            found.append(f"{name}: tuned a cell with more than sweep.trials={plan.trials}")
            continue
        text = ours.get(name, as_it_was).text()
        if text != row["given"]:
            old, new = set(row["given"].splitlines()), set(text.splitlines())
            lines = [f"{line} there" for line in sorted(old - new)]
            lines += [f"{line} here" for line in sorted(new - old)]
            found.append(f"{name}: {', '.join(lines[:4])}")
    return found
