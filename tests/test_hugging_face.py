"""Data sets of the library `datasets`, from folders: the hub is beyond the tests' reach."""

import importlib
import json
import sys

import pytest

from moe.data.corpora.hugging_face import HuggingFaceDataset
from moe.data.corpora.split import split, whole
from moe.data.mixture import Mixture
from moe.data.text import TextData
from moe.data.tokens.tokenizer import Bytes
from moe.errors import UserError

ROWS = [f"row {i}" for i in range(20)]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, with a cache of its own and without its bars."""
    datasets = pytest.importorskip("datasets")
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


def folder_of(path, **splits):
    """A folder of JSON lines, a file for each split."""
    path.mkdir(parents=True)
    for name, texts in splits.items():
        lines = (json.dumps({"text": text, "number": i}) for i, text in enumerate(texts))
        (path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(path)


def error_of(corpus):
    with pytest.raises(UserError) as caught:
        list(corpus.documents())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_are_documents_that_are_named_alike_wherever_the_folder_is(datasets, tmp_path):
    corpora = [
        HuggingFaceDataset(folder_of(tmp_path / at / "mine", train=ROWS, test=["held"]))
        for at in ("here", "there")
    ]
    found = [(d.name, d.text) for d in corpora[0].documents()]
    assert found == [(f"train:{i}", text) for i, text in enumerate(ROWS)]
    assert [corpus.name for corpus in corpora] == ["mine", "mine"]
    assert whole(corpora[0]).sha256 == whole(corpora[1]).sha256
    test = HuggingFaceDataset(corpora[0].path, split="test")
    assert [(d.name, d.text) for d in test.documents()] == [("test:0", "held")]
    part = HuggingFaceDataset(corpora[0].path, split="train[:10%]")
    assert [d.text for d in part.documents()] == ROWS[:2]


def test_what_save_to_disk_wrote_is_read(datasets, tmp_path):
    rows = datasets.Dataset.from_dict({"text": ROWS})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=rows, test=rows.select([3])).save_to_disk(str(tmp_path / "more"))
    assert [d.text for d in HuggingFaceDataset(str(tmp_path / "one")).documents()] == ROWS
    test = HuggingFaceDataset(str(tmp_path / "more"), split="test")
    assert [(d.name, d.text) for d in test.documents()] == [("test:0", "row 3")]
    missing = HuggingFaceDataset(str(tmp_path / "more"), split="validation")
    assert "no split 'validation'; it has train, test" in error_of(missing)
    assert "no subset" in error_of(HuggingFaceDataset(str(tmp_path / "more"), subset="en"))


def test_nulls_are_left_out_and_told_by_mixtures_too(datasets, tmp_path):
    path = folder_of(tmp_path / "mine", train=["one", None, "three"])
    corpus = HuggingFaceDataset(path)
    assert [d.name for d in corpus.documents()] == ["train:0", "train:2"]
    assert corpus.left_out() == [f"left out, null: {path}: row 1 of train"]
    said = []
    data = TextData(
        Mixture([corpus, HuggingFaceDataset(path)]),
        validation_corpus=HuggingFaceDataset(folder_of(tmp_path / "other", train=["else"])),
        tokenizer=Bytes(),
        cache_dir=tmp_path / "tokens",
    )
    data.prepare(said.append)
    assert "\n".join(said).count("left out, null") == 1  # the same row twice


def test_it_is_split_by_row_as_other_corpora_are(datasets, tmp_path):
    corpus = HuggingFaceDataset(folder_of(tmp_path / "mine", train=ROWS))
    train, validation = split(corpus, 0.3, 0)
    assert sorted([*train.texts(), *validation.texts()]) == sorted(ROWS)
    assert validation.num_documents == sum(
        corpus.holds_out(f"train:{i}", 0.3, 0) for i in range(20)
    )


def test_errors_name_the_data_set(datasets, tmp_path):
    path = folder_of(tmp_path / "mine", train=ROWS)
    assert "did you mean 'text'" in error_of(HuggingFaceDataset(path, column="texts"))
    assert "row 0 of train: column 'number' holds int" in error_of(
        HuggingFaceDataset(path, column="number")
    )
    said = error_of(HuggingFaceDataset(path, split="trian"))
    assert said.startswith(f"the data set {path!r} can't be read: ") and "'train'" in said
    assert "'en' not found" in error_of(HuggingFaceDataset(path, subset="en"))
    assert "did you mean 'mine'" in error_of(HuggingFaceDataset(str(tmp_path / "mien")))
    (tmp_path / "mine" / "train.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert "JSON parse error" in error_of(HuggingFaceDataset(path))


def test_a_damaged_file_of_rows_is_an_error_with_its_name(datasets, tmp_path):
    path = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(str(path))
    [arrow] = path.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:300])
    assert str(path) in error_of(HuggingFaceDataset(str(path)))


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'moe-routing[datasets]'" in error_of(HuggingFaceDataset(str(tmp_path)))


def test_reading_a_config_does_not_import_the_library():
    importlib.reload(importlib.import_module("moe.cli.configurables"))
    assert HuggingFaceDataset("owner/name").name == "owner/name"
    assert HuggingFaceDataset("owner/name", subset="en").name == "owner/name:en"
