"""A run's folder: its files, its lock, and whether a run may continue in it."""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
from pathlib import Path
import platform
import socket
import time
from typing import IO, Any

from moe import received
from moe.data.tokens.sealed import write_atomically
from moe.data.tokens.tokenizer import Tokenizer, load_tokenizer
from moe.errors import UserError
from moe.runs.storage import manifest
from moe.runs.storage.json_files import write_json
from moe.settings.read import bindings_of, defaults_of

MOVE_AWAY = "move it away, or choose another --workdir"


class AnotherRun(UserError):
    """A folder holds the checkpoints of a run with other settings or data."""


class RunFolder:
    """The paths of a run's files, and the checks before it starts."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.gin"
        self.settings = self.path / "settings.txt"
        self.run = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.routing = self.path / "routing.jsonl"
        self.summary = self.path / "summary.json"
        self.documents = self.path / "documents.jsonl"
        self.samples = self.path / "samples.txt"
        self.picture = self.path / "picture.png"
        self.tensorboard = self.path / "tensorboard"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"

    @contextlib.contextmanager
    def locked(self, way_out: str = "choose another --workdir") -> Iterator[None]:
        """Lock the folder for this process; UserError where another process holds the lock."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._refuse_links()
        with open(self.path / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(file)
                raise UserError(f"{self.path} is in use by {holder}; {way_out}") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def _refuse_links(self) -> None:
        """Raise UserError where writing the folder's files would change, or wait for, others."""
        inside, folders = self.path.resolve(), (self.path, self.tensorboard, self.tokenizer)
        for folder in (*folders, self.checkpoints):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.is_symlink() and not path.resolve().is_relative_to(inside):
                    raise UserError(
                        f"{path} is a link to {os.readlink(path)}, outside of the run's folder, "
                        "and would be written through; put the folder itself where there is room"
                    )
                if not (path.is_file() or path.is_dir() or path.is_symlink()):
                    raise UserError(
                        f"{path} is a pipe, a socket or a device, which nothing of a run is; "
                        f"{MOVE_AWAY}"
                    )

    def config_text(self) -> str:
        """The text of config.gin; UserError where it can't be read."""
        return _text_of(self.config)

    def own_tokenizer(self) -> Tokenizer:
        """The run's tokenizer; UserError where it isn't the one that run.json records."""
        tokenizer = load_tokenizer(self.tokenizer)
        run = self.read_json(self.run) if self.run.exists() else None
        recorded = run.get("tokenizer") if isinstance(run, dict) else None
        if recorded not in (None, tokenizer.fingerprint):
            raise UserError(
                f"{self.tokenizer} is not the tokenizer that {self.run.name} records: one of them "
                "was altered, and bits per byte would be wrong; put the run's own back"
            )
        return tokenizer

    @property
    def steps(self) -> int | None:
        """`train.steps` of the run in this folder; None where there is no run."""
        if not self.config.exists():
            return None
        steps = _bindings(self.config, self.config_text()).get("train.steps")
        return int(steps) if steps and steps.isdecimal() else None

    def refuse_another_run(
        self, config: str, fingerprint: dict[str, Any], steps: int, may_change: tuple[str, ...]
    ) -> None:
        """Raise AnotherRun where the folder holds checkpoints of other settings or data.

        Args:
            config: the config text of the run that is to start.
            fingerprint: `PreparedData.fingerprint` of its text.
            steps: its `train.steps`, which may not be fewer than are trained already.
            may_change: names of settings that may differ.
        """
        there = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        saved = [path for path in there if path.name.isdecimal()]
        if saved and not self.config.exists():
            raise UserError(
                f"{self.path} holds checkpoints and no config.gin, so that nothing says whether "
                f"they are of this run; put its config.gin back, or {MOVE_AWAY}"
            )
        if not self.config.exists():
            return
        aside = any(self.path.glob("damaged-checkpoint-*"))
        logged = self.metrics.exists() and self.metrics.stat().st_size > 0
        if not (saved or aside or logged):  # interrupted before it had anything to lose
            return
        theirs = self.read_json(self.run, data=dict)["data"] if self.run.exists() else {}
        old = _bindings(self.config, self.config_text())
        # An option that came after the run began is at its default as if it were not there.
        later = defaults_of(config) - old.keys()
        new = {name: value for name, value in bindings_of(config).items() if name not in later}
        differs = _differences(old, new, may_change)
        differs += [
            f"data {name}: {theirs[name]} there, {value} here"
            for name, value in fingerprint.items()
            if name in theirs and theirs[name] != value
        ]
        # By the manifests: a folder's name is not believed.
        trained = [step for p in saved if (step := manifest.step_of(p))]
        if trained and max(trained) > steps:
            most = max(trained)
            differs.append(
                f"train.steps: {most} are trained there, {steps} here; give at least {most}"
            )
        if differs:
            what = "the checkpoints of another run" if saved else "another run"
            raise AnotherRun(
                f"{self.path} holds {what}; choose another --workdir, or "
                "the same settings to continue it. What differs:\n  " + "\n  ".join(differs)
            )

    def complete(self, steps: int, max_seconds: float | None) -> dict[str, Any] | None:
        """The content of summary.json, where the run is complete; None where it is not."""
        if not self.summary.exists():
            return None
        found = self.read_json(self.summary, step=int, train_seconds=(int, float))
        over = max_seconds is not None and found["train_seconds"] > max_seconds
        saved = (self.checkpoints / str(found["step"])).is_dir()
        return found if saved and (found["step"] == steps or over) else None

    def begin(
        self, config: str, settings: str, run: dict[str, Any], tokenizer: Tokenizer, step: int
    ) -> None:
        """Write the run's description, and delete what was logged after the step it starts from.

        A summary from an earlier end of the run becomes summary-STEP.json.

        Args:
            config: the config text that repeats the run.
            settings: every setting in force, to be read by people.
            run: the content of run.json.
            tokenizer: saved with the run.
            step: steps that are trained already.
        """
        write_json(self.run, run)
        write_atomically(self.config, config.encode())
        write_atomically(self.settings, (settings + "\n").encode())
        tokenizer.save(self.tokenizer)
        self.cut_logs(step)
        if self.summary.exists():
            ended = self.read_json(self.summary, step=int)["step"]
            self.summary.rename(self.path / f"summary-{ended}.json")

    def read_json(self, path: Path, **fields: type | tuple[type, ...]) -> dict[str, Any]:
        """The content of one of the folder's JSON files.

        Args:
            path: the file.
            fields: those that it must have, with their types.

        Raises:
            UserError: it is no JSON object, or a field is missing or of another type.
        """
        text = _text_of(path)
        try:
            found = received.parsed(text, str(path))
        except UserError:
            raise UserError(f"{path} is damaged: no JSON; {MOVE_AWAY}") from None
        for name, kind in fields.items():
            value = found.get(name) if isinstance(found, dict) else None
            if isinstance(value, bool) or not isinstance(value, kind):
                raise UserError(f"{path} is damaged: {name!r} is missing or no value; {MOVE_AWAY}")
        return found

    def cut_logs(self, step: int) -> None:
        """Delete the lines of metrics.jsonl and routing.jsonl after a step, and damaged ones."""
        for path in (self.metrics, self.routing):
            if path.exists():
                with received.opened(path) as file:
                    kept = [line for line in _lines(file) if _step(line) <= step]
                write_atomically(path, b"".join(kept))


def _holder(file: IO[str]) -> str:
    """Who holds a lock, as it says there; it may have taken it just now and be about to say so."""
    for _ in range(10):
        file.seek(0)
        if name := file.read().strip():
            return name
        time.sleep(0.1)
    return "another process"


def _text_of(path: Path) -> str:
    """The text of a small file of the run's folder."""
    try:
        return received.read(path).decode("utf-8")
    except UserError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path} is damaged: {why}; {MOVE_AWAY}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: no text in UTF-8; {MOVE_AWAY}") from None


def _bindings(path: Path, text: str) -> dict[str, str]:
    try:
        return bindings_of(text)
    except UserError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged: line {first.lstrip(':')}; {MOVE_AWAY}") from None


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The whole lines of a log, those aside that are longer than received.MOST_BYTES."""
    whole = True
    while line := file.readline(received.MOST_BYTES):
        ends = line.endswith(b"\n")
        if whole and ends:
            yield line
        whole = ends


def _step(line: bytes) -> int:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):  # cut off by a crash, or damaged
        return 2**62
    return step if isinstance(step, int) else 2**62


def _differences(
    old: dict[str, str], new: dict[str, str], may_change: tuple[str, ...]
) -> list[str]:
    """A line for each setting that two configs have otherwise, those aside that may change."""
    return [
        f"{name}: {old.get(name, 'not set')} there, {new.get(name, 'not set')} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.endswith(may_change)
    ]


def versions() -> dict[str, str]:
    """Versions of Python and the libraries, and the machine's architecture."""
    import importlib.metadata as metadata

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
    found = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}
