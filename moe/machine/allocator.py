"""The C library's allocator, set up for XLA's CPU backend."""

import ctypes

# Options of mallopt, from <malloc.h>.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8


def keep_freed_memory() -> None:
    """Let glibc keep what XLA frees, instead of asking the kernel for new pages every step.

    Worth a third of a feed-forward's gradient (benchmarks/results/linear.json). One arena, since
    the others hold no block above 64 MiB: it has to come before JAX's first use of a device, whose
    threads would have arenas of their own. Without glibc, or on accelerators, it changes nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(ARENA_MAX, 1)
    # Larger blocks go back when freed: kept, they leave holes as large in the heap.
    mallopt(MMAP_THRESHOLD, 2**30)
    mallopt(TRIM_THRESHOLD, -1)  # never
    mallopt(TOP_PAD, 2**28)
