"""`moe eval`: bits per byte of a run's checkpoint on its held-out split or on any corpus."""

import dataclasses
import json
from pathlib import Path
import sys
from typing import Any, Literal

import gin

from moe.cli import config
from moe.cli.weights import restored_with_weights
from moe.data.corpora.corpus import Corpus
from moe.data.corpora.split import left_out_of
from moe.data.text import PreparedData, TextData
from moe.data.tokens.tokenizer import Tokenizer
from moe.errors import UserError, printable
from moe.model import sharding
from moe.runs.restore import Restored
from moe.training.abstract_model import AbstractModel
from moe.training.evaluate import Evaluation, batch_scorer, evaluate
from moe.training.metrics import Routing, health, load_scalars
from routing.ranges import Count, Size


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A tokenizer spec whose `fit` returns a given tokenizer."""

    tokenizer: Tokenizer

    def fit(self, texts, cache_dir: Path, fingerprint: str, say=None) -> Tokenizer:
        return self.tokenizer


@gin.configurable("eval", module="moe.cli.eval")  # pyright: ignore[reportCallIssue]
def evaluate_run(
    run: Restored,
    corpus: Corpus | None = None,
    batch_size: Count = 32,
    stride: Count | None = None,
    max_bytes: Size | None = None,
    rule: Literal["evaluation", "training"] = "evaluation",
) -> Evaluation:
    """Score every token of the held-out documents, or of a corpus, once.

    Args:
        run: the restored run.
        corpus: all of its documents are scored; the run's own held-out split where None.
        batch_size: sequences at a time; it changes only the speed.
        stride: tokens from one window of a long document to the next; half the sequence where None.
        max_bytes: bytes of text to score at most: documents in a fixed random order, the last one
            cut; all where None.
        rule: "evaluation", or "training": routers decide as in training, with noise and capacity.
            A router that sees the future in training looks better by that rule than it is.
    """
    if rule not in ("evaluation", "training"):
        raise UserError(f"eval.rule={rule!r}: evaluation or training")
    length = run.spec.sequence_length
    data: PreparedData
    if corpus is None:
        data = run.text(
            " (its tokenizer no longer comes out the same); name a corpus, such as "
            '--gin_bindings="eval.corpus = @TextFiles()"'
        )
    else:
        spec = Fitted(run.tokenizer)
        data = TextData(corpus, spec, validation_corpus=corpus).prepare()
        for line in left_out_of(corpus):
            print(printable(line), file=sys.stderr)
    causal = run.model.objective.causal
    # A multiple of what the mesh needs; rows without a sequence are padding.
    shards = sharding.batch_shards(run.mesh)
    shards *= run.model.sequences_per_group if rule == "training" else 1
    batch_size = -(-batch_size // shards) * shards
    batches = data.validation_batches(batch_size, length, stride, max_bytes, causal)
    score_batch = batch_scorer(run.model, run.mesh, training_rule=rule == "training")
    return evaluate(score_batch, run, batches, run.mesh)


def depths_of(model: AbstractModel) -> dict[str, Any]:
    """The router of a Mixture-of-Depths, its capacity and evaluation rule; empty without one."""
    depth = model.module.depth_router
    if depth is None:
        return {}
    name, rule = type(depth).__name__, depth.decoding
    return {"depth_router": name, "depth_capacity": depth.capacity, "depth_evaluation_rule": rule}


def loads_of(routing: Routing) -> dict[str, Any]:
    """Loads and drops of the layers whose tokens choose experts, and the number of other layers.

    Values are None where no layer has choices.
    """
    scalars = load_scalars(routing)
    return {
        "max_over_mean_load": scalars.get("max_over_mean"),
        "max_over_mean_load_worst": scalars.get("max_over_mean_worst"),
        "dropped": scalars.get("dropped"),
        "dropped_worst": scalars.get("dropped_worst"),
        "layers_without_choices": int((routing.count_LE.sum(1) == 0).sum()),
    }


def run(flags) -> int:
    """Print the evaluation's result; `--json` also writes it."""
    spec = config.of_folder(flags.workdir, flags.gin_bindings, vars(flags)["import"])
    restored, weights = restored_with_weights(flags, spec, flags.step)
    result = evaluate_run(restored)
    layer = restored.model.moe_layer
    found = {
        "step": restored.step,
        "bits_per_byte": result.bits_per_byte,
        "loss": result.loss,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "documents": result.documents,
        "router": None if layer is None else type(layer.router).__name__,
        **depths_of(restored.model),
        "rule": gin.get_bindings("eval").get("rule", "evaluation"),
        "evaluation_rule": None if layer is None else layer.router.decoding,
        "routing": health(result.routing, restored.model.kind),
        **weights,
    }
    if result.routing is not None:
        found |= loads_of(result.routing)
    width = max(map(len, found))
    for name, value in found.items():
        shown = f"{value:.4f}" if isinstance(value, float) else "-" if value is None else value
        print(printable(f"{name:<{width}}  {shown}"))
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0
