"""Mixture-of-experts transformers: training, evaluation and fair comparison of routers."""

import importlib.util
import os
from pathlib import Path
import sys

__version__ = "0.1.0"
GOOGLE = "0x1ae0"  # the PCI vendor of TPUs


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


def _leave_out_an_absent_tpu() -> None:
    """With libtpu installed and no TPU, JAX would look for one and complain in five lines.

    `moe plan` needs libtpu's compiler on any machine. Where JAX has plugins for GPUs it looks for
    those as well, and nothing is set.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("jax_plugins"):
        return
    vendors = [path.read_text().strip() for path in Path("/sys/bus/pci/devices").glob("*/vendor")]
    if importlib.util.find_spec("libtpu") and GOOGLE not in vendors:
        os.environ["JAX_PLATFORMS"] = "cpu"


_check_neighbours()
_leave_out_an_absent_tpu()
