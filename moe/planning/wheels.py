"""The compilers' packages: whether they are here, and what a process needs to use them."""

import importlib.util
import os
from pathlib import Path

from moe.machine import accelerator, xla_flags


def hint(*, gpu: bool) -> str | None:
    """How the compiler of GPUs or TPUs is installed; None where it is."""
    if gpu:
        # Without jax_cuda13_plugin our kernels for Hopper are not compiled.
        wheels = ("jax_plugins.xla_cuda13", "jax_cuda13_plugin")
        here = all(map(has_package, wheels)) and bool(cuda_tools())
        extra, names = "plan-cuda", "jax-cuda13-pjrt, jax-cuda13-plugin, nvidia-cuda-nvcc"
    else:
        here, extra, names = has_package("libtpu"), "plan", "libtpu"
    return None if here else f"pip install 'moe-routing[{extra}]' gives the compiler ({names})"


def has_package(name: str) -> bool:
    """Whether it could be imported."""
    parent = name.rpartition(".")[0]
    return (not parent or has_package(parent)) and importlib.util.find_spec(name) is not None


def cuda_tools() -> list[str]:
    """Folders with ptxas, which XLA calls: of an installed package first, then of the PATH."""
    spec = importlib.util.find_spec("nvidia")
    installed = [] if spec is None else spec.submodule_search_locations or []
    folders = [str(path) for root in installed for path in sorted(Path(root).glob("*/bin"))]
    folders += os.environ.get("PATH", "").split(os.pathsep)
    return [folder for folder in folders if Path(folder, "ptxas").is_file()]


def environment(*, gpu: bool) -> dict[str, str]:
    """Variables for the process that compiles: it is not to look for the devices themselves.

    gpu: for GPUs, where XLA has the flags that a run there sets.
    """
    flags = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    if gpu:
        xla_flags.add_missing(accelerator.GPU_FLAGS, flags)
    return flags | {
        "JAX_PLATFORMS": "cpu",
        "PATH": os.pathsep.join([*cuda_tools()[:1], os.environ.get("PATH", "")]),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at a time
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
