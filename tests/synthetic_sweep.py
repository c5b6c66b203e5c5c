"""Folders of sweeps that were never run, with known truth: for tests of reports."""

import json
import math
from pathlib import Path

import numpy as np

DOCUMENTS, STEPS = 40, 40


def write(
    folder: Path,
    arms: dict[str, float],
    *,
    seeds: int = 3,
    seed_sd: float = 0.002,
    document_sd: float = 0.01,
    diverged: tuple[str, ...] = (),
    leaking: tuple[str, ...] = (),
    controls: bool = True,
    delta: float = 0.01,
) -> Path:
    """Write a sweep whose arms differ from the first, the baseline, by so many bits per byte.

    diverged: arms whose first reported run has diverged.
    """
    rng, baseline = np.random.default_rng(0), next(iter(arms))
    bytes_M = rng.lognormal(7, 0.7, DOCUMENTS).round() + 1
    level_M = rng.normal(1.6, 0.2, DOCUMENTS)
    cells = [cell_of(name, baseline, name in leaking) for name in arms]
    rows, curves = [], []

    def add(name, phase, number, seed, true, failed=False):
        effect = true + rng.normal(0, seed_sd) + rng.normal(0, document_sd, DOCUMENTS)
        bits_M = (level_M + effect) * bytes_M
        row = row_of(cells[list(arms).index(name)], phase, number, seed)
        if failed:
            rows.append(row | {"status": "diverged", "reason": "the loss is not finite"})
            return
        mean = float(bits_M.sum() / bytes_M.sum())
        rows.append(
            row
            | {
                "bits_per_byte": mean,
                "validation_bits_per_byte": mean + 0.01,
                "training_rule_bits_per_byte": mean - (0.3 if name in leaking else 0.0),
                "document_bits": bits_M.tolist(),
                "document_bytes": bytes_M.astype(int).tolist(),
            }
        )
        if phase == "report":
            curves.extend(curve_of(row, true))
            run = folder / "trials" / row["trial"] / "run"
            if "/" not in name:
                run.mkdir(parents=True, exist_ok=True)
                (run / "routing.jsonl").write_text("".join(routing_of(STEPS)))

    for name, true in arms.items():
        for number, rate in enumerate((0.003, 0.01, 0.03), 1):
            add(name, "tuning", number, 0, true + abs(math.log(rate / 0.01)) / 50)
            rows[-1]["tuned"] = {"AdamW.learning_rate": rate}
        for number in range(1, seeds + 1):
            failed = name in diverged and number == 1
            add(name, "report", number, number, true, failed)
    for number in range(1, seeds + 1) if controls else ():
        add(baseline, "same", number, 10_000 + number, 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    plan = {
        "version": 1,
        "name": folder.name,
        "question": "Which arm is best?",
        "baseline": baseline,
        "delta": delta,
        "match": "active FLOPs per token",
        "tolerance": 0.01,
        "tuning": {
            "ranges": {"AdamW.learning_rate": [0.003, 0.03, "log"]},
            "trials": 3,
            "seed": 0,
        },
        "seeds": list(range(1, seeds + 1)),
        "cells": cells,
    }
    (folder / "sweep.json").write_text(json.dumps(plan))
    (folder / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "curves.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curves))
    return folder


def cell_of(name: str, baseline: str, leaks: bool) -> dict:
    return {
        "cell": name,
        "arm": name,
        "axes": {},
        "baseline": baseline,
        "router": "TopK",
        "parameters_total": 1_000_000,
        "parameters_active": 300_000,
        "decode_parameters": 60_000.0,
        "flops_per_token": 2_000_000,
        "steps": STEPS,
        "tokens": STEPS * 100,
        "training_flops": STEPS * 2e8,
        "solved": {},
        "residual": 0.001,
        "causality": "causal",
        "leaks": leaks,
        "decoding": "each token by itself",
    }


def row_of(cell: dict, phase: str, number: int, seed: int) -> dict:
    missing = "bits_per_byte validation_bits_per_byte document_bits document_bytes".split()
    return dict.fromkeys(missing) | {
        "version": 1,
        "sweep": "s",
        "trial": f"{cell['cell']}/{phase}-{number}",
        "cell": cell["cell"],
        "arm": cell["arm"],
        "axes": {},
        "phase": phase,
        "number": number,
        "seed": seed,
        "tuned": {"AdamW.learning_rate": 0.01},
        "status": "finished",
        "reason": None,
        "steps": STEPS,
        "train_seconds": 10.0,
        "wall_seconds": 12.0,
        "tokens_per_second": 400.0,
        "effective_utilisation": 0.2,
        "peak_memory_bytes": 2**30,
        "dropped": 0.0,
        "max_over_mean_load": 1.2,
        "training_flops": cell["training_flops"],
    }


def routing_of(steps: int):
    """Two layers of four experts, which grow even; the second drops a tenth of its assignments."""
    for step in range(1, steps + 1):
        uneven = round(100 * (1 - step / steps))
        count = [100 + 3 * uneven, *[100 - uneven] * 3]
        kept = [count, [n * 0.9 for n in count]]
        row = {"step": step, "count": [count, count], "kept": kept, "entropy": [0.7, 0.7]}
        yield json.dumps(row) + "\n"


def curve_of(row: dict, true: float):
    """A power law of the FLOPs, shifted: an arm that is better by 0.1 needs fewer of them."""
    for step in range(1, STEPS + 1):
        share = step / STEPS
        yield {
            "trial": row["trial"],
            "cell": row["cell"],
            "seed": row["seed"],
            "step": step,
            "tokens": step * 100,
            "flops": step * 2e8,
            "seconds": 10 * share,
            "bits_per_byte": 1.6 + true - 0.3 * math.log(share),
            "load/max_over_mean": 1.2 + 0.5 * (1 - share),
            "load/dropped": 0.1 * (1 - share),
            "router/entropy": 1.5,
        }
