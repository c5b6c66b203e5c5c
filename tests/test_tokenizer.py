"""Tokenizers give back what they are given, keep their document token apart, save and load."""

import json
import random
import time

import pytest

from moe.data.corpora.corpus import StandardLibrary, TextFiles
from moe.data.text import TextData
from moe.data.tokens.tokenizer import (
    DOCUMENT_TOKEN,
    MOST,
    PIECES,
    Bytes,
    TokenizerFile,
    TrainedBPE,
    load_tokenizer,
)
from moe.errors import UserError

ODD = [
    "",
    "caf\u00e9 cafe\u0301 \uac00 \u1100\u1161",  # composed and decomposed are not the same
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600",
    "a\r\nb\rc\n\n\n\td\x00\x7f\ufeff",
    "def f(self):\n    if x:\n        return  1\n",
    f"literally {DOCUMENT_TOKEN} in a text",
    "   leading and trailing   ",
]


@pytest.fixture(scope="module")
def library():
    return [document.text for document in StandardLibrary(max_bytes=500_000).documents()]


@pytest.fixture(scope="module")
def fitted(library, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    specs = {"Bytes": Bytes(), "TrainedBPE": TrainedBPE(vocab_size=1024)}
    return {name: spec.fit(lambda: iter(library), cache, "x") for name, spec in specs.items()}


@pytest.fixture(params=["Bytes", "TrainedBPE"])
def tokenizer(request, fitted):
    return fitted[request.param]


@pytest.mark.parametrize("text", ODD)
def test_round_trip_of_odd_text(tokenizer, text):
    [ids] = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.document_id, *ids, tokenizer.document_id]) == text


def test_the_bytes_of_a_text_s_tokens_are_the_text_s(tokenizer, library):
    for text in [*ODD, *library[:3]]:
        [ids] = tokenizer.encode_batch([text])
        for row_V in tokenizer.num_bytes_2V:
            assert row_V[ids].sum() == len(text.encode()) and row_V[tokenizer.document_id] == 0
    assert tokenizer.num_bytes_2V.shape == (2, tokenizer.vocab_size)


def test_round_trip_of_real_text(tokenizer, library):
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(library)] == library


def test_the_document_token_never_comes_from_text(tokenizer, library):
    ids = [i for ids in tokenizer.encode_batch([*library, *ODD]) for i in ids]
    assert tokenizer.document_id not in ids
    assert 0 <= min(ids) and max(ids) < tokenizer.vocab_size > tokenizer.document_id


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    loaded = load_tokenizer(tmp_path / "new")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.document_id) == (tokenizer.vocab_size, tokenizer.document_id)
    assert loaded.encode_batch(ODD) == tokenizer.encode_batch(ODD)


def test_vocabularies(fitted):
    assert fitted["Bytes"].vocab_size == 257
    assert fitted["TrainedBPE"].vocab_size == 1024
    assert fitted["Bytes"].fingerprint != fitted["TrainedBPE"].fingerprint


def test_an_indented_line_s_start_is_one_token(fitted):
    tokenizer = fitted["TrainedBPE"]
    for spaces in (4, 8, 12):
        [ids] = tokenizer.encode_batch(["\n" + " " * spaces])
        assert len(ids) == 1
    [ids] = tokenizer.encode_batch(["x = 1\n        return self\n    return self"])
    assert [tokenizer.decode([i]) for i in ids].count("return") == 2  # whatever the indentation


def test_training_is_deterministic_and_cached(library, tmp_path):
    spec = TrainedBPE(vocab_size=400)
    small = library[:5]
    first = spec.fit(lambda: iter(small), tmp_path / "a", "x")
    assert spec.fit(lambda: iter(small), tmp_path / "b", "x").fingerprint == first.fingerprint
    cached = spec.fit(lambda: pytest.fail("trained again"), tmp_path / "a", "x")
    assert cached.fingerprint == first.fingerprint
    other = spec.fit(lambda: iter(library[5:]), tmp_path / "a", "y")  # other text, other cache
    assert other.fingerprint != first.fingerprint


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def without_a_merge(content):
    """What an editor would save: a sound tokenizer, that encodes otherwise."""
    head, _, text = content.partition(b"\n")
    record = json.loads(text)
    record["model"]["merges"].pop()
    return head + b"\n" + json.dumps(record).encode()


@pytest.mark.parametrize("damage", [flipped, without_a_merge, lambda c: c[:1000], lambda c: b""])
def test_an_altered_cached_tokenizer_is_trained_again(damage, library, tmp_path):
    spec, small, said = TrainedBPE(vocab_size=400), library[:5], []
    first = spec.fit(lambda: iter(small), tmp_path, "x", said.append)
    assert said == []
    [file] = (tmp_path / "tokenizers").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again = spec.fit(lambda: iter(small), tmp_path, "x", said.append)
    assert again.fingerprint == first.fingerprint
    assert said == [f"the cached file {file} was altered or cut; it is made anew"]
    assert spec.fit(lambda: pytest.fail("again"), tmp_path, "x").fingerprint == first.fingerprint


def test_a_file_without_a_document_token_gets_one(tmp_path, library):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(library[:5], trainer)
    inner.enable_truncation(3)  # a file may ask for it; a corpus must not be truncated
    inner.save(str(tmp_path / "mine.json"))
    tokenizer = TokenizerFile(str(tmp_path / "mine.json")).fit(lambda: iter(ODD), tmp_path, "x")
    assert (tokenizer.vocab_size, tokenizer.document_id) == (301, 300)
    for text, ids in zip(ODD, tokenizer.encode_batch(ODD), strict=True):
        assert tokenizer.decode(ids) == text and 300 not in ids
    with pytest.raises(UserError, match=r"no tokenizer file .*did you mean 'mine.json'"):
        TokenizerFile(str(tmp_path / "mime.json")).fit(lambda: iter(ODD), tmp_path, "x")


def characters(texts, path):
    """A BPE of characters without an unknown token: what it never saw vanishes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    inner.decoder = decoders.Fuse()
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    inner.save(str(path))


def byte_level(texts, path, change):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    change(inner)
    inner.save(str(path))


def normalised(inner):
    from tokenizers import normalizers

    inner.normalizer = normalizers.NFC()


def stripping(inner):
    from tokenizers import AddedToken

    inner.add_tokens([AddedToken("zebra", lstrip=True)])


ENGLISH = [f"text {i} of the plain kind, in the plainest words there are" for i in range(30)]
LOSSES = {  # how a tokenizer is made, what it loses, and how that is told
    "unseen characters": (characters, "plain 今天 words", r"'今天 words' became ' words'"),
    "a normaliser": (
        lambda texts, path: byte_level(texts, path, normalised),
        "cafe\u0301",
        "from character 3",
    ),
    "an added token": (
        lambda texts, path: byte_level(texts, path, stripping),
        "in  zebra land",
        "from character 2",
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_tokenizer_that_loses_text_is_refused_wherever_it_does(kind, split, tmp_path):
    """The text that it loses stands in the last of many documents; it is named."""
    make, lost, said = LOSSES[kind]
    make(ENGLISH, tmp_path / "tokenizer.json")
    folders = {name: tmp_path / name for name in ("train", "validation")}
    for folder in folders.values():
        folder.mkdir()
        for i, text in enumerate(ENGLISH):
            (folder / f"{i:02}.txt").write_text(text)
    spec = TokenizerFile(str(tmp_path))
    train, validation = (TextFiles(str(folder)) for folder in folders.values())
    data = TextData(train, spec, validation_corpus=validation, cache_dir=tmp_path / "cache")
    data.prepare()
    (folders[split] / "zz.txt").write_text(lost)
    with pytest.raises(UserError, match=rf"document zz\.txt: .*{said}.*@TrainedBPE"):
        data.prepare()


def test_a_document_that_cannot_be_encoded_is_named(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"known": 0}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "texts").mkdir()
    for name, text in {"a": "known", "b": "unknown"}.items():
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    corpus = TextFiles(str(tmp_path / "texts"))
    data = TextData(corpus, TokenizerFile(str(tmp_path)), validation_corpus=corpus)
    data.cache_dir = tmp_path / "cache"
    with pytest.raises(
        UserError, match=r"document b\.txt: the tokenizer cannot encode.*@TrainedBPE"
    ):
        data.prepare()


def test_no_piece_is_long_whatever_the_text():
    """The time to merge a piece grows with the square of its length."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    for text in (
        "A" * 5000,
        "今天" * 2000,
        "=" * 3000,
        " " * 3000,
        "\n" * 3000,
        "1" * 500,
        "a1" * 900,
    ):
        pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 3 * MOST
    assert [p for p, _ in split.pre_tokenize_str("def plain_words():\n    return")] == [
        *("def", " plain", "_words", "():\n    ", "return")
    ]


def test_fitting_takes_linear_time_in_the_longest_run_of_letters(tmp_path):
    def seconds(length):
        text = "".join(random.Random(0).choices("ACGT", k=length))
        started = time.process_time()  # of all threads; others' work is not in it
        TrainedBPE(vocab_size=300).fit(lambda: iter([text]), tmp_path, str(length))
        return time.process_time() - started

    # Of a run without bounds, eight times the length took over fifty times as long.
    assert seconds(160_000) < 25 * max(seconds(20_000), 0.02)


def test_errors(tmp_path):
    with pytest.raises(UserError, match="vocab_size=256 is too small"):
        TrainedBPE(vocab_size=256).fit(lambda: iter(["a"]), tmp_path, "x")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)
