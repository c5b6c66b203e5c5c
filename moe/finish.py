"""The end of a run: its results, then samples and the picture of what its experts learned."""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

from jax.sharding import Mesh

from moe import hosts
from moe.analysis import token_table
from moe.assemble import Model
from moe.batches import ValidationBatches
from moe.evaluate import Evaluation, evaluate
from moe.functional import Arrays
from moe.generate import Sampling, generate
from moe.plots import picture
from moe.progress import Display
from moe.run_folder import RunFolder
from moe.step import TrainState
from moe.text_data import PreparedData

PICTURE_BYTES = 60_000


def evaluated(
    step: Callable, state: TrainState, batches: ValidationBatches, mesh: Mesh, display: Display
) -> Evaluation:
    """The last evaluation, with its progress."""
    size = f"{batches.num_bytes:,} bytes in {batches.num_documents} held-out documents"
    display.say(f"evaluating on {size}")
    with display.counting("evaluating", len(batches)) as count:
        return evaluate(step, state, batches, mesh, count)


def attempted(what: str, say: Callable[[str], None], call: Callable, *given: Any) -> Any:
    """What a call returns; where it fails that is told, the results stand, and this is None."""
    try:
        return call(*given)
    except Exception as error:  # decoration is never worth a run
        first = (str(error).strip().splitlines() or [""])[0][:160]
        say(f"no {what}: {type(error).__name__}: {first}")
        return None


@dataclasses.dataclass(frozen=True)
class Pages:
    """What samples and picture are made from. shape: sequences per batch and their length."""

    folder: RunFolder
    built: Model
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
    """Write summary.json first, then samples and picture, whose failure is told and costs nothing.

    started: when the command was, by time.monotonic().

    Returns:
        The summary, and the samples.
    """
    folder, first = pages.folder, hosts.is_first()
    if first:
        folder.write_json(folder.summary, summary)
    samples: list[str] = []
    values = hosts.gathered((state.params, state.router_state))
    if values is None:
        display.say("no samples and no picture: the parameters are too large for one host")
    elif first:
        lines = summary["baselines"] | {"held out": summary["val_bits_per_byte"]}
        samples = attempted("samples", display.say, pages.samples, values) or []
        attempted("picture", display.say, pages.picture, values, lines)
    summary |= {"wall_seconds": time.monotonic() - started}
    if first:
        folder.write_json(folder.summary, summary)
    return summary | {"samples": samples}
