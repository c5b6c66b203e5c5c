"""Mixture-of-experts transformers: training, evaluation and fair comparison of routers."""

import importlib.util
from pathlib import Path
import sys

__version__ = "0.1.0"


def _folder_of(name: str) -> Path | None:
    """The folder that `import name` would read, found without importing it."""
    loaded = sys.modules.get(name)
    spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None


def _check_neighbours() -> None:
    """`layers` and `routing` are generic names: another folder called so would be read instead."""
    home = Path(__file__).resolve().parents[1]
    for name in ("layers", "routing"):
        found = _folder_of(name)
        if found is None:
            raise ImportError(f"moe needs its package {name!r} beside it in {home}; reinstall moe")
        if found != home / name:
            raise ImportError(
                f"{found} shadows the package {name!r} of moe ({home / name}); "
                "rename it, start from another folder or take its parent off PYTHONPATH"
            )


_check_neighbours()
