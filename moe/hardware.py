"""What this machine is and what it can do: measured, not looked up."""

import resource
import statistics
import time

import jax
import jax.numpy as jnp


def matmul_peak(dtype: str = "float32", seconds: float = 0.5) -> float:
    """FLOP/s of a large square matmul: the median of repeated runs on one device.

    Accelerators get a larger matrix; virtual CPU devices share one machine, so that one device's
    figure is the machine's.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
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
    """The most memory in use so far: on the fullest device, or of this process on CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    used = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if used:
        return max(used)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_device() -> str:
    """Such as "8 x TFRT_CPU" or "1 x NVIDIA H100"."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"
