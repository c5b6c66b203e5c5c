"""This machine's devices, memory and matmul speed, measured rather than looked up."""

import os
from pathlib import Path
import platform
import resource
import statistics
import time

import jax
import jax.numpy as jnp


def matmul_peak(dtype: str = "float32", seconds: float = 0.5) -> float:
    """FLOP/s of a large square matmul on all devices, from the median of repeated runs on one.

    Of random numbers: a GPU multiplies ones faster than it will ever multiply data.
    Virtual CPU devices share one processor, so that one device's figure is already the machine's.
    seconds: how long to measure.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    one = 2 * size**3 / statistics.median(times)
    return one if jax.default_backend() == "cpu" else one * jax.device_count()


def peak_memory_bytes() -> int:
    """Peak memory in use so far: on the fullest device, or of this process on CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    used = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if used:
        return max(used)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_bytes() -> int | None:
    """Memory of all local devices together, or of this machine on CPU; None where it is unknown."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    limits = [s["bytes_limit"] for s in stats if s and "bytes_limit" in s]
    if limits:
        return sum(limits)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def describe_device() -> str:
    """The devices in a few words: "1 x NVIDIA H100", or "1 x cpu (AMD EPYC, 2 cores)"."""
    devices = jax.devices()
    name = f"{len(devices)} x {devices[0].device_kind}"
    if devices[0].platform != "cpu":
        return name
    return f"{name} ({_processor()}, {os.cpu_count()} cores)"


def _processor() -> str:
    """The processor's name on Linux, elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
