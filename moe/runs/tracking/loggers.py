"""Loggers beside a run's own files: TensorBoard, Weights & Biases, MLflow, or a user's class.

A logger gets the numbers of metrics.jsonl, from the first process alone. One that fails is named
once and gets no more numbers: no run ends for it.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
from pathlib import Path
import secrets
import socket
import struct
import time
from typing import Any, Literal

import gin

from moe.errors import UserError, first_line
from moe.training.logger import Scalars, Writer


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """Curves in the run's folder tensorboard/; every run has them."""

    def open(self, folder: Path, run: dict[str, Any]) -> Writer:
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        inside = folder / "tensorboard"
        inside.mkdir(exist_ok=True)
        # Of two starts in a second, each has its file.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        events = Events(inside / name)
        new_event: Any = vars(event_pb2)["Event"]  # protobuf makes its classes on import
        events.write(new_event(wall_time=time.time(), file_version="brain.Event:2"))

        def scalars(step: int, values: Scalars) -> None:
            event = new_event(wall_time=time.time(), step=step)
            for name, value in values.items():
                event.summary.MergeFrom(scalar(name, value))
            events.write(event)

        return _Writer(scalars, events.close)


class Events:
    """A file of TensorBoard's events, each with its length before it and two checksums.

    tensorboardX's own writer has a thread and a queue: once the thread has met a full disk, the
    queue fills up and the run waits for it for ever. Nothing is buffered here, so that nothing is
    left to write when that fails.
    """

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=0)

    def write(self, event: Any) -> None:
        """Append a record. Raises OSError where it can't be written whole."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        record = length + _checksum(length) + data + _checksum(data)
        while record:
            record = record[self._file.write(record) :]

    def close(self) -> None:
        self._file.close()


def _checksum(data: bytes) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    return struct.pack("<I", masked_crc32c(data))


@gin.configurable
@dataclasses.dataclass(frozen=True)
class WandB:
    """Weights & Biases. Needs the extra `wandb`.

    Attributes:
        project: where the run is listed.
        entity: user or team; the account's own where None.
        name: of the run; the folder's where None.
        mode: "offline" writes to the run's folder, and `wandb sync` uploads it; "online" needs an
            account.
    """

    project: str = "moe"
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline"] = "offline"

    def open(self, folder: Path, run: dict[str, Any]) -> Writer:
        wandb = _imported("wandb", "wandb")
        try:
            made = wandb.init(
                project=self.project,
                entity=self.entity,
                name=self.name or folder.resolve().name,
                id=_identity(folder / ".wandb_run", lambda: secrets.token_hex(4)),
                resume="allow" if self.mode == "online" else None,
                mode=self.mode,
                dir=str(folder),
                config=run,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(f"WandB.mode={self.mode!r}: {error}") from error
        return _Writer(lambda step, values: made.log(dict(values), step=step), made.finish)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class MLflow:
    """MLflow. Needs the extra `mlflow`.

    Attributes:
        experiment: where the run is listed.
        name: of the run; the folder's where None.
        uri: of a tracking server or database; a database in the run's folder where None.
    """

    experiment: str = "moe"
    name: str | None = None
    uri: str | None = None

    def open(self, folder: Path, run: dict[str, Any]) -> Writer:
        mlflow = _imported("mlflow", "mlflow")
        import logging

        logging.getLogger("mlflow").setLevel(
            logging.ERROR
        )  # else it lists the tables that it makes
        home = folder.resolve()
        client = mlflow.MlflowClient(self.uri or f"sqlite:///{home / 'mlflow.db'}")
        try:
            known = client.get_experiment_by_name(self.experiment)
            artifacts = None if self.uri else (home / "mlflow").as_uri()
            experiment = (
                known.experiment_id
                if known
                else client.create_experiment(self.experiment, artifacts)
            )

            def new_run() -> str:
                made = client.create_run(experiment, run_name=self.name or home.name)
                for name, value in run.items():
                    client.log_param(made.info.run_id, name, str(value)[:500])
                return made.info.run_id

            run_id = _identity(home / ".mlflow_run", new_run)
        except mlflow.exceptions.MlflowException as error:
            raise UserError(f"MLflow.uri={self.uri!r}: {error}") from error

        def scalars(step, values):
            batch = [mlflow.entities.Metric(n, v, 0, step) for n, v in values.items()]
            client.log_batch(run_id, metrics=batch)

        return _Writer(scalars, lambda: client.set_terminated(run_id))


class _Writer:
    """A writer made of two functions."""

    def __init__(self, scalars: Callable[[int, Scalars], None], close: Callable[[], Any]):
        self._scalars, self._close = scalars, close

    def scalars(self, step: int, values: Scalars) -> None:
        self._scalars(step, values)

    def close(self) -> None:
        self._close()


class Writers:
    """The writers of a run; one that fails is named, and gets no more numbers."""

    def __init__(self, writers: Mapping[str, Writer], say: Callable[[str], None]):
        self._writers, self._say = dict(writers), say

    def scalars(self, step: int, values: Scalars) -> None:
        for name in list(self._writers):
            self._guarded(name, lambda writer: writer.scalars(step, values))

    def close(self) -> None:
        for name in list(self._writers):
            self._guarded(name, lambda writer: writer.close())

    def _guarded(self, name: str, call: Callable[[Writer], None]) -> None:
        try:
            call(self._writers[name])
        except Exception as error:  # errors of a service or of another package
            first = first_line(error)[:160]
            self._say(f"{name} has failed and gets no more numbers ({first}); the run goes on")
            del self._writers[name]


def _imported(module: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"this logger needs a package that is not installed: pip install 'moe-routing[{extra}]'"
        ) from None


def _identity(path: Path, make: Callable[[], str]) -> str:
    """The run's id in a service, from `path`, where the run's first start has written it."""
    if not path.exists():
        path.write_text(make(), encoding="utf-8")
    return path.read_text(encoding="utf-8")
