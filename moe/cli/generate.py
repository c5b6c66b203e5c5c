"""`moe generate`: text from a run's checkpoint."""

import json
from pathlib import Path
import sys

from moe.cli import config
from moe.errors import printable
from moe.inference.generate import Generator
from moe.inference.sampling import Sampling
from moe.runs.restore import restore_run


def run(flags) -> int:
    """Print the prompt with each of `--count` continuations; `--json` also writes them.

    The first one is printed as it is found.
    """
    restored = restore_run(
        flags.workdir, config.of_folder(flags.workdir, imports=vars(flags)["import"])
    )
    values = restored.params, restored.router_state
    generator = Generator(restored.model, *values, restored.tokenizer, flags.context)
    if generator.recomputes:
        why = f"each token takes a pass over the whole text: {generator.recomputes}"
        print(f"moe generate: {why}", file=sys.stderr)
    found = generator.continuations(
        [flags.prompt] * flags.count,
        tokens=flags.tokens,
        sampling=Sampling(
            flags.temperature, flags.top_k, flags.top_p, flags.min_p, flags.repetition_penalty
        ),
        seed=flags.seed,
        say=lambda piece: print(printable(piece), end="", flush=True),
    )
    others = [text.text for text in found[1:]]
    print(printable("".join("\n" + "-" * 80 + "\n" + text for text in others)))
    if flags.json:
        content = {
            "step": restored.step,
            "prompt": flags.prompt,
            "texts": [text.text for text in found],
            "log_probs": [list(text.log_probs) for text in found],
        }
        Path(flags.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0
