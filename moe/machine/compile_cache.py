"""A cache of compiled programs on disk, so that no command compiles the same program twice.

It is JAX's persistent cache, in the user's cache folder and bounded in size. Where that folder
can't be written, programs are compiled without a cache. `JAX_COMPILATION_CACHE_DIR` names another
folder, `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off.
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
    """Set the cache's environment variables, unless they are set; before jax is imported."""
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
    if importlib.util.find_spec("filelock"):  # JAX needs it to bound the size
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))


@dataclasses.dataclass
class Counts:
    """Programs that were found in the cache (hits), and compiled and added to it (misses)."""

    hits: int = 0
    misses: int = 0

    def since(self, before: "Counts") -> str:
        """A note such as " (2 of 3 programs from the cache)"; empty where it was not used."""
        hits, misses = self.hits - before.hits, self.misses - before.misses
        if not hits + misses:
            return ""
        if not hits or not misses:
            return " (new to the cache)" if misses else " (from the cache)"
        return f" ({hits} of {hits + misses} programs from the cache)"


@functools.cache
def _counted() -> Counts:
    """The counts since the first call; cached, since JAX's listeners can't be removed."""
    from jax import monitoring

    counts = Counts()

    def listen(event: str, **_) -> None:
        counts.hits += event == HIT
        counts.misses += event == MISS

    monitoring.register_event_listener(listen)
    return counts


def counts() -> Counts:
    """Hits and misses since the first call of this function in this process."""
    return dataclasses.replace(_counted())
