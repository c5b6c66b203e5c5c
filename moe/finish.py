"""The end of a run: samples and the picture of what its experts learned."""

from moe.analysis import token_table
from moe.assemble import Model
from moe.functional import Arrays
from moe.generate import Sampling, generate
from moe.plots import picture
from moe.run_folder import RunFolder
from moe.text_data import PreparedData

PICTURE_BYTES = 60_000


def write_pages(
    folder: RunFolder,
    built: Model,
    values: tuple[Arrays, Arrays],
    text: PreparedData,
    prompts: tuple[str, ...],
    baselines: dict[str, float],
    shape: tuple[int, int],
    seed: int,
) -> list[str]:
    """samples.txt, where the model can continue a text, and picture.png, where it has experts.

    values: parameters and router state. shape: sequences per batch and their length.

    Returns:
        The samples.
    """
    samples = []
    if built.objective.causal and not built.module.leak:
        samples = write_samples(folder, built, values, text, prompts, shape[1], seed)
    if built.moe_layer is not None:
        causal = built.objective.causal
        batches = text.validation_batches(*shape, max_bytes=PICTURE_BYTES, causal=causal)
        if not causal:
            baselines = {}  # what sees both sides of a token is not to be compared with them
        table = token_table(built, *values, text.tokenizer, batches)
        picture(folder.path, folder.picture, table, baselines)
    return samples


def write_samples(
    folder: RunFolder,
    built: Model,
    values: tuple[Arrays, Arrays],
    text: PreparedData,
    prompts: tuple[str, ...],
    context: int,
    seed: int,
) -> list[str]:
    """Continue every prompt with 160 tokens; the texts go to samples.txt.

    values: parameters and router state.
    """
    made = []
    for prompt in prompts:
        made += generate(
            built,
            *values,
            text.tokenizer,
            prompt=prompt,
            tokens=160,
            context=context,
            sampling=Sampling(temperature=0.7, top_p=0.95),
            seed=seed,
        )
    folder.samples.write_text(("\n" + "-" * 80 + "\n").join(made) + "\n", encoding="utf-8")
    return made
