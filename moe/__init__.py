"""Mixture-of-experts transformers: training, evaluation and fair comparison of routers."""

import importlib.util
import os
from pathlib import Path
import sys

__version__ = "0.1.0"
GOOGLE = "0x1ae0"  # the PCI vendor of TPUs


def _folder_of(name: str) -> Path | None:
    """The folder that `import name` reads; found without importing it."""
    loaded = sys.modules.get(name)
    spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None


def _check_neighbours() -> None:
    """Raise ImportError where another folder named `layers` or `routing` hides ours."""
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
    """Set JAX_PLATFORMS=cpu where libtpu is installed without a TPU, as `moe plan` needs it.

    JAX would look for the TPU and print five lines about it. Where JAX has plugins for GPUs nothing
    is set, since it has to look for those.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("jax_plugins"):
        return
    vendors = [path.read_text().strip() for path in Path("/sys/bus/pci/devices").glob("*/vendor")]
    if importlib.util.find_spec("libtpu") and GOOGLE not in vendors:
        os.environ["JAX_PLATFORMS"] = "cpu"


_check_neighbours()
_leave_out_an_absent_tpu()
