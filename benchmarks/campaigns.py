"""What campaigns of faults share: a folder with caches for their processes, and their results told.

Importing this makes `tiny` importable, the small runs of the tests.
"""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import sys
import tempfile
from typing import Any

import jax

from moe.machine import xla_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """A temporary folder; one device, and caches in the folder, for all processes from now on."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        compiled = {
            "jax_compilation_cache_dir": str(folder / "compiled"),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": 0,
        }
        os.environ["MOE_CACHE"] = str(folder / "cache")
        os.environ["XLA_FLAGS"] = " ".join(xla_flags.flags(devices=1))
        for name, value in compiled.items():
            os.environ[name.upper()] = str(value)  # for processes that are started anew
            jax.config.update(name, value)  # for those that are forked, as JAX is imported
        yield folder


def tell(result: dict[str, Any], out: Path | None) -> None:
    """Print a result as JSON, and write it where a path is given."""
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if out:
        out.write_text(text, encoding="utf-8")
