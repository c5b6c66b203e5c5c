"""Loggers get what metrics.jsonl gets; one that fails costs no run."""

import dataclasses
import json
import sqlite3

import pytest

from moe.errors import UserError
from moe.runs.storage.folder import RunFolder
from moe.runs.tracking.loggers import MLflow, WandB
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
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    folder = written(tmp_path, WandB())
    (found,) = folder.path.glob("wandb/offline-run-*/*.wandb")
    assert b"load/dropped" in found.read_bytes()
    with pytest.raises(UserError, match="online"):
        written(tmp_path, WandB(mode="online"))
