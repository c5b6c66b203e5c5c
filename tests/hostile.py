"""Inputs that are made to do harm, each for the command that reads it, and what may come of them.

A case is a function that writes its files into a `Place` and returns a command line. `tried` runs
it in this process and returns what was wrong: an exception, more than one line, a canary that was
touched, too much time or memory. The cases are in `hostile_runs.py` and `hostile_data.py`.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import os
from pathlib import Path
import re
import shutil
import signal
import sys
import tempfile
import time

from moe.cli import main as cli
from moe.errors import CONTROL

CANARY = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
MOST_SECONDS, MOST_MEGABYTES, MOST_LETTERS = 20, 700, 2100
HANGS_AFTER = 60  # seconds


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a case writes its files.

    Attributes:
        path: a folder of its own.
        sound_run, sound_sweep: folders to copy.
    """

    path: Path
    sound_run: Path
    sound_sweep: Path

    @property
    def out(self) -> Path:
        """The only folder that may change."""
        return self.path / "out"

    def run(self) -> Path:
        """A copy of a run."""
        return shutil.copytree(self.sound_run, self.path / "run")

    def sweep(self) -> Path:
        """A copy of a sweep."""
        return shutil.copytree(self.sound_sweep, self.path / "sweep")

    def write(self, name: str, content: bytes | str) -> Path:
        """A file with this content."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path


@dataclasses.dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        make: writes it, and returns the arguments of `moe`.
        kind: which reader it is for.
        harmless: the command may also end well.
        names: what the message has to name.
    """

    make: Callable[[Place], list[str]]
    kind: str
    harmless: bool = False
    names: str = ""

    @property
    def name(self) -> str:
        return self.make.__name__


CASES: list[Case] = []


def case(kind: str, names: str = "", harmless: bool = False):
    """Add a function to the corpus."""

    def add(make: Callable[[Place], list[str]]) -> Callable[[Place], list[str]]:
        CASES.append(Case(make, kind, harmless, names))
        return make

    return add


def fifo(path: Path) -> None:
    """A pipe that nobody writes to, in place of a file."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def sparse(path: Path) -> Path:
    """A file of a terabyte that takes no room."""
    with path.open("wb") as file:
        file.truncate(2**40)
    return path


def tried(one: Case, place: Place) -> dict:
    """What came of a case: its seconds, megabytes, status, message, and what was wrong."""
    place.path.mkdir(parents=True, exist_ok=True)
    place.write("precious", "mine")
    place.write("evil_module.py", CANARY)
    place.out.mkdir()
    arguments = one.make(place)
    sys.modules.pop("evil_module", None)  # of a test that imports it on purpose
    before, faults = snapshot(place), []
    with limited(), held(place.path.parent) as said, _at(place.path):
        started, base = time.process_time(), _reset_peak()
        try:
            status = cli.main(arguments)
        except BaseException as error:
            status = None
            faults.append(f"{type(error).__name__}: {str(error)[:200]}")
        seconds, megabytes = time.process_time() - started, max(_memory("VmHWM") - base, 0) / 1024
    out, err = (part.decode("utf-8", "replace") for part in said)
    faults += judged(one, status, out, err)
    faults += [f"{name} was changed" for name in changed(before, snapshot(place))]
    if list(place.path.rglob("*.ran")) or "evil_module" in sys.modules:
        faults.append("evil_module was imported")
    sys.modules.pop("evil_module", None)
    if seconds > MOST_SECONDS or megabytes > MOST_MEGABYTES:
        faults.append(f"{seconds:.1f} s, {megabytes:.0f} MB")
    return {
        **{"case": one.name, "kind": one.kind, "status": status, "said": err[-400:]},
        **{"seconds": round(seconds, 2), "megabytes": round(megabytes), "faults": faults},
    }


def judged(one: Case, status: int | None, out: str, err: str) -> list[str]:
    """What is wrong with an exit status and what was printed."""
    faults = []
    lines = [line for line in err.splitlines() if not line.startswith("  ")]
    last = lines[-1] if lines else ""
    if status == 0 and not one.harmless:
        faults.append("it was taken for sound")
    if status not in (0, 1, 2) or (status == 1 and "damaged" not in out):
        faults.append(f"status {status}")
    if status == 2 and (len(lines) != 1 or not last.startswith("moe: error: ")):
        faults.append(f"not one line: {err[:600]!r}")
    if status and one.names and one.names not in out + err:
        faults.append(f"{one.names!r} is not named: {(out + err)[-300:]!r}")
    if CONTROL.search(re.sub(r"\r|\x1b\[\??[0-9;]*[a-zA-Z]\r?", "", out + err)):
        faults.append("control characters are printed")
    if "Traceback" in out + err or "panicked" in err:
        faults.append(f"a traceback: {err[-300:]!r}")
    if len(last) > MOST_LETTERS:
        faults.append(f"a line of {len(last)} letters")
    return faults


def snapshot(place: Place) -> dict[str, tuple[int, int]]:
    """Size and time of all files but those below `out`; what a run may write aside."""
    found = {}
    for path in place.path.rglob("*"):
        inside = path.is_relative_to(place.out)
        if not inside and not path.is_symlink() and path.is_file():
            about = path.stat()
            found[str(path.relative_to(place.path))] = about.st_size, about.st_mtime_ns
    return found


def changed(before: dict, after: dict) -> list[str]:
    """Files that came, went or were written."""
    names = sorted(before.keys() | after.keys())
    kept = [n for n in names if "__pycache__" not in n and not n.endswith(".ran")]
    return [name for name in kept if before.get(name) != after.get(name)]


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """TimeoutError where it takes too long, also while it waits for a file."""

    def over(number: int, frame: object) -> None:
        raise TimeoutError(f"no end after {HANGS_AFTER} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(HANGS_AFTER)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[list[bytes]]:
    """What the process writes to stdout and stderr, whichever language does; set at the end."""
    said: list[bytes] = []
    kept = [os.dup(number) for number in (1, 2)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in kept]
        streams = [open(os.dup(file.fileno()), "w", encoding="utf-8") for file in files]
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            for number, file in enumerate(files, 1):
                os.dup2(file.fileno(), number)
            try:
                yield said
            finally:
                for number, (stream, before) in enumerate(zip(streams, kept, strict=True), 1):
                    with contextlib.suppress(ValueError, OSError):
                        stream.close()
                    os.dup2(before, number)
                    os.close(before)
        for file in files:
            file.seek(0)
            said.append(file.read())


@contextlib.contextmanager
def _at(folder: Path) -> Iterator[None]:
    """The folder as the current one, and Python's path as it was afterwards."""
    before, path = os.getcwd(), sys.path.copy()
    os.chdir(folder / "out")
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path


def _memory(name: str) -> int:
    """A figure of /proc/self/status in KiB; 0 where there is none."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(re.findall(rf"{name}:\s+(\d+)", text)[0])


def _reset_peak() -> int:
    """Forget the highest memory so far; returns what is in use, in KiB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")
