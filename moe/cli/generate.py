"""`moe generate`: text from a run's checkpoint."""

import json
from pathlib import Path

from moe.cli import config
from moe.errors import printable
from moe.inference.generate import generate
from moe.inference.sampling import Sampling
from moe.runs.restore import restore_run


def run(flags) -> int:
    """Print the prompt with each of `--count` continuations; `--json` also writes them."""
    restored = restore_run(
        flags.workdir, config.of_folder(flags.workdir, imports=vars(flags)["import"])
    )
    texts = generate(
        restored.model,
        restored.params,
        restored.router_state,
        restored.tokenizer,
        prompt=flags.prompt,
        tokens=flags.tokens,
        count=flags.count,
        context=restored.spec.sequence_length,
        sampling=Sampling(flags.temperature, flags.top_k, flags.top_p),
        seed=flags.seed,
    )
    print(printable(("\n" + "-" * 80 + "\n").join(texts)))
    if flags.json:
        content = {"step": restored.step, "prompt": flags.prompt, "texts": texts}
        Path(flags.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0
