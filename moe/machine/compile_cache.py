"""A cache of compiled programs on disk, so that no command compiles the same program twice.

It is JAX's persistent cache, in the user's cache folder and bounded in size. Where that folder
can't be written, programs are compiled without a cache. `JAX_COMPILATION_CACHE_DIR` names another
folder, `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off.

JAX writes an entry in place: a process that is killed meanwhile, or a full disk, leaves a damaged
one, which JAX would warn of at every start and never replace.
"""

import dataclasses
import functools
import importlib.util
import os
from pathlib import Path
import re
import sys
from typing import TextIO
import warnings

from moe.errors import printable
from moe.machine.user_cache import default_cache_dir

HIT = "/jax/compilation_cache/cache_hits"
MISS = "/jax/compilation_cache/cache_misses"
MAX_BYTES = 4 * 2**30
SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}


def prepare() -> None:
    """Set the cache's environment variables, unless they are set; before jax is imported.

    Trouble with the cache is told in a line, and its cause removed.
    """
    _mend()
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


TROUBLE = re.compile(r"Error (\w+) persistent compilation cache entry for '(.*?)': (.*)")


def _mend() -> None:
    """Act on JAX's warnings: a program whose entry is damaged is compiled anew and kept again."""
    others = warnings.showwarning
    if getattr(others, "mends", False):
        return

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        found = TROUBLE.match(str(message))
        folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
        if found is None or not folder.is_absolute():
            return others(message, category, filename, lineno, file, line)
        doing, program, why = found.groups()
        if doing == "reading":
            told = f"{program} in the cache of compiled programs is damaged; it is compiled anew"
            removed = list(folder.glob(f"{program}-*-cache"))
        else:
            told = f"{program} is not kept in the cache of compiled programs: {why}"
            removed = [p for p in folder.glob("*-cache") if not _read_at(p).exists()]
        for path in removed:
            path.unlink(missing_ok=True)
            _read_at(path).unlink(missing_ok=True)
        print(printable(told), file=sys.stderr)

    show.mends = True  # pyright: ignore[reportFunctionMemberAccess]
    warnings.showwarning = show


def _read_at(entry: Path) -> Path:
    """The file that holds when an entry was last read; without it JAX writes no other entry."""
    return entry.with_name(entry.name.removesuffix("cache") + "atime")


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
