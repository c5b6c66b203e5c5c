"""Mixture-of-Depths against the dense model at equal training FLOPs (Raposo et al. 2024).

    python benchmarks/depths.py --json=benchmarks/results/depths.json

The dense model is the quickstart's at half its width. In the others, every other block processes an
eighth of the tokens; they have 4, 6 or 8 layers, and train for more steps where their FLOPs per
token are fewer. Held-out text is scored by the causal predictor's rule, as in generation.
"""

import shutil

from runs import QUICKSTART, Place, arguments, by_case, measure, rows, spread

SMALL = ("Transformer.d_model = 64", "Transformer.num_heads = 1", "TrainedBPE.vocab_size = 2048")
DENSE = "FeedForward.d_ff = 256"
DEPTHS = "--gin_file=models/mixture_of_depths.gin"
# Files, further settings, and FLOPs per token with these.
DENSE_FLOPS = 2_555_904
CASES = {
    "dense, 4 layers": ((), (), DENSE_FLOPS),
    "every other block at 12.5 %, 4 layers": ((DEPTHS,), (), 1_796_736),
    "every other block at 12.5 %, 6 layers": (
        (DEPTHS,),
        ("Transformer.num_layers = 6",),
        2_301_888,
    ),
    "every other block at 12.5 %, 8 layers": (
        (DEPTHS,),
        ("Transformer.num_layers = 8",),
        2_807_040,
    ),
}


def one(case: str, seed: int, place: Place, steps: int) -> dict:
    """Held-out bits per byte of a run with the FLOPs of `steps` steps of the dense model."""
    files, more, flops = CASES[case]
    steps = round(steps * DENSE_FLOPS / flops)
    workdir = place.folder / f"depths-{list(CASES).index(case)}-{seed}"
    bindings = [*QUICKSTART, *SMALL, DENSE, *more, f"train.seed = {seed}", f"train.steps = {steps}"]
    words = ("train", "--gin_file=quickstart_dense.gin", *files, f"--workdir={workdir}")
    summary = place.moe(*words, bindings=bindings)
    shutil.rmtree(workdir)
    assert summary["flops_per_token"] == flops, (case, summary["flops_per_token"])
    return {
        "bits_per_byte": summary["val_bits_per_byte"],
        "steps": steps,
        "flops_per_token": flops,
    }


def table(runs: list[dict], steps: int) -> str:
    body = [
        (
            case,
            own[0]["steps"],
            f"{own[0]['flops_per_token']:,}",
            spread([run["bits_per_byte"] for run in own]),
            len(own),
        )
        for case, own in by_case(runs).items()
    ]
    header = ("model", "steps", "FLOPs per token", "bits per byte", "seeds")
    title = f"Held-out bits per byte at the training FLOPs of {steps} steps of the dense model."
    return f"{title}\n\n{rows(header, body)}"


if __name__ == "__main__":
    measure(arguments(__doc__, steps=300), tuple(CASES), one, table)
