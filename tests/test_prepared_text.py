"""Text on its way to tokens: the cache, fingerprints, passages of long documents, errors."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import itertools
import shutil
import subprocess
import sys

import gin
import numpy as np
import pytest
from tiny import environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe.data.corpora.corpus import StandardLibrary, TextFiles
from moe.data.text import TextData
from moe.data.tokens import cache
from moe.data.tokens.tokenizer import Bytes, TokenizerFile, TrainedBPE
from moe.errors import UserError
from moe.machine.user_cache import default_cache_dir


def test_the_second_time_comes_from_the_cache(text_data, text_folder, monkeypatch):
    first = text_data().prepare()
    encode = "moe.data.tokens.tokenizer.ByteTokenizer.encode_batch"
    monkeypatch.setattr(encode, lambda *_: pytest.fail("again"))
    np.testing.assert_array_equal(text_data().prepare().train.token_N, first.train.token_N)
    assert not list((text_folder / "cache").rglob(".*"))  # no temporary file is left


@pytest.mark.parametrize("damage", ["cut", "flip", "record", "missing"])
def test_a_damaged_cache_is_built_anew(text_data, text_folder, damage):
    expected = np.array(text_data().prepare().train.token_N)
    for path in (text_folder / "cache" / "tokens").iterdir():
        data = path.read_bytes()
        if path.name.endswith("token_N.bin"):
            last = bytes([data[-1] ^ 1])
            path.unlink()  # a mapped file is never written to
            if damage != "missing":
                path.write_bytes({"cut": data[:-50], "flip": data[:-1] + last}.get(damage, data))
        elif path.suffix == ".record" and damage == "record":
            assert b'"<u2"' in data
            path.write_bytes(data.replace(b'"<u2"', b'"<i2"'))  # other numbers, the same bytes
    said = []
    np.testing.assert_array_equal(text_data().prepare(said.append).train.token_N, expected)
    assert len([line for line in said if "was altered or cut; it is made anew" in line]) == 2


def test_two_tokenizers_of_one_size_do_not_share_a_cache(text_data, text_folder):
    first = text_data(tokenizer=TrainedBPE(vocab_size=260)).prepare()
    other = TrainedBPE(vocab_size=260).fit(
        lambda: iter(["zzzz zzz zz"]), text_folder / "other", "zz"
    )
    other.save(text_folder / "zz")
    second = text_data(tokenizer=TokenizerFile(str(text_folder / "zz"))).prepare()
    assert first.tokenizer.vocab_size == second.tokenizer.vocab_size
    end = int(second.train.start_M[5])
    expected = "".join(itertools.islice(second.train_split.texts(), 5))
    assert second.tokenizer.decode(second.train.token_N[:end]) == expected


def test_several_may_build_one_cache_at_the_same_time(text_data, text_folder):
    expected = np.array(text_data().prepare().train.token_N)
    for _ in range(5):
        shutil.rmtree(text_folder / "cache")
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda _: text_data().prepare().train.token_N, range(4)))
        for token_N in made:
            np.testing.assert_array_equal(token_N, expected)


def test_the_fingerprint_tells_other_data_apart(text_data, text_folder):
    same = text_data().prepare().fingerprint()
    assert text_data().prepare().fingerprint() == same
    others = [
        text_data(split_seed=1),
        text_data(tokenizer=TrainedBPE(vocab_size=300)),
        text_data(isolate_documents=False),
        text_data(validation_corpus=TextFiles(str(text_folder / "texts" / "07.txt"))),
    ]
    assert all(other.prepare().fingerprint() != same for other in others)
    (text_folder / "texts" / "39.txt").write_text("changed")
    assert text_data().prepare().fingerprint() != same


def test_a_validation_corpus_of_its_own(text_data, text_folder):
    held_out = TextFiles(str(text_folder / "texts" / "07.txt"))
    data = text_data(validation_corpus=held_out).prepare()
    assert (data.info.train_documents, data.info.validation_documents) == (40, 1)
    assert (data.info.documents, data.info.validation_bytes) == (41, 72)


def test_errors(text_data, text_folder):
    data = text_data().prepare()
    with pytest.raises(
        UserError, match=r"holds \d+ tokens, but sequence_length=99999 needs 100000"
    ):
        data.train_batches(1, 99_999, seed=0)
    for batches in (lambda *sizes: data.train_batches(*sizes, seed=0), data.validation_batches):
        with pytest.raises(UserError, match="sequence_length=1 must"):
            batches(1, 1)
        with pytest.raises(UserError, match="batch_size=0 must"):
            batches(0, 8)
    with pytest.raises(UserError, match="stride=9 must lie in 1 to sequence_length=8"):
        data.validation_batches(1, 8, stride=9)
    with pytest.raises(UserError, match=r"write @Bytes\(\), not @Bytes"):
        text_data(tokenizer=Bytes)


def test_the_shortest_corpus_that_will_do(text_data):
    data = text_data().prepare()
    length = len(data.train.token_N) - 1
    batches = data.train_batches(1, length, seed=0)
    assert batches.windows_per_epoch == 1
    for i in range(3):  # every offset wraps to the first document
        window = np.append(batches.batch(i).token_BT, batches.batch(i).target_BT[0, -1])
        assert sorted(window) == sorted(data.train.token_N)


def test_real_text_by_gin(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_CACHE", str(tmp_path))
    bindings = """
        TextData.corpus = @StandardLibrary()
        StandardLibrary.max_bytes = 300_000
        TextData.tokenizer = @TrainedBPE()
        TrainedBPE.vocab_size = 512
    """
    lines = []
    try:
        gin.parse_config(bindings)
        data = TextData().prepare(lines.append)  # type: ignore[call-arg]
    finally:
        gin.clear_config()
    assert default_cache_dir() == tmp_path and list(tmp_path.iterdir())
    lines = [line for line in lines if "stand in the training text" not in line]
    assert len(lines) == 3 and data.tokenizer.vocab_size == 512
    assert data.info.bytes == sum(
        len(d.text.encode()) for d in StandardLibrary(max_bytes=300_000).documents()
    )
    assert data.info.bytes_per_token > 2
    batch = data.train_batches(2, 128, seed=0).batch(0)
    assert (
        len(data.tokenizer.decode(np.asarray(batch.token_BT)[0])) > 128
    )  # characters of 128 tokens


@pytest.mark.parametrize("make", [Bytes, TrainedBPE])
def test_a_long_document_is_encoded_in_passages(make, tmp_path, monkeypatch):
    monkeypatch.setattr("moe.data.tokens.cache.LONG", 50)
    monkeypatch.setattr(cache.passages, "__defaults__", (50,))
    monkeypatch.setattr("moe.data.tokens.cache.CHUNK_CHARACTERS", 120)
    texts = ["", "short", "x" * 50, "x" * 51, "caf\u00e9 " * 40, "a line\n    and one more\n" * 30]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    corpus = TextFiles([str(tmp_path / f"{i}.txt") for i in range(len(texts))])
    spec = make() if make is Bytes else make(vocab_size=300)
    data = TextData(corpus, spec, validation_corpus=corpus, cache_dir=tmp_path / "cache").prepare()
    stream = data.validation
    assert stream.num_bytes_M.tolist() == [len(text.encode()) for text in texts]
    assert (stream.token_N[stream.start_M[:-1]] == data.tokenizer.document_id).all()
    assert (stream.token_N == data.tokenizer.document_id).sum() == len(texts)
    for text, start, end in zip(texts, stream.start_M[:-1], stream.start_M[1:], strict=True):
        assert data.tokenizer.decode(stream.token_N[start:end]) == text


def test_passages_end_with_lines_and_are_the_text():
    for text in ("", "abc", "a" * 11, "ab\ncd\n" * 9, "\n" * 25, "abc\n" + "d" * 30):
        found = list(cache.passages(text, 10))
        assert "".join(passage for _, passage in found) == text
        assert all(len(passage) <= 10 for _, passage in found)
        assert all(text[start:].startswith(passage) for start, passage in found)
    assert [passage for _, passage in cache.passages("ab\ncd\nefghijkl", 10)] == [
        "ab\ncd\n",
        "efghijkl",
    ]


def test_a_tokenizer_that_writes_a_space_before_a_text_sees_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("moe.data.tokens.cache.LONG", 50)
    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(["abc def " * 9], trainers.BpeTrainer(show_progress=False))
    inner.save(str(tmp_path / "its.json"))
    (tmp_path / "long.txt").write_text("abc def " * 40 + "abc")
    corpus = TextFiles(str(tmp_path / "long.txt"))
    spec = TokenizerFile(str(tmp_path / "its.json"))
    data = TextData(corpus, spec, validation_corpus=corpus, cache_dir=tmp_path / "cache").prepare()
    assert data.tokenizer.decode(data.train.token_N) == "abc def " * 40 + "abc"


def test_a_document_that_changes_on_the_way_is_not_kept_as_what_it_was(text_data, text_folder):
    """The cache's name is the hash of what was read first."""
    data = text_data()
    parts = data._splits()
    (text_folder / "texts" / "39.txt").write_text("changed")
    data._splits = lambda: parts
    with pytest.raises(UserError, match=r"'39.txt' of the corpus 'texts' has changed since"):
        data.prepare()
    (text_folder / "texts" / "39.txt").unlink()
    with pytest.raises(UserError, match=r"'39.txt' of the corpus 'texts' has changed since"):
        data.prepare()


def test_held_out_documents_without_text_are_told(text_data):
    data = text_data().prepare()
    stream = dataclasses.replace(data.validation, num_bytes_M=data.validation.num_bytes_M * 0)
    with pytest.raises(UserError, match="hold no text: there is nothing to score"):
        dataclasses.replace(data, validation=stream).validation_batches(2, 8)


@pytest.mark.thorough
@pytest.mark.parametrize("documents", [80, 2])
def test_preparing_a_text_takes_memory_for_a_piece_of_it_alone(documents, tmp_path):
    """40 MB; all of its tokens together, twice, were 160 MB, and a long document's a gigabyte."""
    text_folder = tmp_path / "text"
    text_folder.mkdir()
    for i in range(documents):
        (text_folder / f"{i}.txt").write_text(
            f"{i} some words that repeat " * (1_600_000 // documents)
        )
    code = """
import resource, sys
from moe.data.corpora.corpus import TextFiles
from moe.data.text import TextData
from moe.data.tokens.tokenizer import Bytes
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
data = TextData(TextFiles(sys.argv[1]), Bytes(), cache_dir=sys.argv[2]).prepare()
assert data.info.bytes > 35e6
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(text_folder), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 120
