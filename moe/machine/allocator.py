"""Settings of the C library's allocator for XLA's CPU backend."""

import ctypes

# Options of mallopt, from <malloc.h>.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8


def keep_freed_memory() -> None:
    """Let glibc keep what XLA frees, instead of asking the kernel for new pages every step.

    It saves a third of the time of a feed-forward's gradient (benchmarks/results/linear.json).
    There is only one arena, since others hold no block above 64 MiB; so this must be called before
    JAX first uses a device, whose threads would get arenas of their own. Without glibc, or on
    accelerators, it changes nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(ARENA_MAX, 1)
    # Larger blocks are returned when freed: kept, they would leave large holes in the heap.
    mallopt(MMAP_THRESHOLD, 2**30)
    mallopt(TRIM_THRESHOLD, -1)  # never
    mallopt(TOP_PAD, 2**28)
