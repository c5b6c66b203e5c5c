"""What XLA is told of an accelerator before JAX starts; docs/performance.md says why.

Nothing that the user has set is changed, and on CPUs nothing is set at all.
"""

from collections.abc import Callable, MutableMapping
import importlib.util
import os
from pathlib import Path
from typing import Literal

from moe.machine import xla_flags

Platform = Literal["cpu", "gpu", "tpu"]
# Collectives run while matmuls do, instead of between them.
GPU_FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true",)
# JAX takes three quarters of a GPU's memory by itself; libraries need some outside of it.
GPU_MEMORY = {"XLA_CLIENT_MEM_FRACTION": "0.92"}
# Each of them says how JAX takes memory; where one is set, the user has decided.
MEMORY = (
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
SHOWN = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", *MEMORY)
_NVIDIA = ("/dev/nvidiactl", "/dev/dxg")  # the latter in Windows' Linux
_TPU = ("/dev/accel0", "/dev/vfio/0")


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set this machine's flags, where they are not set yet; to be called before jax is imported."""
    if platform(environment) != "gpu":
        return
    xla_flags.add_missing(GPU_FLAGS, environment)
    if not any(name in environment for name in MEMORY):
        environment.update(GPU_MEMORY)


def platform(
    environment: MutableMapping[str, str] = os.environ,
    has_file: Callable[[str], bool] = lambda path: Path(path).exists(),
    has_package: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
) -> Platform:
    """The platform that JAX will start on, as far as files, packages and JAX_PLATFORMS tell."""
    asked = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if asked:
        known: dict[str, Platform] = {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}
        return known.get(asked, "cpu")
    if has_package("libtpu") and any(map(has_file, _TPU)):
        return "tpu"
    plugins = has_package("jax_plugins") and any(
        has_package(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
    )
    return "gpu" if plugins and any(map(has_file, _NVIDIA)) else "cpu"


def shown(environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """The variables by which XLA is told something, for run.json."""
    return {name: environment[name] for name in SHOWN if name in environment}
