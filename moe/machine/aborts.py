"""C++ that gives up because another process is gone: we are asked before this process aborts.

Gloo throws where nobody catches, in a thread of its own, when a connection breaks at a bad moment,
and JAX's client aborts; either would end the process by SIGABRT.
"""

from collections.abc import Callable
import ctypes
import signal
import sys

_kept: list[object] = []  # C holds pointers to them


def ask_first(failed: Callable[[], None]) -> None:
    """Call `failed` in the thread that gives up; where it returns, the process aborts as usual."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)

    def on_terminate() -> None:
        failed()
        libc.signal(signal.SIGABRT, None)
        libc.abort()

    def on_abort(number: int) -> None:
        failed()  # after it, abort() goes on

    terminate = ctypes.CFUNCTYPE(None)(on_terminate)
    abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    _kept.extend((terminate, abort))
    libc.signal(signal.SIGABRT, abort)
    try:
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):  # another C++ library, which prints two lines more
        return
    set_terminate(terminate)
