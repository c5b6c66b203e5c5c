"""The end of a run: the last evaluation, summary.json, samples, and the picture of its experts."""

from collections.abc import Callable
import dataclasses
import json
import math
import time
from typing import Any

from moe.analysis.plots import picture
from moe.analysis.specialisation import token_table
from moe.data import compressors
from moe.data.tokens.sealed import write_atomically
from moe.errors import attempted
from moe.inference.generate import Generator
from moe.inference.sampling import Sampling
from moe.machine import processes
from moe.model.functional import Arrays
from moe.runs.setup import Setup
from moe.runs.storage.folder import RunFolder
from moe.runs.storage.json_files import write_json
from moe.runs.tracking.progress import Display
from moe.training import evaluate
from moe.training.train_step import TrainState

PICTURE_BYTES = 60_000


def final_evaluation(
    score_batch: Callable,
    state: TrainState,
    setup: Setup,
    display: Display,
    evaluated: Callable[[int, int], None],
) -> evaluate.Evaluation:
    """The evaluation of the trained model on the held-out documents, with its progress shown.

    score_batch: a function of `evaluate.batch_scorer`. evaluated: evaluated(done, of) is called
        after each batch.
    """
    batches = setup.final_held_out
    size = f"{batches.num_bytes:,} bytes in {batches.num_documents} held-out documents"
    display.say(f"evaluating on {size}")
    with display.counting("evaluating", len(batches)) as count:

        def say(done: int, of: int) -> None:
            evaluated(done, of)
            count(done, of)

        return evaluate.evaluate(score_batch, state, batches, setup.mesh, say)


def write_documents(result: evaluate.Evaluation, setup: Setup, folder: RunFolder) -> None:
    """Write documents.jsonl: name, bits and bytes of each held-out document of the evaluation."""
    rows = zip(
        setup.text.names_of(setup.final_held_out),
        (result.nats_M / math.log(2)).tolist(),
        result.bytes_M.tolist(),
        strict=True,
    )
    lines = [json.dumps({"name": n, "bits": bits, "bytes": size}) + "\n" for n, bits, size in rows]
    write_atomically(folder.documents, "".join(lines).encode())


@dataclasses.dataclass(frozen=True)
class Artifacts:
    """Makes a trained model's samples and picture, and writes them to the run's folder."""

    folder: RunFolder
    setup: Setup

    def samples(self, values: tuple[Arrays, Arrays]) -> list[str]:
        """Each prompt with up to 160 generated tokens; they are written to samples.txt.

        Empty for a model that can't continue a text. values: parameters and router state.
        """
        spec, model = self.setup.spec, self.setup.model
        if not model.objective.causal or model.module.leak or not spec.prompts:
            return []
        generator = Generator(model, *values, self.setup.text.tokenizer)
        sampling = Sampling(temperature=0.7, top_p=0.95)
        found = generator.continuations(spec.prompts, tokens=160, sampling=sampling, seed=spec.seed)
        texts = [text.text for text in found]
        separator = "\n" + "-" * 80 + "\n"
        self.folder.samples.write_text(separator.join(texts) + "\n", encoding="utf-8")
        return texts

    def picture(self, values: tuple[Arrays, Arrays], lines: dict[str, float]) -> None:
        """Write picture.png, if the model has experts.

        values: parameters and router state. lines: bits per byte that are drawn beside the loss.
        """
        model, text = self.setup.model, self.setup.text
        if model.moe_layer is None:
            return
        causal, shape = model.objective.causal, self.setup.spec.shape
        batches = text.validation_batches(*shape, max_bytes=PICTURE_BYTES, causal=causal)
        table = token_table(model, *values, text.tokenizer, batches)
        # A model that sees both sides of a token is not to be compared with compressors.
        picture(self.folder.path, self.folder.picture, table, lines if causal else {})


def write(
    artifacts: Artifacts,
    state: TrainState,
    summary: dict[str, Any],
    display: Display,
    started: float,
) -> dict[str, Any]:
    """Write summary.json and, where asked for, compressors' figures, samples and the picture.

    Where one of the latter fails, that is said and the others are written.
    started: when the command was, by time.monotonic().

    Returns:
        The summary, and the samples.
    """
    folder, first, samples = artifacts.folder, processes.is_first(), []

    def write_summary(baselines: dict[str, float]) -> dict[str, Any]:
        seconds = time.monotonic() - started
        complete = summary | {"baselines": baselines, "wall_seconds": seconds}
        if first:
            write_json(folder.summary, complete)
        return complete

    whole = write_summary({})
    if not artifacts.setup.spec.artifacts:
        return whole | {"samples": []}
    say, text = display.say, artifacts.setup.text
    baselines = attempted("compressors' figures", say, compressors.baselines, text, say) or {}
    write_summary(baselines)
    values = processes.gathered((state.params, state.router_state))
    if values is None:
        say("no samples and no picture: the parameters are too large for one process")
    elif first:
        lines = baselines | {"held out": summary["val_bits_per_byte"]}
        samples = attempted("samples", say, artifacts.samples, values) or []
        attempted("picture", say, artifacts.picture, values, lines)
    return write_summary(baselines) | {"samples": samples}
