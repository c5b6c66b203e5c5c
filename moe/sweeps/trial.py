"""One trial in this process: trains, measures, and writes the trial's row.

The process ends, with its state saved, when the worker that has started it is gone: it holds the
other end of this process's standard input.
"""

from collections.abc import Callable, Sequence
import functools
import math
import os
import shutil
import signal
import sys
import threading
from typing import Any

import numpy as np

from moe import received, settings
from moe.data.corpora.corpus import hash_position
from moe.data.tokens.sealed import write_atomically
from moe.errors import UserError, first_line
from moe.runs.restore import Restored, restore_run
from moe.runs.storage.folder import AnotherRun, RunFolder
from moe.runs.storage.json_files import finite, write_json
from moe.runs.train import train
from moe.sweeps.record import Row, TrialFolder, as_lines, read_lines
from moe.training.evaluate import Evaluation
from moe.training.finite import TrainingDiverged
from moe.training.metrics import load_scalars
from moe.training.run_spec import RunSpec

INTERRUPTED = 143
COSTS = ("parameters_total", "parameters_active", "flops_per_token")
SPEED = (
    *("train_seconds", "wall_seconds", "tokens_per_second", "step_seconds"),
    *("utilisation", "effective_utilisation", "peak_memory_bytes"),
)
CURVE = (
    *("step", "loss", "bits_per_byte", "learning_rate", "grad_norm/all"),
    *("load/max_over_mean", "load/max_over_mean_worst", "load/dropped", "router/entropy"),
)

Scorer = Callable[[Restored], Evaluation]


def run(folder: TrialFolder, spec: RunSpec, score_by_training_rule: Scorer) -> int:
    """Train a trial, or go on with it, and write its row; returns the exit status.

    spec: of the trial's config, which is loaded.
    score_by_training_rule: the evaluation of a restored run in which routers decide as in training.
    """
    end_with(sys.stdin.fileno())
    trial = received.read_json(folder.identity)
    summary = trained(folder, spec)
    if summary.get("interrupted"):
        return INTERRUPTED
    row = (
        trial
        | {"status": "finished", "reason": None}
        | measured(RunFolder(folder.run), summary, math.prod(spec.shape))
    )
    if trial["phase"] != "tuning":
        restored = restore_run(str(folder.run), spec, say=lambda line: None)
        names = [d["name"] for d in read_lines(RunFolder(folder.run).documents)]
        row |= by_training_rule(score_by_training_rule(restored), names)
    if trial["phase"] == "report":
        curves = curves_of(RunFolder(folder.run), trial, summary, math.prod(spec.shape))
        folder.curves.write_bytes(as_lines(curves))
    write_json(folder.result, finite(row))
    for path in (folder.run / "checkpoints", folder.run / "tensorboard"):
        shutil.rmtree(path, ignore_errors=True)
    return 0


def trained(folder: TrialFolder, spec: RunSpec) -> Row:
    """Train to the end; the summary. What an edited sweep or another version has begun, ends."""
    text = folder.config.read_bytes()
    if folder.run.exists() and not (folder.begun.exists() and folder.begun.read_bytes() == text):
        forget_run(folder, "the trial has begun with another config")
    write_atomically(folder.begun, text)
    config = functools.partial(checked_config, spec)
    try:
        return train(spec, str(folder.run), config)
    except AnotherRun as error:
        forget_run(folder, str(error))
        return train(spec, str(folder.run), config)


def checked_config(spec: RunSpec, say: Callable[[str], None]) -> str:
    """The config's text, for `train`; UserError, before any step, of too few documents.

    The text is prepared by then, so that reading it again is quick.
    """
    config = settings.record(say)
    text = spec.prepare_data()
    batches = text.validation_batches(*spec.shape, spec.eval_stride, spec.final_eval_bytes)
    check_documents(text.names_of(batches))
    return config


def check_documents(names: Sequence[str]) -> None:
    """UserError unless these held-out documents are enough for tuning and for reporting."""
    tuning = sum(map(is_for_tuning, names))
    if not tuning or len(names) - tuning < 2:  # of one, nothing is known of how documents scatter
        raise UserError(
            f"{len(names)} held-out documents are too few: some are for tuning and others for "
            "reporting; raise TextData.validation_fraction or train.final_eval_bytes, or give more "
            "text"
        )


def forget_run(folder: TrialFolder, why: str) -> None:
    """Say why the trial starts anew, and delete what of its run is there."""
    print(f"starting anew: {why}", flush=True)
    with RunFolder(folder.run).locked():
        shutil.rmtree(folder.run)


def measured(run: RunFolder, summary: dict[str, Any], tokens_per_step: int) -> Row:
    """What a run's own files say of it.

    The held-out documents are in two parts: tuning chooses by one and never sees the other.
    """
    documents = list(read_lines(run.documents))
    tuning = [d for d in documents if is_for_tuning(d["name"])]
    others = [d for d in documents if not is_for_tuning(d["name"])]
    check_documents([d["name"] for d in documents])
    about = received.read_json(run.run)
    tokens = summary["step"] * tokens_per_step
    return {
        "bits_per_byte": mean_bits(others),
        "validation_bits_per_byte": mean_bits(tuning),
        "document_bits": [d["bits"] for d in others],
        "document_bytes": [d["bytes"] for d in others],
        **{name: summary[name] for name in (*COSTS, *SPEED)},
        "steps": summary["step"],
        "tokens": tokens,
        "training_flops": float(tokens * summary["flops_per_token"]),
        "device": about["device"],
        "versions": about["versions"],
        "corpus": {name: about["corpus"][name] for name in ("name", "sha256")},
        "config": run.config.read_text(encoding="utf-8"),
    }


def is_for_tuning(document_name: str) -> bool:
    """Whether a held-out document is of the half that tuning chooses by."""
    return hash_position(document_name, seed=1) < 0.5


def mean_bits(documents: list[Row]) -> float:
    """Bits per byte over documents."""
    return sum(d["bits"] for d in documents) / sum(d["bytes"] for d in documents)


def by_training_rule(result: Evaluation, names: list[str]) -> Row:
    """Bits per byte of the documents for reporting, loads and drops, by the training rule.

    names: of the documents that were scored.
    """
    chosen = np.array([not is_for_tuning(name) for name in names])
    bits = result.nats_M[chosen].sum() / math.log(2)
    found = {"training_rule_bits_per_byte": bits / int(result.bytes_M[chosen].sum())}
    loads = load_scalars(result.routing) if result.routing is not None else {}
    return found | {
        "dropped": loads.get("dropped"),
        "max_over_mean_load": loads.get("max_over_mean_worst"),
    }


def curves_of(run: RunFolder, trial: Row, summary: dict[str, Any], tokens_per_step: int):
    """A row for each logged step: metrics, and the tokens, FLOPs and seconds so far."""
    seconds, before = 0.0, 0
    for line in read_lines(run.metrics):
        if "loss" not in line:
            continue
        seconds += line.get("speed/step_seconds", 0.0) * (line["step"] - before)
        before = line["step"]
        tokens = line["step"] * tokens_per_step
        yield finite(
            {name: trial[name] for name in ("trial", "cell", "arm", "seed")}
            | {"tokens": tokens, "flops": float(tokens * summary["flops_per_token"])}
            | {"seconds": seconds}
            | {name: line[name] for name in CURVE if name in line}
        )


def end_with(descriptor: int) -> None:
    """Send this process SIGTERM once the other end of a pipe is closed."""

    def wait() -> None:
        while os.read(descriptor, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def outcome_of(error: BaseException) -> tuple[str, str]:
    """The status and the reason of a trial that an error has ended."""
    text = first_line(error)
    if isinstance(error, TrainingDiverged):
        return "diverged", text
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return "out of memory", text
    if isinstance(error, UserError):  # written for people: every line of it counts
        return "crashed", " ".join(str(error).split())
    return "crashed", f"{type(error).__name__}: {text}"


def write_outcome(folder: TrialFolder, error: BaseException) -> None:
    """Leave the reason of a failed attempt for the worker."""
    status, reason = outcome_of(error)
    again = not isinstance(error, UserError)  # a mistake in the config stays one
    write_json(folder.outcome, {"status": status, "reason": reason, "again": again})
