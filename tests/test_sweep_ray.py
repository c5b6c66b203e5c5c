"""`moe sweep --ray` on a cluster of two nodes, one of which is lost while a trial runs."""

import json
import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster
from tiny import BASE, corpus, environment

from moe.cli import main as cli
from moe.sweeps.record import SweepFolder

SWEEP = """
sweep.question = 'Which is better?'
sweep.base = ({base!r}, 'train.steps = 60', 'train.save_every = 5')
sweep.arms = {{'two': (), 'one': ('TopK.k = 1',)}}
sweep.baseline = 'two'
sweep.seeds = 2
sweep.match = None
sweep.controls = ()
"""


# Ray forks to start its nodes, and the forked process is another program at once.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")


@pytest.fixture
def cluster(monkeypatch):
    for name, value in environment().items():  # nodes inherit it, and trials theirs
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray gives its workers a niceness of 15: beside another busy test they would get no time.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    found = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.mark.thorough
def test_a_sweep_on_two_nodes_of_which_one_is_lost(cluster, tmp_path, capsys):
    text = corpus(tmp_path / "text")
    base = tmp_path / "base.gin"
    base.write_text(BASE + f"TextFiles.paths = {str(text)!r}\nTextData.validation_fraction = 0.3\n")
    (tmp_path / "ours.gin").write_text(SWEEP.format(base=str(base)))
    second = cluster.add_node(num_cpus=1)
    folder = SweepFolder(tmp_path / "ours")

    def lose():  # once each node trains; checkpoints come and go, and may never be there together
        while len(list(folder.path.glob("trials/*/*/run/metrics.jsonl"))) < 2:
            time.sleep(0.1)
        cluster.remove_node(second, allow_graceful=False)

    losing = threading.Thread(target=lose, daemon=True)
    losing.start()
    command = [f"--gin_file={tmp_path / 'ours.gin'}", f"--folder={folder.path}", "--run"]
    assert cli.main(["sweep", *command, f"--ray={cluster.address}"]) == 0
    losing.join()
    said = capsys.readouterr().out
    assert "with 2 at a time" in said and "4/4 " in said
    rows = [json.loads(line) for line in folder.trials.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["finished"] * 4


def test_a_cluster_that_does_not_answer_is_one_line(capsys):
    command = ["--gin_file=sweeps/capacity.gin", "--folder=x", "--ray=127.0.0.1:1"]
    assert cli.main(["sweep", *command]) == 2
    assert "--ray=127.0.0.1:1: no cluster answers" in capsys.readouterr().err
