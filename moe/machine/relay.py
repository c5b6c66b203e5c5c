"""A relay between JAX in this process and the coordinator in the run's first one.

When the first process dies, its connections break, and JAX's client ends every other process within
a millisecond, by SIGABRT and a page of C++. Behind the relay the client hears nothing, and we are
told.
"""

from collections.abc import Callable
import contextlib
import socket
import threading
import time

RETRY_SECONDS = 0.2
CONNECT_SECONDS = 300  # as JAX waits for its coordinator


class Relay:
    """Forwards each connection to its `address` on to the coordinator.

    Args:
        host, port: of the coordinator.
        lost: called in a thread where the coordinator closes a connection.
    """

    def __init__(self, host: str, port: int, lost: Callable[[], None]):
        self._there, self._lost = (host, port), lost
        self._open: list[socket.socket] = []  # kept open, or JAX would hear of the end
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            here, _ = self._listening.accept()
            self._open.append(here)
            threading.Thread(target=self._connect, args=[here], daemon=True).start()

    def _connect(self, here: socket.socket) -> None:
        """Connect to the coordinator, which may not be there yet, and forward both ways."""
        end = time.monotonic() + CONNECT_SECONDS
        while time.monotonic() < end:
            try:
                there = socket.create_connection(self._there, timeout=10)
                break
            except OSError:
                time.sleep(RETRY_SECONDS)
        else:
            here.close()
            return
        there.settimeout(None)
        left = threading.Event()  # our own client has closed the connection: no loss

        def outward() -> None:
            _forward(here, there)
            left.set()
            with contextlib.suppress(OSError):
                there.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=outward, daemon=True).start()
        _forward(there, here)
        if not left.is_set():
            self._lost()


def _forward(source: socket.socket, target: socket.socket) -> None:
    """Send on what comes, until one side is closed."""
    with contextlib.suppress(OSError):
        while block := source.recv(2**16):
            target.sendall(block)
