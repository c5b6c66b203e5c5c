"""Several corpora as one: proportions, held-out documents, resuming, and what is refused."""

import gin
import numpy as np
import pytest
from tiny import Runs, corpus, lines, measured

from moe.data.corpora.corpus import TextFiles
from moe.data.mixture import Mixture
from moe.data.text import TextData
from moe.data.tokens.tokenizer import Bytes
from moe.errors import UserError

LETTERS = "abc"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Three corpora, each of one letter, of 10, 20 and 40 documents."""
    found = []
    for letter, documents in zip(LETTERS, (10, 20, 40), strict=True):
        folder = tmp_path_factory.mktemp(letter)
        for i in range(documents):
            (folder / f"{i}.txt").write_text(letter * 99)
        found.append(TextFiles(str(folder)))
    return found


def prepared(corpora, weights, tmp_path, **settings):
    data = TextData(Mixture(corpora, weights), Bytes(), cache_dir=tmp_path, **settings)
    return data.prepare()


@pytest.mark.parametrize("weights", [(1, 1, 1), (8, 1, 1), (0.1, 0.2, 0.7)])
def test_windows_are_drawn_with_their_weights(corpora, weights, tmp_path):
    batches = prepared(corpora, weights, tmp_path).train_batches(20, 32, seed=0)
    drawn = np.concatenate([batches.batch(i).token_BT for i in range(15)])
    most = [np.bincount(row, minlength=257)[: ord("z")].argmax() for row in drawn]
    share = np.array([most.count(ord(letter)) for letter in LETTERS]) / len(drawn)
    np.testing.assert_allclose(share, np.array(weights) / sum(weights), atol=0.02)
    for row in drawn:  # a window lies in one corpus
        assert len(set(row.tolist()) - {256}) == 1


def test_without_weights_the_sizes_are_the_weights(corpora, tmp_path):
    data = prepared(corpora, None, tmp_path)
    weights = [share.weight for share in data.shares]
    assert sum(weights) == len(data.train.token_N) and weights == sorted(weights)


def test_every_corpus_has_documents_held_out(corpora, tmp_path):
    data = prepared(corpora, (1, 1, 1), tmp_path, validation_fraction=0.3)
    assert {text[0] for text in data.validation_split.texts()} == set(LETTERS)
    assert data.train_batches(2, 16, seed=3).batch(7).token_BT.tolist() == (
        prepared(corpora, (1, 1, 1), tmp_path, validation_fraction=0.3)
        .train_batches(2, 16, seed=3)
        .batch(7)
        .token_BT.tolist()
    )


def test_other_weights_are_another_run(corpora, tmp_path):
    one, other = (prepared(corpora, w, tmp_path).fingerprint() for w in ((1, 1, 1), (1, 1, 2)))
    assert one != other
    plain = TextData(corpora[0], Bytes(), cache_dir=tmp_path).prepare()
    assert "mixture" not in plain.fingerprint() and plain.shares == ()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((1, 2), "Mixture.weights has 2 numbers for 3 corpora"),
        ((1, 0, 1), "each must be above 0"),
        ((1, float("nan"), 1), "each must be above 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(corpora, weights, said):
    with pytest.raises(UserError, match=said):
        Mixture(corpora, weights)


def test_a_corpus_too_short_for_a_window_is_named(corpora, tmp_path):
    data = prepared(corpora, None, tmp_path)
    with pytest.raises(UserError, match=rf"Mixture: {corpora[0].name} has \d+ tokens"):
        data.train_batches(1, 1000, seed=0)


def test_corpora_that_cannot_be_mixed_are_refused(corpora):
    with pytest.raises(UserError, match="whose weights would be ignored"):
        Mixture([corpora[0], Mixture(corpora, (1, 2, 3))])
    with pytest.raises(UserError, match=r"write @TextFiles\(\), not @TextFiles"):
        Mixture([corpora[0], TextFiles])


@pytest.mark.thorough
def test_a_mixture_trains_and_goes_on(tmp_path):
    runs = Runs(tmp_path)
    corpus(tmp_path / "more", documents=8)
    settings = [
        "TextData.corpus = @Mixture()",
        "Mixture.corpora = [@TextFiles(), @more/TextFiles()]",
        f"more/TextFiles.paths = {str(tmp_path / 'more')!r}",
        "Mixture.weights = [1.0, 2.0]",
        "train.steps = 4",
    ]
    whole = runs.done("whole", *settings)
    gin.clear_config()
    assert runs("paused", *settings, "train.stop_at = 2") == 0
    runs.done("paused", *settings)
    assert measured(runs.folder / "paused") == measured(whole)
    assert len(lines(whole / "metrics.jsonl")) == 4


def test_what_the_corpora_leave_out_is_told(corpora, tmp_path):
    """Of corpora that are given by lists, too, which can't be hashed."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text")
    (tmp_path / "text" / "broken.txt").symlink_to("nowhere")
    both = [*corpora, TextFiles([str(tmp_path / "text")])]
    lines = []
    held_out = corpora[0]
    data = TextData(Mixture(both), Bytes(), validation_corpus=held_out, cache_dir=tmp_path)
    data.prepare(lines.append)
    assert [line for line in lines if "broken.txt" in line]
