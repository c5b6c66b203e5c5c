"""Compiled programs are kept on disk, so that a command compiles no program a second time.

JAX's own persistent cache, in the user's cache folder, bounded. Where it can't be had (a folder
that can't be written), everything works without it. `JAX_COMPILATION_CACHE_DIR` names another
folder, `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
"""

import dataclasses
import functools
import importlib.util
import os

from moe.machine.user_cache import default_cache_dir

HIT = "/jax/compilation_cache/cache_hits"
MISS = "/jax/compilation_cache/cache_misses"
MAX_BYTES = 4 * 2**30
SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}


def prepare() -> None:
    """Sets what the environment doesn't set yet; to be called before jax is imported."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = default_cache_dir() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("filelock"):  # which JAX needs to keep a bound
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))


@dataclasses.dataclass
class Counts:
    """Programs that came from the cache, and those that were compiled for it."""

    hits: int = 0
    misses: int = 0

    def since(self, before: "Counts") -> str:
        """Such as " (2 of 3 programs from the cache)"; empty where no cache was asked."""
        hits, misses = self.hits - before.hits, self.misses - before.misses
        if not hits + misses:
            return ""
        if not hits or not misses:
            return " (new to the cache)" if misses else " (from the cache)"
        return f" ({hits} of {hits + misses} programs from the cache)"


@functools.cache
def _counted() -> Counts:
    """Counts from its first call on: JAX's listeners stay for good."""
    from jax import monitoring

    counts = Counts()

    def listen(event: str, **_) -> None:
        counts.hits += event == HIT
        counts.misses += event == MISS

    monitoring.register_event_listener(listen)
    return counts


def counts() -> Counts:
    """What was asked of the cache since the first call in this process."""
    return dataclasses.replace(_counted())
