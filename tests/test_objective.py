"""Objectives: what is hidden and scored, and bits per byte against the entropy of random text."""

import json
import random

import jax
import jax.numpy as jnp
from marks import mainly
import numpy as np
import pytest
from tiny import Runs, lines

from moe.data.batch import Batch
from moe.data.batches import masked_pieces_of
from moe.data.corpora.corpus import JsonLines
from moe.data.text import TextData
from moe.data.tokens.tokenizer import Bytes, TokenizerFile, TrainedBPE
from moe.errors import UserError
from moe.training import objective as objectives
from moe.training.objective import MaskedToken, NextToken

DOCUMENTS, LETTERS, ENTROPY = 4000, 3, 4.0  # letters are drawn from 16: 4 bits each
BYTES_2V = jnp.asarray([[1] * 256 + [0, 0]] * 2)  # of bytes, the document token and the mask
MASK = 257


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Documents of three random letters: no model's bits per byte can be below 4."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("letters") / "letters.jsonl"
    texts = ["".join(draw.choices("abcdefghijklmnop", k=LETTERS)) for _ in range(DOCUMENTS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("objective", mainly(["MaskedToken"], ["NextToken", "MaskedToken"]))
def test_bits_per_byte_is_never_below_the_entropy_of_random_text(
    letters, objective, tmp_path, capsys
):
    settings = (
        "TextData.corpus = @JsonLines()",
        f"JsonLines.paths = {str(letters)!r}",
        f"train.objective = @{objective}()",
        "train.steps = 60",
        "train.batch_size = 16",
        "train.optimizer = @AdamW()",
        "AdamW.learning_rate = 0.02",
    )
    runs = Runs(tmp_path)
    runs.config.write_text(runs.config.read_text().replace("TextFiles.paths", "# "))
    run = runs.done("run", *settings)
    summary = json.loads((run / "summary.json").read_text())
    logged = [line["bits_per_byte"] for line in lines(run / "metrics.jsonl")]
    # The lowest of 60 means; of some 60 hidden letters each, a mean varies by 0.03.
    assert min(logged) > ENTROPY - 0.1
    assert ENTROPY - 0.01 < summary["val_bits_per_byte"] < ENTROPY + 0.5
    out = capsys.readouterr().out
    assert ("gzip  " in out) == (objective == "NextToken")
    assert ("hidden tokens of held-out" in out) == (objective == "MaskedToken")
    # In training and at evaluation the same is counted.
    assert np.mean(logged[-10:]) == pytest.approx(summary["val_bits_per_byte"], abs=0.15)


def batch_of(*texts: bytes) -> Batch:
    """Each text behind its document token, one a row, padded."""
    length = 1 + max(map(len, texts))
    token_BT = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        token_BT[row, : len(text) + 1] = [256, *text]
    place_BT = np.tile(np.arange(length, dtype=np.int32), (len(texts), 1))
    valid_BT = place_BT <= np.array([[len(text)] for text in texts])
    index_B = np.arange(len(texts), dtype=np.int32)
    return Batch(token_BT, token_BT, valid_BT.astype(np.int32), place_BT, valid_BT, index_B)


def hide(rate: float, batch: Batch, seed: int = 0) -> Batch:
    return objectives.prepared(MaskedToken(rate), batch, jax.random.key(seed), BYTES_2V)


def test_documents_tokens_and_padding_are_never_hidden_and_every_letter_may_be():
    batch = batch_of(b"abc", b"ab", b"")
    hidden = np.zeros(batch.token_BT.shape, int)
    for seed in range(40):
        hid = hide(0.3, batch, seed)
        hidden += np.asarray(hid.scored_BT)
        assert (np.asarray(hid.token_BT)[np.asarray(hid.scored_BT)] == MASK).all()
        np.testing.assert_array_equal(hid.target_BT, batch.token_BT)
    assert ((hidden > 0) == [[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).all()


def test_a_sequence_with_text_always_has_a_hidden_token():
    hid = hide(1e-4, batch_of(b"abcdef", b"x", b""))
    np.testing.assert_array_equal(hid.scored_BT.sum(1), [1, 1, 0])


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0])
def test_a_rate_that_cannot_be_is_refused(rate):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        MaskedToken(rate)


def test_the_bytes_that_count_are_those_behind_the_scored_tokens():
    batch = batch_of(b"abc", b"ab")
    text_BT, bytes_BT = objectives.text_of(MaskedToken(), hide(0.5, batch), BYTES_2V)
    assert int(bytes_BT.sum()) == int(text_BT.sum()) > 0
    text_BT, bytes_BT = objectives.text_of(NextToken(), batch, BYTES_2V)
    assert int(bytes_BT.sum()) == 5 and not np.asarray(text_BT)[:, 0].any()


@pytest.mark.parametrize("length", range(1, 40))
@pytest.mark.parametrize("stride", [1, 4, 7, 8])
def test_masked_windows_score_every_token_of_a_document_once(length, stride):
    pieces = masked_pieces_of(100, 100 + length, 8, stride)
    scored = [
        place
        for piece in pieces
        for place in range(piece.start + piece.context, piece.start + piece.length - piece.after)
    ]
    assert scored == list(range(100, 100 + length))
    assert all(0 < piece.length <= 8 and 100 <= piece.start for piece in pieces)
    assert all(piece.start + piece.length <= 100 + length for piece in pieces)


@pytest.mark.parametrize("spec", [Bytes(), TrainedBPE(vocab_size=270)])
def test_held_out_text_for_masked_tokens_is_all_of_it(letters, spec, tmp_path):
    data = TextData(JsonLines(str(letters)), spec, cache_dir=tmp_path).prepare()
    batches = data.validation_batches(8, 6, causal=False)
    scored = [batch.token_BT[batch.scored_BT] for batch in batches]
    table_V = data.tokenizer.num_bytes_2V[1]
    assert table_V[np.concatenate(scored)].sum() == data.info.validation_bytes
    assert sum(map(len, scored)) == len(data.validation.token_N)


def sentence_pieces(texts, path):
    """As Llama 2's: a space before every text, dropped again; bytes for what has no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate(fallback)}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trained = Tokenizer(models.BPE())
    trained.normalizer = inner.normalizer
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    content = json.loads(inner.to_str())
    merged = json.loads(trained.to_str())["model"]
    content["model"]["vocab"] |= {t: 256 + i for i, t in enumerate(merged["vocab"])}
    content["model"]["merges"] = merged["merges"]
    path.write_text(json.dumps(content))
    return TokenizerFile(str(path))


def suffixed(texts, path):
    """Words end in a suffix that decodes to a space, and to nothing at a document's end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=60, end_of_word_suffix="</w>", show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.save(str(path))
    return TokenizerFile(str(path))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Short documents of words that the vocabularies cover, and one of letters they don't."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("words") / "words.jsonl"
    texts = [
        " ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 4))) for _ in range(3))
        for _ in range(60)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "\u4eca \xe9a"]))
    return path, texts


@pytest.mark.parametrize("spec", ["Bytes", "TrainedBPE", "sentence_pieces"])
@pytest.mark.parametrize("objective", [NextToken(), MaskedToken(rate=1 - 1e-7)], ids=repr)
def test_the_bytes_of_scored_tokens_add_up_to_the_documents(words, spec, objective, tmp_path):
    """Else short documents cost fewer bits per byte than their entropy."""
    path, texts = words
    made = {
        "Bytes": Bytes,
        "TrainedBPE": lambda: TrainedBPE(vocab_size=270),
        "sentence_pieces": lambda: sentence_pieces(texts, tmp_path / "mine.json"),
    }[spec]()
    corpus = JsonLines(str(path))
    data = TextData(corpus, made, validation_corpus=corpus, cache_dir=tmp_path).prepare()
    extra = ((0, 0), (0, objective.extra_tokens))
    num_bytes_2V = jnp.asarray(np.pad(data.tokenizer.num_bytes_2V, extra))
    key, num_bytes, scored = jax.random.key(0), 0, 0
    for batch in data.validation_batches(8, 32, causal=objective.causal):
        batch = objectives.prepared(objective, batch, key, num_bytes_2V)
        text_BT, bytes_BT = objectives.text_of(objective, batch, num_bytes_2V)
        num_bytes, scored = num_bytes + int(bytes_BT.sum()), scored + int(text_BT.sum())
    assert num_bytes == data.info.validation_bytes
    assert scored == data.info.validation_tokens  # those that give back nothing cost bits too


def test_a_tokenizer_whose_tokens_do_not_add_up_is_refused(words, tmp_path):
    _, texts = words
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus, spec = JsonLines(str(path)), suffixed(texts, tmp_path / "mine.json")
    with pytest.raises(
        UserError, match=r"jsonl:1: its tokens decode to \d+ bytes .* it has \d+: .*wrong"
    ):
        TextData(corpus, spec, validation_corpus=corpus, cache_dir=tmp_path).prepare()


def test_as_much_is_scored_as_was_asked_for(tmp_path):
    """One document of 2,000 bytes and one of 97: 800 bytes are 800 of one or both."""
    path = tmp_path / "two.jsonl"
    draw = random.Random(1)
    texts = ["".join(draw.choices("abcdefgh ", k=size)) for size in (97, 2000, 50)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for spec in (Bytes(), TrainedBPE(vocab_size=300)):
        corpus = JsonLines(str(path))
        data = TextData(corpus, spec, validation_corpus=corpus, cache_dir=tmp_path).prepare()
        for causal in (True, False):
            batches = data.validation_batches(4, 32, max_bytes=800, causal=causal)
            table_V, found = data.tokenizer.num_bytes_2V[1], 0
            for batch in batches:
                found += int(table_V[batch.target_BT[batch.scored_BT]].sum())
            assert found == batches.num_bytes and 750 < found <= 800
        with pytest.raises(UserError, match="max_bytes=0 must be at least 1"):
            data.validation_batches(4, 32, max_bytes=0)


def test_next_token_scores_the_end_of_documents_but_counts_no_bytes_for_it():
    batch = NextToken().prepare(batch_of(b"ab"), jax.random.key(0), BYTES_2V)
    assert np.asarray(batch.scored_BT).all()
