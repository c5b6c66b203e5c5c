"""Hash tables that are made from the training text or from embeddings, through a whole run."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import Runs, quick

from moe.cli import config
from moe.cli import main as cli
from moe.runs.restore import restore_run
from routing import Hash, Sizes, TrainingText, initialize
from routing.solvers.hash_tables import ClusteredTable, DispersedTable, RandomTable, emptiest_first

BALANCED = ("MoELayer.router = @Hash", "Hash.table = @BalancedTable()", "train.steps = 2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("hashes"))


@pytest.mark.thorough
def test_a_table_from_the_text_is_trained_with_saved_and_evaluated(runs, capsys):
    folder = runs.done("balanced", *BALANCED)
    with quick():
        restored = restore_run(str(folder), config.of_folder(str(folder)))
    (table_LV,) = restored.router_state.values()
    tokens = restored.spec.prepare_data(lambda line: None).train.token_N
    count_V = np.bincount(tokens, minlength=table_LV.shape[1])
    expected_V = emptiest_first(count_V, 4)
    np.testing.assert_array_equal(table_LV, np.stack([expected_V] * 2))
    load_E = np.bincount(expected_V, count_V, 4)
    random_V = np.asarray(RandomTable()(jax.random.key(0), Sizes(8, 4, len(count_V))))
    random_E = np.bincount(random_V, count_V, 4)
    assert load_E.max() / load_E.mean() < random_E.max() / random_E.mean()
    with quick():
        assert cli.main(["eval", f"--workdir={folder}", f"--json={folder / 'eval.json'}"]) == 0
    assert json.loads((folder / "eval.json").read_text())["bits_per_byte"] > 0
    capsys.readouterr()


@pytest.mark.thorough
def test_embeddings_of_a_run_make_clusters(runs, monkeypatch, capsys):
    folder = runs.done("balanced", *BALANCED)
    monkeypatch.chdir(runs.folder)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import export_embeddings

    with quick():
        export_embeddings.main(str(folder), "embeddings.npy")
    embedding_VD = np.load("embeddings.npy")
    assert embedding_VD.shape[1] == 16
    sizes = Sizes(8, 4, len(embedding_VD))
    cluster_V = ClusteredTable("embeddings.npy")(jax.random.key(0), sizes)
    again_V = ClusteredTable("embeddings.npy")(jax.random.key(1), sizes)
    np.testing.assert_array_equal(cluster_V, again_V)
    spread_V = DispersedTable("embeddings.npy")(jax.random.key(0), sizes)
    assert set(cluster_V) <= set(range(4))
    for cluster in range(4):
        counts = np.bincount(spread_V[cluster_V == cluster], minlength=4)
        assert counts.max() - counts.min() <= 1
    assert "tokens of width 16" in capsys.readouterr().out


def test_clusters_are_those_of_the_embeddings(tmp_path):
    """Four far points with some noise are four clusters, whatever their numbers."""
    random = np.random.default_rng(0)
    kind_V = random.integers(0, 4, 40)
    points_VD = 10 * np.eye(4)[kind_V] + 0.1 * random.standard_normal((40, 4))
    path = tmp_path / "points.npy"
    np.save(path, points_VD)
    cluster_V = ClusteredTable(str(path))(jax.random.key(0), Sizes(4, 4, 40))
    pairs = set(zip(kind_V.tolist(), cluster_V.tolist(), strict=True))
    assert len(pairs) == 4


def test_what_follows_most_often():
    """0 1 0 1 0 2: after 0 comes 1 twice and 2 once, after 1 always 0, after 2 nothing."""
    text = TrainingText(np.array([0, 1, 0, 1, 0, 2]), 4)
    np.testing.assert_array_equal(text.count_V, [3, 2, 1, 0])
    np.testing.assert_array_equal(text.next_V, [1, 0, 0, 0])


def test_without_text_or_file_there_is_a_line(runs, capsys):
    with pytest.raises(ValueError, match=r"Hash\.key='predicted' is made from the training text"):
        initialize(Hash(Sizes(4, 4, 9), key="predicted"), 0)
    with pytest.raises(ValueError, match=r"Hash\.key='tokens': one of token, previous"):
        Hash(Sizes(4, 4, 9), key="tokens")
    bindings = ("MoELayer.router = @Hash", "Hash.table = @ClusteredTable()", "train.steps = 2")
    missing = "ClusteredTable.embeddings = 'nowhere.npy'"
    assert runs("clustered", *bindings, missing) == 2
    said = capsys.readouterr().err
    assert "embeddings='nowhere.npy' is no file; scripts/export_embeddings.py" in said
    np.save(runs.folder / "few.npy", np.zeros((3, 4)))
    few = f"ClusteredTable.embeddings = {str(runs.folder / 'few.npy')!r}"
    assert runs("clustered", *bindings, few) == 2
    assert "has shape (3, 4); it must be (vocabulary, width)" in capsys.readouterr().err


def test_tokens_and_pairs_are_counted_in_pieces(monkeypatch):
    """A token file needs no room in memory: counting makes int64 of what it counts."""
    monkeypatch.setattr("routing.training_text.PIECE", 7)
    for size in (1, 2, 7, 8, 100):
        token_N = np.random.default_rng(size).integers(0, 5, size).astype(np.uint16)
        text = TrainingText(token_N, 6)
        np.testing.assert_array_equal(text.count_V, np.bincount(token_N, minlength=6))
        pairs = np.zeros((6, 6), int)
        np.add.at(pairs, (token_N[:-1], token_N[1:]), 1)
        np.testing.assert_array_equal(text.next_V, pairs.argmax(1))  # ties: the lowest
