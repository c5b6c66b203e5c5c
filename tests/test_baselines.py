"""Compressors and the unigram model against the definition, computed the slow way."""

from collections import Counter
import gzip
import lzma
import math
import random

import numpy as np
import pytest

from moe.data.compressors import (
    baselines,
    compressor_baselines,
    counts,
    sample,
    unigram_baseline,
)
from moe.data.corpora.corpus import StandardLibrary, TextFiles
from moe.data.corpora.split import Split, whole
from moe.data.text import TextData
from moe.data.tokens.tokenizer import Bytes
from moe.errors import UserError


def text_of(seed, length=20_000):
    words = ["".join(random.Random(i).choices("abcdefgh", k=5)) for i in range(300)]
    return " ".join(random.Random(seed).choices(words, k=length // 6)).encode()


def test_figures_are_the_extra_bytes_of_the_validation_text():
    train, validation = text_of(1), text_of(2)
    found = compressor_baselines(train, validation)

    def extra(compress):
        return 8 * (len(compress(train + validation)) - len(compress(train))) / len(validation)

    assert found["gzip"] == pytest.approx(extra(lambda text: gzip.compress(text, 9)), abs=1e-9)
    # The container pads to four bytes and keeps an index, which is not part of the figure.
    assert found["xz"] == pytest.approx(extra(lambda text: lzma.compress(text, preset=9)), abs=0.01)


def test_xz_sees_the_whole_training_text_and_gzip_its_last_32_kib():
    block = random.Random(0).randbytes(100_000)
    found = compressor_baselines(block + random.Random(1).randbytes(300_000), block)
    assert found["xz"] < 0.1 < 7.9 < found["gzip"]


def test_figures_are_kept_by_the_corpus_and_its_split(tmp_path, monkeypatch):
    """A second run reads and compresses nothing; another corpus, or a damaged file, does."""

    def prepared(size):
        corpus = StandardLibrary(max_bytes=size)
        return TextData(corpus, Bytes(), validation_fraction=0.3, cache_dir=tmp_path).prepare()

    data = prepared(200_000)
    first = baselines(data)
    with monkeypatch.context() as patch:
        patch.setattr(Split, "texts", lambda part: pytest.fail("read again"))
        assert baselines(data) == first
    assert baselines(prepared(300_000)) != first
    for file in (tmp_path / "baselines").iterdir():
        file.write_bytes(file.read_bytes().replace(b'"xz": ', b'"xz": 1'))  # another figure
    said = []
    assert baselines(data, said.append) == first
    assert "was altered or cut; it is made anew" in said[0]


def test_of_a_large_corpus_documents_from_all_over_it_are_compressed(tmp_path):
    """Its beginning is one corpus of a mixture, or one folder."""
    for i in range(100):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02} " * 10)
    part = whole(TextFiles(str(tmp_path)))
    found = sample(part, 600)
    assert len(found) == 600
    documents = [int(number) for number in dict.fromkeys(found.split()) if len(number) == 2]
    assert documents == sorted(documents) and len(documents) == 20
    assert min(documents) < 15 and max(documents) > 85
    assert sample(part, 605)[:300] == found[:300] and len(sample(part, 605)) == 605
    assert sample(part, 3000) == sample(part, 10**9) == "".join(part.texts()).encode()
    assert len(sample(part, 7)) == 7


def test_tokens_are_counted_in_pieces():
    token_N = np.random.default_rng(0).integers(0, 50, 3 << 22).astype(np.uint16)
    np.testing.assert_array_equal(counts(token_N, 60), np.bincount(token_N, minlength=60))


def test_unigram_by_hand():
    train_N, validation_N = np.array([2, 0, 0, 1, 2, 0]), np.array([2, 0, 1, 1])
    # Token 2 starts documents. Smoothed: p(0) = (3 + 1) / 6, p(1) = (1 + 1) / 6.
    expected = (-math.log2(4 / 6) - 2 * math.log2(2 / 6)) / 5
    settings = {"vocab_size": 3, "document_id": 2, "validation_bytes": 5}
    assert unigram_baseline(train_N, validation_N, **settings) == pytest.approx(expected)


def test_the_baselines_of_a_run(tmp_path):
    corpus = StandardLibrary(max_bytes=300_000)
    data = TextData(corpus, Bytes(), validation_fraction=0.3, cache_dir=tmp_path).prepare()
    found = baselines(data)
    assert list(found) == ["unigram", "gzip", "xz"]
    train, validation = (
        "".join(part.texts()).encode() for part in (data.train_split, data.validation_split)
    )
    counts = Counter(train)
    bits = sum(math.log2((len(train) + 256) / (counts[byte] + 1)) for byte in validation)
    assert found["unigram"] == pytest.approx(bits / len(validation))
    assert 1 < found["xz"] < found["gzip"] < found["unigram"] < 6


def test_nothing_to_compress():
    with pytest.raises(UserError, match="empty"):
        compressor_baselines(b"train", b"")
