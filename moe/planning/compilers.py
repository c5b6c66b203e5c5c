"""Devices that aren't here, as the compilers of TPUs and NVIDIA GPUs describe them."""

from collections.abc import Iterator
import contextlib
from typing import Any

import jax
from jax.experimental import topologies

from moe.errors import first_line
from moe.planning import wheels
from moe.planning.chips import NODE, Topology

# The version of cuDNN that a GPU's program is compiled for.
CUDNN = (9, 24, 0)
# Of the cards of chips.GPUS: streaming multiprocessors, L2 bytes, GHz, compute capability; by the
# descriptions in XLA's sources (xla/backends/gpu/target_config/specs).
_CARDS = {
    "h100": (132, 52428800, 1.98, 9),
    "h200": (132, 52428800, 1.98, 9),
    "b200": (148, 132644864, 1.965, 10),
}
# GpuTargetConfigProto of XLA, as text; limits that Hopper and Blackwell share.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {clock} l2_cache_size: {cache}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }}
  device_address_bits: 64 ecc_enabled: true device_vendor: "NVIDIA Corporation" name: "{kind}"
  platform_version: "Compute Capability {major}.0a"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "{cudnn[0]}.{cudnn[1]}.{cudnn[2]}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
device_description_str: "{kind}"
"""


def described(topology: Topology) -> tuple[list, str | None]:
    """The topology's devices as its compiler describes them, and None.

    Without the compiler: as many stand-ins, and the reason.
    """
    try:
        found = _gpus(topology) if topology.is_gpu else _tpus(topology)
    except Exception as error:  # a missing or failing compiler raises errors of any kind
        return [jax.devices()[0]] * topology.devices, first_line(error)
    return list(found.devices)[: topology.devices], None


def _tpus(topology: Topology):
    more: dict[str, Any] = {} if topology.slices == 1 else {"num_slices": topology.slices}
    if topology.chips == 1:  # otherwise a host has four
        more["chips_per_host_bounds"] = [1, 1, 1]
    return topologies.get_topology_desc(platform="tpu", topology_name=topology.slice_name, **more)


def _gpus(topology: Topology):
    if wheels.hint(gpu=True):  # its own message would be about a plugin
        raise RuntimeError("the CUDA compiler is not installed; bytes are counted")
    nodes = -(-topology.chips // NODE)
    return topologies.get_topology_desc(
        "",
        "cuda",
        target_config=target(topology),
        topology=f"1x{nodes}x{topology.chips // nodes}",
    )


def target(topology: Topology) -> str:
    """XLA's description of the topology's GPU, as text."""
    chip = topology.chip
    cores, cache, clock, major = _CARDS[topology.name.partition(":")[0]]
    return _TARGET.format(
        cores=cores,
        cache=cache,
        clock=clock,
        major=major,
        bandwidth=int(chip.memory_bandwidth),
        memory=int(chip.memory),
        kind=chip.kind,
        cudnn=CUDNN,
    )


@contextlib.contextmanager
def assuming_cudnn() -> Iterator[None]:
    """A context in which JAX finds the cuDNN that programs are compiled for, not this machine's."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    here = fused.check_cudnn_version
    fused.check_cudnn_version = lambda: CUDNN[0] * 10_000 + CUDNN[1] * 100 + CUDNN[2]
    try:
        yield
    finally:
        fused.check_cudnn_version = here
