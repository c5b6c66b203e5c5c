"""Which routers see the future? Measured on fair coin flips, which can't be predicted.

    python benchmarks/leak.py --json=benchmarks/results/leak.json

A causal model can't get below 1 bit per flip. Fewer bits by the training rule are information on
later flips that the router leaks; more bits by the evaluation rule are what a model loses that has
relied on the leak. Expert choice (Zhou et al. 2022) and BASE (Lewis et al. 2021) choose among the
tokens of a whole sequence; top-k does not.
"""

from pathlib import Path
import random
import shutil

from runs import Place, arguments, by_case, measure, rows, spread

SHAPE = (
    "Transformer.d_model = 64",
    "Transformer.num_layers = 2",
    "MoELayer.num_experts = 8",
    "MoELayer.d_ff = 64",
    "MoELayer.sequences_per_group = 1",
    "TextData.corpus = @TextFiles()",
    "TextData.tokenizer = @Bytes()",
    "AdamW.learning_rate = 3e-3",
    "train.batch_size = 256",
    "train.max_seconds = None",
    "train.prompts = ()",
)
NO_DROPS = ("MoELayer.capacity = @Capacity()", "Capacity.factor = None")
CASES = {
    "top-1, sequences of 8": ("top_k", 8, ("TopK.k = 1", *NO_DROPS)),
    "BASE, sequences of 8": ("base", 8, ()),
    "expert choice, sequences of 8": ("expert_choice", 8, ("ExpertChoice.capacity_factor = 1.0",)),
    "expert choice, sequences of 16": (
        "expert_choice",
        16,
        ("ExpertChoice.capacity_factor = 1.0",),
    ),
    "expert choice, sequences of 32": (
        "expert_choice",
        32,
        ("ExpertChoice.capacity_factor = 1.0",),
    ),
}


def one(case: str, seed: int, place: Place, steps: int) -> dict:
    """Bits per held-out flip of one run, by both rules."""
    router, length, more = CASES[case]
    name = f"{list(CASES).index(case)}-{seed}"
    workdir = place.folder / name
    settings = (
        *SHAPE,
        *more,
        f"TextFiles.paths = '{coins(place.folder)}'",
        f"train.sequence_length = {length}",
        f"train.seed = {seed}",
        f"train.steps = {steps}",
    )
    files = ("--gin_file=quickstart.gin", f"--gin_file=routers/{router}.gin")
    summary = place.moe("train", *files, f"--workdir={workdir}", bindings=settings)
    rule = place.moe("eval", f"--workdir={workdir}", bindings=('eval.rule = "training"',))
    shutil.rmtree(workdir)
    return {
        "evaluation_rule": summary["val_bits_per_byte"],
        "training_rule": rule["bits_per_byte"],
    }


def coins(folder: Path) -> Path:
    """A folder with 40 files of 20,000 flips, from a fixed seed."""
    made = (folder / "coins").absolute()
    made.mkdir(exist_ok=True)
    draw = random.Random(0)
    for i in range(40):
        (made / f"{i:02}.txt").write_text("".join(draw.choices("ht", k=20_000)))
    return made


def table(runs: list[dict], steps: int) -> str:
    body = [
        (
            case,
            spread([run["training_rule"] for run in own]),
            spread([run["evaluation_rule"] for run in own]),
            len(own),
        )
        for case, own in by_case(runs).items()
    ]
    header = ("router", "training rule", "evaluation rule", "seeds")
    title = (
        f"Bits per held-out coin flip after {steps} steps; less than 1 is knowledge of the future."
    )
    return f"{title}\n\n{rows(header, body)}"


if __name__ == "__main__":
    measure(arguments(__doc__, steps=600), tuple(CASES), one, table)
