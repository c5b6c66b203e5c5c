"""Tokenizers give back what they are given, keep their document token apart, save and load."""

import pytest

from moe.corpus import StandardLibrary
from moe.errors import UserError
from moe.tokenizer import (
    DOCUMENT_TOKEN,
    Bytes,
    TokenizerFile,
    TrainedBPE,
    load_tokenizer,
)

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


def test_a_cut_cached_tokenizer_is_trained_again(library, tmp_path):
    spec, small = TrainedBPE(vocab_size=400), library[:5]
    first = spec.fit(lambda: iter(small), tmp_path, "x")
    [file] = tmp_path.rglob("tokenizer.json")
    file.write_bytes(file.read_bytes()[:1000])
    assert spec.fit(lambda: iter(small), tmp_path, "x").fingerprint == first.fingerprint


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


def test_a_file_that_loses_text_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match="does not give back the text"):
        TokenizerFile(str(tmp_path / "words.json")).fit(lambda: iter(["hello  you"]), tmp_path, "x")


def test_errors(tmp_path):
    with pytest.raises(UserError, match="vocab_size=256 is too small"):
        TrainedBPE(vocab_size=256).fit(lambda: iter(["a"]), tmp_path, "x")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)
