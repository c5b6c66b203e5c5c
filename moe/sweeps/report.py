"""A sweep as text: its plan before it runs, and its results so far."""

from collections.abc import Sequence
import math

from moe.sweeps.plan import Plan
from moe.sweeps.record import Row, SweepFolder
from moe.sweeps.spec import MATCHED

UTILISATION = 0.15  # is assumed until trials have been timed
BYTES_OF_LOGS = 200_000


def planned(plan: Plan, ended: Sequence[Row], peak: float, workers: int) -> str:
    """The plan: question, cells with costs and what was matched, trials, hours and disk.

    ended: rows of the trials that have. peak: FLOP/s of this machine's matmuls.
    """
    rows: list[tuple[str, ...]] = [
        ("cell", "router", "parameters", "active", "FLOPs/token", "tokens", "off by", "solved")
    ]
    for cell in plan.cells:
        facts = cell.facts
        solved = ", ".join(f"{k.rsplit('.', 1)[-1]}={v}" for k, v in facts["solved"].items())
        rows.append(
            (
                cell.name,
                facts["router"] or "dense",
                *(short(facts[n]) for n in ("parameters_total", "parameters_active")),
                *(short(facts[n]) for n in ("flops_per_token", "tokens")),
                f"{facts['residual']:+.2%}" if plan.match else "",
                solved,
            )
        )
    number = plan.number_of_trials()
    matched = f"matched: {MATCHED[plan.match]}"
    if plan.match not in (None, "wall_time"):
        matched += f", within {plan.tolerance:.1%}"
    tuning = ", ".join(f"{n} from {a:g} to {b:g} ({how})" for n, (a, b, how) in plan.ranges.items())
    return "\n".join(
        [
            plan.question,
            "",
            *table(rows),
            "",
            f"{matched}; baseline: {plan.baseline}; a difference matters from {plan.delta:g} bits "
            "per byte",
            f"tuned alike: {tuning or 'nothing'}; {plan.trials} trials a cell",
            f"reported: {plan.seeds} fresh seeds a cell; controls: "
            f"{', '.join(plan.controls) or 'none'}",
            f"{number} trials, {costs(plan, ended, peak, workers)}",
        ]
    )


def costs(plan: Plan, ended: Sequence[Row], peak: float, workers: int) -> str:
    """Hours and disk of the whole, from the trials that were timed or else from FLOPs."""
    timed = [row for row in ended if row.get("wall_seconds") and row.get("training_flops")]
    if timed:
        pace = sum(row["wall_seconds"] for row in timed) / sum(r["training_flops"] for r in timed)
        how = f"by the {len(timed)} trials that were timed"
    else:
        # A trial has its share of the machine: several at a time take as long as one by one.
        pace = workers / (UTILISATION * peak)
        how = f"at {UTILISATION:.0%} of {peak / 1e9:.0f} GFLOP/s"
    each = {cell.name: cell.facts["training_flops"] for cell in plan.cells}
    flops = sum(each.values()) * (plan.trials + plan.seeds * (1 + ("shuffled" in plan.controls)))
    if "same" in plan.controls:
        flops += plan.seeds * sum(each[name] for name in {cell.baseline for cell in plan.cells})
    hours = flops * pace / workers / 3600
    if plan.match == "wall_time":
        seconds = max(float(cell.settings["train.max_seconds"]) for cell in plan.cells)
        hours = plan.number_of_trials() * seconds / workers / 3600
        how = "of training alone"
    largest = max(cell.facts["state_bytes"] for cell in plan.cells)
    disk = plan.number_of_trials() * BYTES_OF_LOGS + workers * 3 * largest
    return f"about {hours:.1f} h ({how}) with {workers} at a time, {disk / 2**20:,.0f} MiB of disk"


def listed(folder: SweepFolder) -> str:
    """The trials that have ended, a line each, and how many are left."""
    ended = folder.rows()
    rows: list[tuple[str, ...]] = [
        ("trial", "seed", "tuned", "bits/byte", "validation", "seconds", "status")
    ]
    for row in ended:
        tuned = ", ".join(f"{k.rsplit('.', 1)[-1]}={v:g}" for k, v in row["tuned"].items())
        seconds = row.get("wall_seconds")
        rows.append(
            (
                row["trial"],
                str(row["seed"]),
                tuned,
                *(bits(row[name]) for name in ("bits_per_byte", "validation_bits_per_byte")),
                "" if seconds is None else f"{seconds:.0f}",
                row["status"] if row["reason"] is None else f"{row['status']}: {row['reason']}",
            )
        )
    if not ended:
        return f"{folder.path}: no trial has ended yet"
    found = folder.read_plan()
    results = {row["trial"]: row for row in ended}
    plan = Plan.of_json(found) if found else None
    of = plan.number_of_trials(results) if plan else 0
    untuned = plan.untuned(results) if plan else []
    failed = [f"no tuning trial of {name!r} has finished: it is not reported" for name in untuned]
    return "\n".join([*table(rows), "", *failed, f"{len(ended)} of {max(of, len(ended))} trials"])


def bits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def short(number: float) -> str:
    """A number with three digits, such as 1.05M."""
    if number < 1000:
        return f"{number:g}"
    power = min(int(math.log10(number)) // 3, 5)
    return f"{number / 1000**power:.3g}{'_kMGTP'[power]}"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
