"""A sweep's plan: its cells with matched costs, and the trials that results so far call for."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from moe.errors import Problems, UserError, first_line
from moe.sweeps import tune
from moe.sweeps.cell import Built, Config, build, matched, read_config, with_steps
from moe.sweeps.record import VERSION, Row
from moe.sweeps.spec import MATCHED, SweepSpec, cell_name, check_folder_names, folder_name

Say = Callable[[str], None]
SHUFFLED = "TextData.shuffle_tokens"
FRESH = 10_000  # is added to the seeds of the baseline's second name


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
    """

    cell: Cell
    phase: str
    number: int
    seed: int
    tuned: dict[str, float]

    @property
    def name(self) -> str:
        return f"{folder_name(self.cell.name)}/{self.phase}-{self.number}"

    @property
    def changes(self) -> dict[str, object]:
        """What it sets beside its cell's config."""
        shuffled = {SHUFFLED: True} if self.phase == "shuffled" else {}
        return {"train.seed": self.seed, **self.tuned, **shuffled}

    def text(self) -> str:
        """The whole config as gin text."""
        return self.cell.config.text(self.changes)


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
        rounds = self.tuning_rounds(results)
        tuning = [trial for of_round in rounds for trial in of_round]
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

    def tuning_rounds(self, results: Mapping[str, Row]) -> list[list[Trial]]:
        """The trials of each round of tuning that has begun or may begin."""
        ranges = {name: tune.Range(*span) for name, span in self.ranges.items()}
        points = tune.points(ranges, self.trials, self.seed)
        rounds = [self._tuning(points, first=1)] if points else []
        for again in range(self.widen if points else 0):
            done = [trial for of_round in rounds for trial in of_round]
            if not all(trial.name in results for trial in done):
                break
            wider = self._wider(ranges, results, done)
            if wider == ranges:
                break
            points = self._new_points(wider, ranges, again)
            rounds.append(self._tuning(points, first=1 + self.trials * (again + 1)))
            ranges = wider
        return rounds

    def _tuning(self, points: list[tune.Values], first: int) -> list[Trial]:
        """A trial of every cell at each point; neighbours are of other cells, so that two workers
        seldom compile the same program at the same time.
        """
        trials = []
        for number, point in enumerate(points, first):
            for cell in self.cells:
                own = {name: value for name, value in point.items() if name in cell.tuned}
                trials.append(Trial(cell, "tuning", number, self.seed, own))
        return trials

    def _wider(self, ranges, results, done: list[Trial]) -> dict[str, tune.Range]:
        """The ranges, widened where the best value of any cell is the lowest or highest tried."""
        sides: dict[str, set[str]] = {}
        for cell in self.cells:
            best = best_of(cell, results, done)
            tried = [trial.tuned for trial in done if trial.cell is cell]
            for name, side in tune.edges(best or {}, tried).items():
                sides.setdefault(name, set()).add(side)
        return {
            name: span.wider("low" in sides.get(name, ()), "high" in sides.get(name, ()))
            for name, span in ranges.items()
        }

    def _new_points(self, wider, old, again: int) -> list[tune.Values]:
        """Points whose widened settings lie where no round has been."""
        seed = self.seed + 1000 * (again + 1)
        points = tune.points(wider, self.trials, seed)
        for i, (name, span) in enumerate(wider.items()):
            if span != old[name]:
                values = tune.between(span, old[name], self.trials, seed + i)
                points = [p | {name: v} for p, v in zip(points, values, strict=True)]
        return points

    def reported(self, results: Mapping[str, Row], tuning: list[Trial]) -> list[Trial]:
        """The reported runs, seed by seed over all cells; then the controls."""
        chosen = {cell.name: best_of(cell, results, tuning) for cell in self.cells}
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

    def number_of_trials(self) -> int:
        """As many as there will be, if no range is widened."""
        baselines = len({cell.baseline for cell in self.cells})
        controls = ("same" in self.controls) * baselines
        controls += ("shuffled" in self.controls) * len(self.cells)
        return self.trials * len(self.cells) + self.seeds * (len(self.cells) + controls)


def best_of(cell: Cell, results: Mapping[str, Row], tuning: list[Trial]) -> tune.Values | None:
    """The values of the cell's best tuning trial on validation; None where all of them failed.

    Without tuning, no values: the config's own stand.
    """
    own = [trial for trial in tuning if trial.cell is cell]
    if not own:
        return {}
    rows = [(results[trial.name], trial) for trial in own]
    scored = [
        (row["validation_bits_per_byte"], trial.number, trial.tuned)
        for row, trial in rows
        if row["status"] == "finished" and row["validation_bits_per_byte"] is not None
    ]
    return min(scored, key=lambda item: item[:2])[2] if scored else None


def make(spec: SweepSpec, name: str, say: Say) -> Plan:
    """Build and match every cell of a sweep.

    Raises:
        UserError: with a line for each cell that can't be built or matched.
    """
    configs: dict[str, tuple[str, dict[str, object], Config]] = {}
    problems = []
    for arm, axes, changes in spec.places():
        cell = cell_name(arm, axes)
        try:
            configs[cell] = arm, axes, read_config(changes)
        except UserError as error:
            problems += [f"{cell}: {line}" for line in str(error).splitlines()]
    if problems:
        raise Problems(problems)
    check_folder_names(list(configs))
    built, cells = {}, []
    first = [cell for cell in configs if baseline_of(cell, configs, spec) == cell]
    for cell in [*first, *(cell for cell in configs if cell not in first)]:
        say(f"building {cell} ({len(built) + len(problems) + 1} of {len(configs)})")
        try:
            built[cell] = one_cell(cell, configs, spec, built)
        except UserError as error:
            problems += [f"{cell}: {line}" for line in str(error).splitlines()]
    for cell in configs:
        if cell in built:
            cells.append(built[cell])
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


def one_cell(cell: str, configs, spec: SweepSpec, built: Mapping[str, Cell]) -> Cell:
    """A cell with its steps set and its amount matched to its baseline's."""
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
    return Cell(
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
        text = ours.get(name, as_it_was).text()
        if text != row["given"]:
            old, new = set(row["given"].splitlines()), set(text.splitlines())
            lines = [f"{line} there" for line in sorted(old - new)]
            lines += [f"{line} here" for line in sorted(new - old)]
            found.append(f"{name}: {', '.join(lines[:4])}")
    return found
