"""Loggers get what metrics.jsonl gets; one that fails costs no run."""

import dataclasses
import json
import resource
import sqlite3
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from moe.errors import UserError
from moe.runs.storage.folder import RunFolder
from moe.runs.tracking.loggers import MLflow, TensorBoard, WandB, Writers
from moe.runs.tracking.logs import Logs

STEPS = {1: {"loss": 2.0, "load/dropped": 0.25}, 2: {"loss": 1.0, "load/dropped": 0.5}}


@dataclasses.dataclass
class Kept:
    """A logger of one's own; `most` numbers, then it fails."""

    most: int = 100
    seen: list = dataclasses.field(default_factory=list)

    def open(self, folder, run):
        self.seen.append((folder.name, run["seed"]))
        return self

    def scalars(self, step, values):
        if len(self.seen) > self.most:
            raise ConnectionError("no route to host\nand more")
        self.seen.append((step, dict(values)))

    def close(self):
        self.seen.append("closed")


def written(tmp_path, *loggers, say=print):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir(exist_ok=True)
    logs = Logs(folder, loggers, {"seed": 3}, say)
    for step, values in STEPS.items():
        logs.scalars(step, values)
    logs.close()
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert lines[-2:] == [{"step": step, **values} for step, values in STEPS.items()]
    return folder


def test_a_logger_of_ones_own_gets_what_metrics_jsonl_gets(tmp_path):
    kept = Kept()
    written(tmp_path, kept)
    assert kept.seen == [("run", 3), *STEPS.items(), "closed"]


def events(path):
    """The events of a file of TensorBoard's: each has its length and two checksums around it."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16


def test_tensorboard_has_each_number_at_once(tmp_path):
    writer = TensorBoard().open(tmp_path, {})
    for step, values in STEPS.items():
        writer.scalars(step, values)
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert "tfevents" in path.name
    version, *found = events(path)
    assert version.file_version == "brain.Event:2"
    assert {e.step: {v.tag: v.simple_value for v in e.summary.value} for e in found} == STEPS
    writer.close()


@pytest.mark.filterwarnings("ignore:unclosed file")  # it gets no more numbers
def test_a_full_disk_costs_the_curves_alone(tmp_path):
    """A file that may not grow stands for it; what came after used to wait for ever."""
    said = []
    writers = Writers({"TensorBoard()": TensorBoard().open(tmp_path, {})}, said.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        for step in range(200):
            writers.scalars(step, {f"load/{i}": 1.0 for i in range(20)})
        writers.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(said) == 1 and "File too large" in said[0]


def test_a_logger_that_fails_is_told_of_once_and_the_run_goes_on(tmp_path):
    said, kept, other = [], Kept(most=1), Kept()
    written(tmp_path, kept, other, say=said.append)
    assert kept.seen == [("run", 3), (1, STEPS[1])] and other.seen[-1] == "closed"
    assert len(said) == 1 and "no route to host" in said[0] and "and more" not in said[0]


@pytest.mark.parametrize(("logger", "extra"), [(WandB(), "wandb"), (MLflow(), "mlflow")])
def test_a_missing_package_is_named_with_its_extra(logger, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, extra, None)
    with pytest.raises(UserError, match=rf"moe-routing\[{extra}\]"):
        written(tmp_path, logger)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # what these packages say of each other
def test_mlflow_has_every_number_and_a_second_start_goes_on(tmp_path):
    for _ in range(2):
        folder = written(tmp_path, MLflow())
    with sqlite3.connect(folder.path / "mlflow.db") as base:
        assert base.execute("select count(*) from runs").fetchone() == (1,)
        query = "select value from metrics where key = 'loss' and step = 2"
        assert base.execute(query).fetchall()[0] == (1.0,)
        assert base.execute("select value from params where key = 'seed'").fetchone() == ("3",)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # what these packages say of each other
def test_wandb_writes_offline_without_an_account(tmp_path, monkeypatch):
    import wandb

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    folder = written(tmp_path, WandB())
    wandb.teardown()  # as at a process's end: its service writes the file, and may still be at it
    (found,) = folder.path.glob("wandb/offline-run-*/*.wandb")
    assert b"load/dropped" in found.read_bytes()
    with pytest.raises(UserError, match="online"):
        written(tmp_path, WandB(mode="online"))
