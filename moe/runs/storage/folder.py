"""A run's folder: its files, its lock, and whether a run may continue in it."""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
from pathlib import Path
import platform
import socket
from typing import Any

from moe.data.tokens.cache import write_atomically
from moe.data.tokens.tokenizer import Tokenizer
from moe.errors import UserError
from moe.runs.storage import manifest
from moe.settings.read import bindings_of


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
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process; UserError where another process holds the lock."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"{self.path} is in use by {holder}; choose another --workdir"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    @property
    def steps(self) -> int | None:
        """`train.steps` of the run in this folder; None where there is no run."""
        if not self.config.exists():
            return None
        steps = bindings_of(self.config.read_text(encoding="utf-8")).get("train.steps")
        return int(steps) if steps and steps.isdecimal() else None

    def refuse_another_run(
        self, config: str, fingerprint: dict[str, Any], steps: int, may_change: tuple[str, ...]
    ) -> None:
        """Raise UserError where the folder holds checkpoints of a run with other settings or data.

        Args:
            config: the config text of the run that is to start.
            fingerprint: `PreparedData.fingerprint` of its text.
            steps: its `train.steps`, which may not be fewer than are trained already.
            may_change: names of settings that may differ.
        """
        if not (self.config.exists() and self.checkpoints.exists()):
            return
        theirs = json.loads(self.run.read_text())["data"] if self.run.exists() else {}
        differs = _differences(self.config.read_text(), config, may_change)
        differs += [
            f"data {name}: {theirs[name]} there, {value} here"
            for name, value in fingerprint.items()
            if name in theirs and theirs[name] != value
        ]
        # By the manifests: a folder's name is not believed.
        trained = [step for p in self.checkpoints.iterdir() if (step := manifest.step_of(p))]
        if trained and max(trained) > steps:
            most = max(trained)
            differs.append(
                f"train.steps: {most} are trained there, {steps} here; give at least {most}"
            )
        if differs:
            raise UserError(
                f"{self.path} holds the checkpoints of another run; choose another --workdir, or "
                "the same settings to continue it. What differs:\n  " + "\n  ".join(differs)
            )

    def complete(self, steps: int, max_seconds: float | None) -> dict[str, Any] | None:
        """The content of summary.json, where the run is complete; None where it is not."""
        if not self.summary.exists():
            return None
        found = json.loads(self.summary.read_text())
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
        self.write_json(self.run, run)
        write_atomically(self.config, config.encode())
        write_atomically(self.settings, (settings + "\n").encode())
        tokenizer.save(self.tokenizer)
        self._cut_metrics(step)
        if self.summary.exists():
            ended = json.loads(self.summary.read_text(encoding="utf-8"))["step"]
            self.summary.rename(self.path / f"summary-{ended}.json")

    def write_json(self, path: Path, content: Any) -> None:
        """Write a JSON file; other processes see all of it or nothing."""
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())

    def _cut_metrics(self, step: int) -> None:
        for path in (self.metrics, self.routing):
            if path.exists():
                lines = path.read_text().splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and _step(line) <= step]
                write_atomically(path, "".join(kept).encode())


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut off by a crash
        return 2**62


def _differences(theirs: str, ours: str, may_change: tuple[str, ...]) -> list[str]:
    """A line for each setting that two config texts have otherwise, those aside that may change."""
    old, new = bindings_of(theirs), bindings_of(ours)
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
