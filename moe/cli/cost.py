"""`moe cost`: what a config's model costs to serve, counted: FLOPs, weights, caches, time."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from moe.cli import config
from moe.errors import UserError, nearest
from moe.inference.decoder import reason_to_recompute
from moe.planning.chips import CHIPS, GIB, Chip
from moe.planning.report import milliseconds
from moe.planning.serving import Serving
from moe.training.abstract_model import AbstractModel, Vocabulary

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
BATCHES = (1, 4, 16, 64, 256)


def run(flags) -> int:
    """Print the costs of a token, of a text and of steps; `--json` also writes them."""
    if flags.chip not in CHIPS:
        hint = nearest(flags.chip, CHIPS) or f"; one of {', '.join(CHIPS)}"
        raise UserError(f"--chip={flags.chip}: no TPU or GPU is called {flags.chip!r}{hint}")
    if flags.dtype not in BYTES:
        raise UserError(f"--dtype={flags.dtype}: expected one of {', '.join(BYTES)}")
    spec = config.of_flags(flags)
    vocabulary = Vocabulary(flags.vocab_size or spec.vocab_size)
    model = spec.build_model(vocabulary)
    context = flags.context or model.sequence_length
    found = costs(model, several(CHIPS[flags.chip], flags.chips), context, BYTES[flags.dtype])
    name = flags.chip if flags.chips == 1 else f"{flags.chips} x {flags.chip}"
    found = {"chip": name, "dtype": flags.dtype, "vocabulary": vocabulary.size} | found
    print(report(found))
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def several(chip: Chip, count: int) -> Chip:
    """So many chips as one, which share weights, caches and work evenly."""
    return dataclasses.replace(
        chip,
        flops=count * chip.flops,
        memory=count * chip.memory,
        memory_bandwidth=count * chip.memory_bandwidth,
    )


def costs(model: AbstractModel, chip: Chip, context: int, value_bytes: int) -> dict[str, Any]:
    """What `moe cost` finds, for texts that hold `context` tokens, on one chip."""
    serving = Serving.of(model, value_bytes)
    room = serving.most_texts(chip.memory, context)
    rows = []
    for texts in BATCHES:
        step = serving.step(chip, texts, context)
        rows.append(
            {
                "texts": texts,
                "experts_per_layer": serving.experts_read(texts),
                "weight_bytes": serving.weights_read(texts),
                "cache_bytes": texts * serving.cache_bytes(context),
                "seconds": step["seconds"],
                "tokens_per_second": texts / step["seconds"],
                "held_up_by": "FLOPs" if step["computing"] >= step["reading"] else "memory",
                "fits": texts <= room,
            }
        )
    if not model.objective.causal:
        note = "a masked model fills each mask in by a pass over the whole text: it has no cache"
    elif why := reason_to_recompute(model.module):
        note = f"each token takes a pass over the whole text, and steps here are of a cache: {why}"
    else:
        note = None
    return {
        "note": note,
        "context": context,
        "parameters_total": model.costs.parameters_total,
        "parameters_active": model.costs.parameters_active,
        "flops_per_token": serving.flops(context),
        "weight_bytes": serving.weight_bytes,
        "cache_bytes_per_text": serving.cache_bytes(context),
        "memory": chip.memory,
        "most_texts": room,
        "break_even_texts": serving.break_even(chip, context),
        "steps": rows,
    }


def report(found: dict[str, Any]) -> str:
    """The findings as text."""
    parts = {name: value for name, value in found["flops_per_token"].items() if value}
    whole = sum(parts.values())
    split = ", ".join(f"{n.replace('_', ' ')} {v / whole:.1%}" for n, v in parts.items())
    texts, least = found["most_texts"], found["break_even_texts"]
    lines = [
        f"parameters  {found['parameters_total']:,} total, {found['parameters_active']:,} active",
        f"a token     {whole:.4g} FLOPs after {found['context']:,} others: {split}",
        f"weights     {size(found['weight_bytes'])} in {found['dtype']}",
        f"a text      {size(found['cache_bytes_per_text'])} of keys and values for "
        f"{found['context']:,} tokens",
        f"{found['chip']:<11} "
        + (
            f"has room for {texts:,} such texts beside the weights"
            if texts
            else f"has {size(found['memory'])}: no room for the weights and a text"
        ),
        "",
        "texts  experts read  weights read      caches          a step    tokens/s  held up by",
    ]
    for row in found["steps"]:
        fits = "" if row["fits"] else ", does not fit"
        lines.append(
            f"{row['texts']:>5}  {row['experts_per_layer']:>12.1f}  {size(row['weight_bytes']):>12}"
            f"  {size(row['cache_bytes']):>10}  {milliseconds(row['seconds']):>14}"
            f"  {row['tokens_per_second']:>10,.0f}  {row['held_up_by']}{fits}"
        )
    if least is None:
        end = "At no number of texts do FLOPs hold a step up: caches of this length take longer."
    else:
        end = f"From {least:,} texts on, FLOPs hold a step up; below, memory does."
    notes = (
        "At the chip's peaks, with texts that choose their experts evenly and by themselves; what "
        "chips send each other is not counted."
    )
    note = [f"{found['note'][0].upper()}{found['note'][1:]}."] if found["note"] else []
    return "\n".join([*lines, "", end, notes, *note])


def size(count: float) -> str:
    """Bytes, such as "1.5 GiB" or "128 KiB"."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
