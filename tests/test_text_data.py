"""Batches of text: pure in (seed, i), the same for any hosts; every held-out token scored once."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import itertools
import random
import shutil
import subprocess
import sys

import gin
import numpy as np
import pytest
from tiny import environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe.data.batches import pack
from moe.data.corpora.corpus import StandardLibrary, TextFiles
from moe.data.text import TextData
from moe.data.tokens import cache
from moe.data.tokens.tokenizer import Bytes, TokenizerFile, TrainedBPE
from moe.errors import UserError
from moe.machine.user_cache import default_cache_dir

FIELDS = ("token_BT", "target_BT", "segment_BT", "position_BT", "scored_BT", "index_B")


@pytest.fixture
def folder(tmp_path):
    """40 documents of 0 to 392 characters, in which no window of 17 tokens comes twice."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        letters = random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=10 * i)
        text = "".join(letters) + "\u00e9" * (i % 3)
        (tmp_path / "texts" / f"{i:02}.txt").write_bytes(text.encode())
    return tmp_path


@pytest.fixture
def settings(folder):
    def make(**changed):
        given = {
            "corpus": TextFiles(str(folder / "texts")),
            "tokenizer": Bytes(),
            "validation_fraction": 0.3,
            "cache_dir": folder / "cache",
        }
        return TextData(**(given | changed))

    return make


def fields(batch):
    return {name: np.asarray(getattr(batch, name)) for name in FIELDS}


def assert_same(a, b):
    for name, value in fields(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


def test_info(settings):
    data = settings().prepare()
    info = data.info
    # 10 i letters of document i, 13 documents with one and 13 with two e-acutes of two bytes
    assert info.bytes == 10 * sum(range(40)) + 2 * (13 + 2 * 13)
    assert (info.name, info.documents) == ("texts", 40)
    assert info.train_bytes + info.validation_bytes == info.bytes
    assert (info.train_tokens, info.validation_tokens) == (info.train_bytes, info.validation_bytes)
    assert info.bytes_per_token == 1.0
    assert len(data.train.token_N) == info.train_tokens + info.train_documents


def test_the_stream_is_a_document_token_and_the_text_of_each_document(settings):
    data = settings().prepare()
    stream = data.train
    assert stream.token_N.dtype == np.uint16 and isinstance(stream.token_N, np.memmap)
    texts = list(data.train_split.texts())
    assert len(texts) == stream.num_documents
    for text, start, end in zip(texts, stream.start_M[:-1], stream.start_M[1:], strict=True):
        assert stream.token_N[start] == data.tokenizer.document_id
        assert bytes(stream.token_N[start + 1 : end].tolist()).decode() == text


def test_a_training_batch_is_pure_and_its_target_is_the_next_token(settings):
    data = settings().prepare()
    batches = data.train_batches(4, 32, seed=1)
    later = batches.batch(7)
    batches.batch(0)
    assert_same(batches.batch(7), later)
    assert_same(settings().prepare().train_batches(4, 32, seed=1).batch(7), later)
    assert (data.train_batches(4, 32, seed=2).batch(7).token_BT != later.token_BT).any()
    np.testing.assert_array_equal(later.token_BT[:, 1:], later.target_BT[:, :-1])
    assert later.scored_BT.all() and later.token_BT.shape == (4, 32)
    assert all(fields(later)[name].dtype == np.int32 for name in FIELDS if name != "scored_BT")


def test_two_hosts_load_the_rows_of_one(settings):
    data = settings().prepare()
    train, validation = data.train_batches(4, 32, seed=0), data.validation_batches(4, 32)
    for batches, first in ((train, 0), (validation, 4)):
        one = fields(batches.batch(1))
        two = [fields(batches.batch(1, rows)) for rows in (slice(0, 2), slice(2, 4))]
        for name in FIELDS:
            joined = np.concatenate([host[name] for host in two])
            np.testing.assert_array_equal(joined, one[name], err_msg=name)
        assert one["index_B"].tolist() == [first, first + 1, first + 2, first + 3]


def test_an_epoch_visits_every_target_once_and_the_next_one_in_another_order(settings):
    data = settings().prepare()
    batches = data.train_batches(1, 16, seed=0)
    n, stream = batches.windows_per_epoch, data.train.token_N
    joined = np.concatenate([stream, stream[:16]]).astype(np.int32)
    where = {joined[s : s + 17].tobytes(): s for s in range(len(stream))}
    epochs = []
    for epoch in range(2):
        windows = [batches.batch(epoch * n + i) for i in range(n)]
        rows = [np.append(w.token_BT[0], w.target_BT[0, -1]).tobytes() for w in windows]
        epochs.append([where[row] for row in rows])
    for starts in epochs:
        np.testing.assert_array_equal(np.diff(sorted(starts)), 16)
        assert starts != sorted(starts)
    assert min(epochs[0]) != min(epochs[1])  # the offset
    assert np.argsort(epochs[0]).tolist() != np.argsort(epochs[1]).tolist()  # the order


def test_segments_and_positions_restart_at_each_document(settings):
    data = settings().prepare()
    batches = data.train_batches(8, 64, seed=0)
    seen = 0
    for batch in (batches.batch(i) for i in range(4)):
        for token_T, segment_T, position_T in zip(
            batch.token_BT, batch.segment_BT, batch.position_BT, strict=True
        ):
            segment, position = 1, 0
            for t, token in enumerate(token_T):  # the slow way
                if token == data.tokenizer.document_id and t > 0:
                    segment, position, seen = segment + 1, 0, seen + 1
                assert (segment_T[t], position_T[t]) == (segment, position)
                position += 1
    assert seen > 10


def test_without_isolation_a_window_is_one_segment(settings):
    batch = settings(isolate_documents=False).prepare().train_batches(2, 32, seed=0).batch(0)
    assert (batch.segment_BT == 1).all()
    np.testing.assert_array_equal(batch.position_BT, [list(range(32))] * 2)


def test_the_prefetching_iterator_gives_the_same_batches(settings):
    batches = settings().prepare().train_batches(2, 16, seed=3)
    iterator = batches.batches(start=5, rows=slice(1, 2))
    for i, batch in enumerate(itertools.islice(iterator, 12)):
        assert_same(batch, batches.batch(5 + i, slice(1, 2)))
    iterator.close()


def scored_texts(data, batches):
    """Scored targets of each piece, with the number of tokens in front of each in its segment."""
    for batch in batches:
        rows = zip(*(np.asarray(getattr(batch, name)) for name in FIELDS[:5]), strict=True)
        for token_T, target_T, segment_T, position_T, scored_T in rows:
            for segment in range(1, segment_T.max() + 1):
                here = segment_T == segment
                np.testing.assert_array_equal(position_T[here], np.arange(here.sum()))
                np.testing.assert_array_equal(token_T[here][1:], target_T[here][:-1])
                scored = scored_T[here]
                yield token_T[here], target_T[here][scored], position_T[here][scored] + 1
            assert not scored_T[segment_T == 0].any()


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(("length", "stride"), [(64, None), (64, 64), (50, 7), (2, 1), (500, 3)])
def test_every_held_out_token_is_scored_once_with_enough_context(settings, isolate, length, stride):
    data = settings(isolate_documents=isolate).prepare()
    batches = data.validation_batches(4, length, stride)
    document_id, stride = data.tokenizer.document_id, stride or length // 2
    found = list(scored_texts(data, batches))
    assert sum(len(target) for _, target, _ in found) == data.info.validation_tokens
    assert batches.num_tokens == data.info.validation_tokens
    assert batches.num_bytes == data.info.validation_bytes
    at_least = [int(context.min()) for token, _, context in found if token[0] != document_id]
    assert all(context >= length - stride + 1 for context in at_least)
    assert all(document_id not in target for _, target, _ in found)
    # Without packing the rows are in order, and their targets join to the text itself.
    if not isolate:
        joined = b"".join(bytes(target.tolist()) for _, target, _ in found)
        assert joined.decode() == "".join(data.validation_split.texts())


def test_packed_rows_hold_the_same_pieces_as_single_ones(settings):
    pieces = []
    for isolate in (True, False):
        data = settings(isolate_documents=isolate).prepare()
        batches = data.validation_batches(4, 128)
        found = scored_texts(data, batches)
        pieces.append((sorted((a.tobytes(), b.tobytes()) for a, b, _ in found), len(batches.rows)))
    assert pieces[0][0] == pieces[1][0] and pieces[0][1] < pieces[1][1]


def test_the_last_validation_batch_is_filled_with_padding(settings):
    batches = settings().prepare().validation_batches(5, 64)
    assert len(batches.rows) % 5 != 0
    *_, last = batches
    assert last.token_BT.shape == (5, 64)
    assert (last.segment_BT[len(batches.rows) % 5 :] == 0).all() and (last.segment_BT[0] > 0).any()
    with pytest.raises(IndexError):
        batches.batch(len(batches))


def test_a_limit_keeps_the_same_text_for_every_tokenizer_but_for_the_cut(settings):
    chosen, cut = {}, {}
    for spec in (Bytes(), TrainedBPE(vocab_size=300)):
        data = settings(tokenizer=spec).prepare()
        batches = data.validation_batches(2, 400, max_bytes=1000)
        assert 990 < batches.num_bytes <= 1000
        found = [data.tokenizer.decode(target) for _, target, _ in scored_texts(data, batches)]
        assert sum(len(text.encode()) for text in found) == batches.num_bytes
        whole = set(data.validation_split.texts())
        chosen[spec] = sorted(text for text in found if text in whole)
        (cut[spec],) = (text for text in found if text not in whole)
    assert len(set(map(tuple, chosen.values()))) == 1
    shorter, longer = sorted(cut.values(), key=len)
    assert longer.startswith(shorter)
    assert data.validation_batches(2, 400, max_bytes=1).num_documents == 1


@pytest.mark.parametrize("seed", range(3))
def test_packing_wastes_little(seed):
    lengths = np.random.default_rng(seed).integers(1, 101, size=500).tolist()
    rows = pack(lengths, 100)
    assert sorted(itertools.chain(*rows)) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    # No packing can do with fewer rows than this; decreasing fits need at most 11/9 of the best.
    least = max(-(-sum(lengths) // 100), sum(length > 50 for length in lengths))
    assert least <= len(rows) <= 1.03 * least


def test_the_second_time_comes_from_the_cache(settings, folder, monkeypatch):
    first = settings().prepare()
    encode = "moe.data.tokens.tokenizer.ByteTokenizer.encode_batch"
    monkeypatch.setattr(encode, lambda *_: pytest.fail("again"))
    np.testing.assert_array_equal(settings().prepare().train.token_N, first.train.token_N)
    assert not list((folder / "cache").rglob(".*"))  # no temporary file is left


@pytest.mark.parametrize("damage", ["cut", "flip", "record", "missing"])
def test_a_damaged_cache_is_built_anew(settings, folder, damage):
    expected = np.array(settings().prepare().train.token_N)
    for path in (folder / "cache" / "tokens").iterdir():
        data = path.read_bytes()
        if path.name.endswith("token_N.bin"):
            last = bytes([data[-1] ^ 1])
            path.unlink()  # a mapped file is never written to
            if damage != "missing":
                path.write_bytes({"cut": data[:-50], "flip": data[:-1] + last}.get(damage, data))
        elif path.suffix == ".json" and damage == "record":
            path.write_bytes(data[:20])
    np.testing.assert_array_equal(settings().prepare().train.token_N, expected)


def test_two_tokenizers_of_one_size_do_not_share_a_cache(settings, folder):
    first = settings(tokenizer=TrainedBPE(vocab_size=260)).prepare()
    other = TrainedBPE(vocab_size=260).fit(lambda: iter(["zzzz zzz zz"]), folder / "other", "zz")
    other.save(folder / "zz")
    second = settings(tokenizer=TokenizerFile(str(folder / "zz"))).prepare()
    assert first.tokenizer.vocab_size == second.tokenizer.vocab_size
    end = int(second.train.start_M[5])
    expected = "".join(itertools.islice(second.train_split.texts(), 5))
    assert second.tokenizer.decode(second.train.token_N[:end]) == expected


def test_several_may_build_one_cache_at_the_same_time(settings, folder):
    expected = np.array(settings().prepare().train.token_N)
    for _ in range(5):
        shutil.rmtree(folder / "cache")
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda _: settings().prepare().train.token_N, range(4)))
        for token_N in made:
            np.testing.assert_array_equal(token_N, expected)


def test_the_fingerprint_tells_other_data_apart(settings, folder):
    same = settings().prepare().fingerprint()
    assert settings().prepare().fingerprint() == same
    others = [
        settings(split_seed=1),
        settings(tokenizer=TrainedBPE(vocab_size=300)),
        settings(isolate_documents=False),
        settings(validation_corpus=TextFiles(str(folder / "texts" / "07.txt"))),
    ]
    assert all(other.prepare().fingerprint() != same for other in others)
    (folder / "texts" / "39.txt").write_text("changed")
    assert settings().prepare().fingerprint() != same


def test_a_validation_corpus_of_its_own(settings, folder):
    held_out = TextFiles(str(folder / "texts" / "07.txt"))
    data = settings(validation_corpus=held_out).prepare()
    assert (data.info.train_documents, data.info.validation_documents) == (40, 1)
    assert (data.info.documents, data.info.validation_bytes) == (41, 72)


def test_errors(settings, folder):
    data = settings().prepare()
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
        settings(tokenizer=Bytes)


def test_the_shortest_corpus_that_will_do(settings):
    data = settings().prepare()
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


def test_a_document_that_changes_on_the_way_is_not_kept_as_what_it_was(settings, folder):
    """The cache's name is the hash of what was read first."""
    data = settings()
    parts = data._splits()
    (folder / "texts" / "39.txt").write_text("changed")
    data._splits = lambda: parts
    with pytest.raises(UserError, match=r"'39.txt' of the corpus 'texts' has changed since"):
        data.prepare()
    (folder / "texts" / "39.txt").unlink()
    with pytest.raises(UserError, match=r"'39.txt' of the corpus 'texts' has changed since"):
        data.prepare()


def test_held_out_documents_without_text_are_told(settings):
    data = settings().prepare()
    stream = dataclasses.replace(data.validation, num_bytes_M=data.validation.num_bytes_M * 0)
    with pytest.raises(UserError, match="hold no text: there is nothing to score"):
        dataclasses.replace(data, validation=stream).validation_batches(2, 8)


@pytest.mark.parametrize("documents", [80, 2])
def test_preparing_a_text_takes_memory_for_a_piece_of_it_alone(documents, tmp_path):
    """40 MB; all of its tokens together, twice, were 160 MB, and a long document's a gigabyte."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(documents):
        (folder / f"{i}.txt").write_text(f"{i} some words that repeat " * (1_600_000 // documents))
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
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 120
