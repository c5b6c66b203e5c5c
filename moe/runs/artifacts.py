"""The end of a run: its results, then samples and the picture of what its experts learned."""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

from jax.sharding import Mesh

from moe.analysis.plots import picture
from moe.analysis.specialisation import token_table
from moe.data import compressors
from moe.data.batches import ValidationBatches
from moe.data.text import PreparedData
from moe.errors import attempted
from moe.inference.generate import Sampling, generate
from moe.machine import processes
from moe.model.functional import Arrays
from moe.runs.storage.folder import RunFolder
from moe.runs.tracking.progress import Display
from moe.training import evaluate
from moe.training.abstract_model import AbstractModel
from moe.training.train_step import TrainState

PICTURE_BYTES = 60_000


def evaluated(
    step: Callable, state: TrainState, batches: ValidationBatches, mesh: Mesh, display: Display
) -> evaluate.Evaluation:
    """The last evaluation, with its progress."""
    size = f"{batches.num_bytes:,} bytes in {batches.num_documents} held-out documents"
    display.say(f"evaluating on {size}")
    with display.counting("evaluating", len(batches)) as count:
        return evaluate.evaluate(step, state, batches, mesh, count)


@dataclasses.dataclass(frozen=True)
class Pages:
    """What samples and picture are made from. shape: sequences per batch and their length."""

    folder: RunFolder
    built: AbstractModel
    text: PreparedData
    prompts: tuple[str, ...]
    shape: tuple[int, int]
    seed: int

    def samples(self, values: tuple[Arrays, Arrays]) -> list[str]:
        """Every prompt continued with 160 tokens; the texts go to samples.txt.

        None where the model can't continue a text. values: parameters and router state.
        """
        if not self.built.objective.causal or self.built.module.leak:
            return []
        made = []
        for prompt in self.prompts:
            made += generate(
                self.built,
                *values,
                self.text.tokenizer,
                prompt=prompt,
                tokens=160,
                context=self.shape[1],
                sampling=Sampling(temperature=0.7, top_p=0.95),
                seed=self.seed,
            )
        self.folder.samples.write_text(("\n" + "-" * 80 + "\n").join(made) + "\n", encoding="utf-8")
        return made

    def picture(self, values: tuple[Arrays, Arrays], lines: dict[str, float]) -> None:
        """picture.png, where the model has experts. lines: bits per byte beside the loss."""
        if self.built.moe_layer is None:
            return
        causal = self.built.objective.causal
        batches = self.text.validation_batches(*self.shape, max_bytes=PICTURE_BYTES, causal=causal)
        table = token_table(self.built, *values, self.text.tokenizer, batches)
        # What sees both sides of a token is not to be compared with compressors.
        picture(self.folder.path, self.folder.picture, table, lines if causal else {})


def written(
    pages: Pages, state: TrainState, summary: dict[str, Any], display: Display, started: float
) -> dict[str, Any]:
    """Write summary.json, then what decorates it, whose failure is told and costs nothing.

    That is: what compressors reach, samples and the picture.
    started: when the command was, by time.monotonic().

    Returns:
        The summary, and the samples.
    """
    folder, first, samples = pages.folder, processes.is_first(), []

    def write(marks: dict[str, float]) -> dict[str, Any]:
        whole = summary | {"baselines": marks, "wall_seconds": time.monotonic() - started}
        if first:
            folder.write_json(folder.summary, whole)
        return whole

    write({})
    say = display.say
    marks = attempted("compressors' figures", say, compressors.baselines, pages.text, say) or {}
    write(marks)
    values = processes.gathered((state.params, state.router_state))
    if values is None:
        say("no samples and no picture: the parameters are too large for one host")
    elif first:
        lines = marks | {"held out": summary["val_bits_per_byte"]}
        samples = attempted("samples", say, pages.samples, values) or []
        attempted("picture", say, pages.picture, values, lines)
    return write(marks) | {"samples": samples}
