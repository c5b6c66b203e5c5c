"""The folder of a user's caches: data, tokenizers, token files and compiled programs."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$MOE_CACHE`, or `~/.cache/moe`."""
    return Path(os.environ.get("MOE_CACHE") or "~/.cache/moe").expanduser()
