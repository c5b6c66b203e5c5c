"""The folder of a user's caches: tokenizers, token files, baselines and compiled programs."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$MOE_CACHE`, or `~/.cache/moe`."""
    return Path(os.environ.get("MOE_CACHE") or "~/.cache/moe").expanduser()
