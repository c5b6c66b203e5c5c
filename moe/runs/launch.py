"""A run in several processes of this machine, started again from its last checkpoint."""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from moe.machine import exits
from moe.runs.guard import newest_step, saved
from moe.runs.storage.folder import RunFolder

POLL_SECONDS = 0.1
GRACE_SECONDS = 3  # for the others, once one has ended badly: they can't go on, nor save
END_SECONDS = 120  # for the others, once one has ended well or was interrupted
HOLD_SECONDS = 1  # for lines of the others, until process 0 may have said the same
NOISE = "[Gloo]"

# From the address of the first process and an index to a command.
Commands = Callable[[str, int], list[str]]


class Output:
    """Prints what process 0 says, and what the others say beside that, with their index."""

    def __init__(self):
        self._lines = queue.SimpleQueue()
        self._held: list[tuple[float, int, str, Any]] = []
        self._said: set[str] = set()

    def read(self, process: int, source: Any, target: Any) -> threading.Thread:
        """Take lines from a pipe until its end, in a thread."""

        def work() -> None:
            with source:
                for line in source:
                    self._lines.put((process, line.rstrip("\n"), target))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def show(self, hold: float = HOLD_SECONDS) -> None:
        """Print the lines that have come; those of the others after `hold` seconds."""
        now = time.monotonic()
        with contextlib.suppress(queue.Empty):
            while True:
                process, line, target = self._lines.get_nowait()
                if line.startswith(NOISE):
                    continue
                if process == 0:
                    self._said.add(line)
                    print(line, file=target, flush=True)
                else:
                    self._held.append((now, process, line, target))
        due = [held for held in self._held if now - held[0] >= hold]
        self._held = self._held[len(due) :]
        for _, process, line, target in due:
            if line not in self._said:
                self._said.add(line)
                print(f"[{process}] {line}", file=target, flush=True)


class Attempt:
    """Processes that train together until the first one ends.

    Args:
        commands: makes each process's command.
        count: how many processes.
        signals: numbers of signals that came, which are passed on.
    """

    def __init__(self, commands: Commands, count: int, signals: list[int]):
        self._count, self._signals, self._passed = count, signals, len(signals)
        self._output, address = Output(), f"127.0.0.1:{_free_port()}"
        self._children = [_start(commands(address, i)) for i in range(count)]
        self._readers = []
        for i, child in enumerate(self._children):
            assert child.stdout is not None and child.stderr is not None
            self._readers.append(self._output.read(i, child.stdout, sys.stdout))
            self._readers.append(self._output.read(i, child.stderr, sys.stderr))

    def run(self) -> dict[int, int]:
        """Exit statuses by process, of those that have ended by themselves."""
        limit, ended = None, {}
        try:
            while len(ended) < self._count and (limit is None or time.monotonic() < limit):
                time.sleep(POLL_SECONDS)
                self._output.show()
                self._pass_signals()
                ended = {
                    i: code for i, c in enumerate(self._children) if (code := c.poll()) is not None
                }
                if ended and limit is None:
                    bad = any(code and not interrupted(code) for code in ended.values())
                    limit = time.monotonic() + (GRACE_SECONDS if bad else END_SECONDS)
        finally:
            for child in self._children:
                child.kill()
                child.wait()
        for reader in self._readers:
            reader.join(HOLD_SECONDS)
        self._output.show(hold=0)
        return ended

    def _pass_signals(self) -> None:
        while self._passed < len(self._signals):
            for child in self._children:
                child.send_signal(self._signals[self._passed])
            self._passed += 1


def launch(
    commands: Commands,
    count: int,
    folder: RunFolder,
    restarts: int,
    say: Callable[[str], None],
) -> int:
    """Run the processes until the run ends, and start them again where one of them dies.

    Args:
        commands: makes each process's command.
        count: how many processes.
        folder: of the run.
        restarts: how often, at most, without a new checkpoint in between.
        say: is told what happened.

    Returns:
        The exit status: 0; that of a user's mistake or a signal; or NO_PROGRESS.
    """
    failures = 0
    with _remembered() as signals:
        while True:
            before = newest_step(folder)
            ended = Attempt(commands, count, signals).run()
            process = min(ended, key=lambda i: _rank(ended[i]))
            code = ended[process]
            if not code and len(ended) == count:
                return 0
            if signals or interrupted(code):
                number = signals[0] if signals else abs(code) % 128
                return exits.of_signal(number)
            if code == exits.MISTAKE:
                return code
            failures = 0 if newest_step(folder) != before else failures
            what = f"process {process} of {count} {_how(code)}; {saved(folder)}"
            if failures == restarts:
                say(
                    f"{what}; {restarts} restarts have saved nothing new: mend the cause, and the "
                    "same command goes on"
                )
                return exits.NO_PROGRESS
            failures += 1
            say(f"{what}; starting again, restart {failures} of at most {restarts} without a save")


def interrupted(code: int) -> bool:
    """Whether an exit status is that of SIGINT or SIGTERM."""
    numbers = signal.SIGINT, signal.SIGTERM
    return code in (*(-n for n in numbers), *(exits.of_signal(n) for n in numbers))


def _rank(code: int) -> int:
    """Less for an exit status that is nearer to the cause."""
    if code == exits.MISTAKE:
        return 0
    if interrupted(code):
        return 2
    order = {exits.HUNG: 3, exits.PEER_LOST: 4, 0: 5}
    return order.get(code, 1)


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    words = {
        exits.HUNG: " (it hung)",
        exits.PEER_LOST: " (another was lost)",
        exits.CORRUPTED: " (a device is at fault)",
    }
    return f"ended with status {code}{words.get(code, '')}"


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _start(command: list[str]) -> subprocess.Popen:
    """A process in a session of its own: a terminal's signals reach the launcher alone."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        preexec_fn=_ends_with_parent if sys.platform == "linux" else None,
    )


def _ends_with_parent() -> None:
    """Have Linux send SIGTERM to this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def _remembered() -> Iterator[list[int]]:
    """A list of the signals that come during the block."""
    came: list[int] = []
    old = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
