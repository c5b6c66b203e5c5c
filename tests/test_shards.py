"""Token files as training text: the same batches as from the text, and what can't be is told."""

import json

import gin
import numpy as np
import pytest
from tiny import BASE, Runs, measured, quick
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe.cli import main as cli
from moe.data.compressors import baselines
from moe.data.corpora.corpus import TextFiles
from moe.data.shards import TokenShards
from moe.data.text import TextData
from moe.data.tokens.files import ShardedTokens
from moe.data.tokens.tokenizer import Bytes
from moe.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def text(runs):
    """The same text without shards."""
    spec = TextData(TextFiles(str(runs.text)), Bytes(), cache_dir=runs.folder / "cache")
    return spec.prepare()


@pytest.fixture(scope="module")
def files(runs, text):
    """Its tokens in three files, cut anywhere, and the held-out tokens in one."""
    text.tokenizer.save(runs.folder / "tokenizer")
    token_N = np.asarray(text.train.token_N)
    first, second, third = np.split(token_N, [1001, 1002])
    np.save(runs.folder / "0.npy", first.astype(np.int32))
    second.tofile(runs.folder / "1.bin")
    third.tofile(runs.folder / "2.bin")
    np.save(runs.folder / "held_out.npy", text.validation.token_N)
    return runs.folder


def shards(files, **changed):
    given = {
        "paths": [files / "0.npy", str(files / "[12].bin")],
        "tokenizer": str(files / "tokenizer"),
        "validation_paths": files / "held_out.npy",
        "cache_dir": files / "cache",
    }
    return TokenShards(**(given | changed))


def test_slices_are_those_of_the_arrays_one_behind_the_other():
    whole_N = np.arange(20)
    token_N = ShardedTokens(np.split(whole_N, [1, 7, 8]))
    for start in range(21):
        for stop in range(21):
            np.testing.assert_array_equal(token_N[start:stop], whole_N[start:stop])
    np.testing.assert_array_equal(token_N[:], whole_N)
    assert len(token_N) == 20


@pytest.mark.parametrize("piece", [3, 7, 1 << 22])
def test_documents_lie_between_the_marks_wherever_the_pieces_end(piece, monkeypatch):
    monkeypatch.setattr("moe.data.tokens.files.PIECE", piece)
    token_N = ShardedTokens(np.split(np.array([5, 6, 0, 7, 0, 0, 8, 9, 5, 6, 7, 0]), [4, 9]))
    found = [ids.tolist() for ids in token_N.documents(0)]
    assert [ids for ids in found if ids] == [[5, 6], [7], [8, 9, 5, 6, 7]]


def test_shards_train_and_score_as_the_text_does(files, text):
    data = shards(files).prepare()
    for i in (0, 3, 40):
        ours, theirs = (d.train_batches(4, 32, seed=1).batch(i) for d in (data, text))
        np.testing.assert_array_equal(ours.token_BT, theirs.token_BT)
        np.testing.assert_array_equal(ours.segment_BT, theirs.segment_BT)
    both = (d.validation_batches(4, 32) for d in (data, text))
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_array_equal(ours.target_BT, theirs.target_BT)
    for name in ("bytes", "train_documents", "train_tokens", "validation_bytes", "documents"):
        assert getattr(data.info, name) == getattr(text.info, name), name
    assert baselines(data) == pytest.approx(baselines(text), rel=0.02)  # marks are no text


def test_held_out_text_may_be_text(files, runs):
    held_out, said = TextFiles([str(runs.text / "03.txt")] * 2), []
    data = shards(files, validation_paths=None, validation_corpus=held_out).prepare(said.append)
    assert f"left out, reached before by another name: {runs.text / '03.txt'}" in said
    assert data.info.validation_bytes == (runs.text / "03.txt").stat().st_size
    assert data.fingerprint() != shards(files).prepare().fingerprint()


def test_other_shards_are_another_run(files):
    one = shards(files).prepare().fingerprint()
    assert shards(files).prepare().fingerprint() == one
    other = shards(files, paths=[files / "1.bin", files / "2.bin"]).prepare()
    assert other.fingerprint() != one


def test_a_foreign_document_token_behind_each_document(tmp_path):
    """As GPT-2's files have it: the token keeps its id under another name."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    texts = ["caf\u00e9 <|endoftext|>", "two", "and three"]
    ids = [[*inner.encode(part).ids, 256] for part in ("caf\u00e9 ", "two", "and three")]
    for name in ("tokens", "held_out"):
        np.save(tmp_path / f"{name}.npy", np.concatenate(ids).astype(np.uint32))
    spec = TokenShards(
        paths=tmp_path / "tokens.npy",
        tokenizer=str(tmp_path),
        validation_paths=tmp_path / "held_out.npy",
        document_token="<|endoftext|>",
        cache_dir=tmp_path,
    )
    data = spec.prepare()
    assert (data.tokenizer.document_id, data.tokenizer.vocab_size) == (256, 257)
    assert [document.text for document in data.validation_split.documents()] == [
        texts[0].removesuffix("<|endoftext|>"),
        *texts[1:],
    ]
    assert (data.info.train_documents, data.info.train_bytes) == (3, 6 + 3 + 9)
    batch = data.train_batches(1, 8, seed=0).batch(0)
    assert (np.diff(batch.segment_BT[0]) == (batch.token_BT[0, 1:] == 256)).all()
    spec.document_token = "<|endofext|>"
    with pytest.raises(UserError, match=r"no added token '<\|endofext\|>'.*'<\|endoftext\|>'"):
        spec.prepare()


WRONG = {  # changed settings or a file's content, and what is said
    "nothing there": ({"paths": "nowhere.bin"}, "no token file 'nowhere.bin'"),
    "no held-out text": ({"validation_paths": None}, "either validation_paths or"),
    "dtype": ({"dtype": "int8"}, "TokenShards.dtype='int8': uint16 or uint32"),
    "odd size": (b"abc", r"x\.bin: not a file of tokens"),
    "empty": (b"", r"x\.bin: not a file of tokens"),
    "too large": (np.uint16([1, 257]).tobytes(), r"x\.bin: token 257, and the tokenizer has 257"),
    "no text": (np.uint16([256, 256]).tobytes(), r"x\.bin: no tokens of text"),
    "a matrix": (np.zeros((2, 2), np.uint16), r"x\.npy holds uint16 of shape \(2, 2\)"),
    "fractions": (np.zeros(4), r"x\.npy holds float64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_told(name, files, tmp_path):
    given, said = WRONG[name]
    if isinstance(given, bytes):
        (tmp_path / "x.bin").write_bytes(given)
        given = {"paths": tmp_path / "x.bin"}
    elif isinstance(given, np.ndarray):
        np.save(tmp_path / "x.npy", given)
        given = {"paths": tmp_path / "x.npy"}
    with pytest.raises(UserError, match=said):
        shards(files, **given).prepare()


def test_a_shard_on_both_sides_is_refused(files):
    with pytest.raises(UserError, match=r"0\.npy is among the training shards and held out"):
        shards(files, validation_paths=[files / "held_out.npy", files / "0.npy"]).prepare()


@pytest.mark.thorough
def test_a_run_on_shards_goes_on_and_counts_for_its_router(files, runs):
    """A hash router's table is made from the training tokens."""
    other = ("TextData", "TopK", "train.steps")
    kept = [line for line in BASE.splitlines() if not any(word in line for word in other)]
    config = files / "shards.gin"
    paths = [str(files / "0.npy"), str(files / "[12].bin")]
    config.write_text(
        "\n".join(kept)
        + f"""
train.data = @TokenShards()
TokenShards.paths = {paths}
TokenShards.tokenizer = {str(files / "tokenizer")!r}
TokenShards.validation_paths = {str(files / "held_out.npy")!r}
train.steps = 4
MoELayer.router = @Hash
Hash.table = @BalancedTable()
"""
    )
    whole = runs.done("whole", config=config)
    gin.clear_config()
    assert runs("paused", "train.stop_at = 2", config=config) == 0
    runs.done("paused", config=config)
    assert measured(runs.folder / "paused") == measured(whole)
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary["baselines"]) == {"unigram", "gzip", "xz"}
    result = files / "result.json"
    with quick():
        assert cli.main(["eval", f"--workdir={whole}", f"--json={result}"]) == 0
    scored = json.loads(result.read_text())["bits_per_byte"]
    assert scored == pytest.approx(summary["val_bits_per_byte"], rel=1e-5)
