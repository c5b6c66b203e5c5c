"""`moe fit`: fits a scaling law to a table of runs, judges the fit, predicts and plans."""

from collections.abc import Iterator
import json
import math
from pathlib import Path
import time
from typing import Any

from moe.cli.check import find
from moe.errors import UserError, nearest
from moe.runs.storage.json_files import finite
from moe.runs.tracking import progress
from moe.scaling import judge, plot, table
from moe.scaling.fit import Fit, Points, Say, fit
from moe.scaling.laws import LAWS
from moe.scaling.laws.law import Law
from moe.scaling.optimum import Budget, check_budget, optimum

LEAST_SAMPLES = 40  # of which the lowest and highest are 2.5 % at either end
ROWS_OF_ONE_PLACE = 5  # so many targets at equal inputs look like a learning curve


def run(flags) -> int:
    """Print the fit; `--json` also writes it, `--plot` draws it."""
    started = time.monotonic()
    law = find_law(flags.law)
    others = [find_law(name) for name in filter(None, flags.compare.split(","))]
    fixed = read_values(flags.fix, "--fix", law.names)
    check_fixed(law, fixed)
    places = [places_of(text, law) for text in flags.predict]
    budget = budget_of(flags, law)
    if 0 < flags.bootstrap < LEAST_SAMPLES:
        raise UserError(
            f"--bootstrap={flags.bootstrap}: too few for 95 % intervals; at least {LEAST_SAMPLES}, "
            "or 0 for none"
        )
    columns = table.read(flags.data)
    names = table.read_names(flags.columns, law, *others)
    points, *more = [points_of(one, columns, names, flags) for one in (law, *others)]
    judge.check_points(law, points, fixed)

    def work(say: Say) -> Iterator[tuple[Fit, dict]]:
        fitted = fit(law, points, fixed, say)
        theta_SP = judge.resampled(fitted, flags.bootstrap, flags.seed, say)
        found = summary(fitted, theta_SP, flags)
        found["held_out"] = judge.held_out(fitted, flags.seed, say)
        found["predictions"] = [judge.predict(fitted, theta_SP, at, flags.seed) for at in places]
        if budget:
            say("optimum")
            found["optimum"] = optimum(fitted, theta_SP, budget)
        if others:
            found["comparison"] = judge.compare(fitted, others, more, flags.seed, say)
        yield fitted, found

    [(fitted, found)] = progress.with_status(work)
    found["warnings"] = warnings_of(fitted, found)
    found["seconds"] = round(time.monotonic() - started, 1)
    print(described(fitted, found))
    if flags.json:
        text = json.dumps(finite(found), indent=2, allow_nan=False)
        Path(flags.json).write_text(text + "\n", encoding="utf-8")
    if flags.plot:
        plot.picture(fitted, Path(flags.plot))
        print(f"picture: {flags.plot}")
    return 0


def find_law(name: str) -> Law:
    """A law that comes with the program, or one of a file, as my_law.py:MyLaw."""
    if ":" not in name.lstrip(":"):
        if name not in LAWS:
            hint = nearest(name, LAWS) or f"; there are {', '.join(LAWS)}"
            raise UserError(f"no law {name!r}{hint}; a law of your own is my_law.py:MyLaw")
        return LAWS[name]
    try:
        law = find(name)
        if not isinstance(law, Law):
            raise UserError(f"{name} is no moe.scaling.laws.law.Law but {type(law).__name__}")
        law.grid({})
    except UserError:
        raise
    except Exception as error:  # in the user's file, or of coefficients that name none
        raise UserError(f"{name} can't be used: {type(error).__name__}: {error}") from error
    return law


def read_values(text: str, flag: str, letters: tuple[str, ...]) -> dict[str, float]:
    """Numbers by letter, of "N=1e9,E=64"."""
    found = {}
    for part, letter, value in table.assignments(text):
        if letter not in letters:
            hint = nearest(letter, letters) or f"; there are {', '.join(letters)}"
            raise UserError(f"{flag}={text}: the law has no {letter!r}{hint}")
        try:
            found[letter] = float(value)
        except ValueError:
            raise UserError(f"{flag}={text}: {part!r} is no LETTER=NUMBER") from None
    return found


def check_fixed(law: Law, fixed: dict[str, float]) -> None:
    """Refuse values that a coefficient can't have."""
    for name, value in fixed.items():
        if law.coefficients[name].positive and not value > 0:
            raise UserError(f"--fix: {name}={value:g}, but the law needs it above 0")
    if not len(law.grid(fixed)):
        raise UserError(f"--fix: no start of the law {law.name} fits these values")
    if len(fixed) == len(law.names):
        raise UserError("--fix: every coefficient is given, so that nothing is left to fit")


def places_of(text: str, law: Law) -> dict[str, float]:
    """One --predict: a number for each of the law's inputs."""
    at = read_values(text, "--predict", tuple(law.inputs))
    missing = [letter for letter in law.inputs if letter not in at]
    if missing:
        raise UserError(f"--predict={text}: the law {law.name} also needs {', '.join(missing)}")
    for letter, value in at.items():
        low, high = law.inputs[letter].low, law.inputs[letter].high
        if not (low <= value <= high and value < math.inf):
            raise UserError(f"--predict={text}: {letter} is expected from {low:g} to {high:g}")
    return {letter: at[letter] for letter in law.inputs}


def budget_of(flags, law: Law) -> Budget | None:
    """The budget of the flags; None without one."""
    limits = ("max_memory", "max_inference", "tokens", "bytes_per_parameter")
    given = [name for name in limits if getattr(flags, name)]
    if not flags.budget:
        if given:
            raise UserError(
                f"--{given[0]} limits the optimum for a --budget=FLOPS, which is not given"
            )
        return None
    budget = Budget(
        flags.budget,
        flags.tokens,
        flags.max_memory,
        flags.bytes_per_parameter or Budget.bytes_per_parameter,
        flags.max_inference,
    )
    check_budget(law, budget)
    return budget


def points_of(law: Law, columns: table.Columns, names: dict[str, str], flags) -> Points:
    """The points of a law by the flags."""
    return table.select(columns, names, law, flags.where, flags.drop_highest)


def summary(fitted: Fit, theta_SP: Any, flags) -> dict:
    """The fit and its coefficients."""
    law = fitted.law
    return {
        "law": law.name,
        "equation": law.equation,
        "data": flags.data,
        "columns": flags.columns,
        "where": flags.where,
        "drop_highest": flags.drop_highest,
        "points": len(fitted.points),
        "seed": flags.seed,
        "bootstrap": flags.bootstrap,
        "level": 0.95,
        "coefficients": judge.coefficients(fitted, theta_SP),
        "objective": fitted.objective,
        "huber_delta": law.delta,
        "rmsle_log10": judge.rmsle(fitted.residuals()),
        "starts": {
            "tried": fitted.tried,
            "refined": fitted.refined,
            "agreeing": fitted.agreeing,
        },
        "derived": judge.derived(fitted, theta_SP),
    }


def warnings_of(fitted: Fit, found: dict) -> list[str]:
    """What a reader should know before believing the fit."""
    places: dict[tuple, int] = {}
    for row in zip(*fitted.points.inputs.values(), strict=True):
        places[row] = places.get(row, 0) + 1
    row, most = max(places.items(), key=lambda item: item[1])
    lines = []
    if most >= ROWS_OF_ONE_PLACE:
        at = ", ".join(f"{k}={v:.4g}" for k, v in zip(fitted.law.inputs, row, strict=True))
        lines.append(
            f"{most} points at {at}: if these are steps of one run, keep its last with --where"
        )
    if fitted.agreeing == 1:
        lines.append("only one start came to this optimum: another may be better")
    open_ = [k for k, v in found["coefficients"].items() if not v["identified"]]
    if open_:
        lines.append(f"the data don't identify {', '.join(open_)}")
    return lines


def described(fitted: Fit, found: dict) -> str:
    """The fit as text."""
    lines = [
        f"{fitted.law.name}: {fitted.law.equation}",
        f"{found['points']} points, RMSLE {found['rmsle_log10']:.5f} (log10), "
        f"objective {found['objective']:.6g}, {found['starts']['agreeing']} of "
        f"{found['starts']['refined']} refined starts agree; {found['seconds']} s",
    ]
    for name, row in found["coefficients"].items():
        why = "  (given)" if row.get("fixed") else f"  NOT IDENTIFIED: {row.get('reason')}"
        note = "" if row["identified"] and not row.get("fixed") else why
        lines.append(f"  {name:<12}{shown(row)}{note}")
    for name, row in found["derived"].items():
        why = "" if row["identified"] else f"  NOT IDENTIFIED: {row['reason']}"
        lines.append(f"  {name:<12}{shown(row)}  (derived){why}")
    held_out = found["held_out"]
    lines.append(f"held out: RMSLE {held_out['folds']:.5f} in five folds{largest(held_out)}")
    for row in found["predictions"]:
        at = ", ".join(f"{k}={v:.4g}" for k, v in row["at"].items())
        target = fitted.law.target
        one = {"value": row[target], "interval": row["interval"]}
        lines.append(f"predicted at {at}: {target} = {shown(one)}{run_interval(row)}")
        lines += [f"  warning: {line}" for line in row["warnings"]]
    lines += described_optimum(found.get("optimum"))
    for row in found.get("comparison", []):
        lines.append(
            f"  {row['law']:<12} held out {row['held_out']['folds']:.5f}"
            f"{largest(row['held_out'])}, {row['coefficients']} coefficients"
        )
    return "\n".join([*lines, *(f"warning: {line}" for line in found["warnings"])])


def described_optimum(best: dict | None) -> list[str]:
    """The optimum as lines."""
    if not best:
        return []
    lines = [
        f"best for {best['budget']:.4g} FLOPs"
        + (f" ({best['assumes']})" if best["assumes"] else "")
    ]
    lines += [f"  {k:<12}{shown(v)}" for k, v in best.items() if isinstance(v, dict)]
    if "memory" in best:
        lines.append(
            f"  {best['total_parameters']:.4g} parameters in {best['memory']:.4g} bytes, "
            f"{best['inference_flops']:.4g} FLOPs a token"
        )
    lines += [f"  limited by --{name}" for name in best["limited_by"]]
    return [*lines, *(f"  warning: {line}" for line in best["warnings"])]


def largest(held_out: dict) -> str:
    """The extrapolation error in words."""
    if held_out["largest"] is None:
        return ""
    return f", {held_out['largest']:.5f} on the {held_out['points_in_largest']} largest"


def run_interval(row: dict) -> str:
    """The interval of one more run in words."""
    if row["interval_of_a_run"] is None:
        return ""
    low, high = row["interval_of_a_run"]
    return f"; a run: {low:.6g} to {high:.6g}"


def shown(row: dict) -> str:
    """A value with its interval."""
    if row["interval"] is None:
        return f"{row['value']:.6g}"
    low, high = row["interval"]
    return f"{row['value']:.6g}  [{low:.6g}, {high:.6g}]"
