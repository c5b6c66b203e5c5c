"""Reading a corpus's files: packed ones whole or not at all, and odd text as one line."""

import bz2
import gzip
import json
import lzma
import os
import random
import sys
import tempfile

import pytest
from tiny import read_by_nobody
import zstandard

from moe.data.corpora.corpus import Document, JsonLines, Parquet, TextFiles, hashed_hold_out
from moe.data.corpora.split import whole
from moe.errors import UserError

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACK[".zst"] = zstandard.ZstdCompressor(write_checksum=True).compress  # as the program zstd does


def texts(corpus):
    return [document.text for document in corpus.documents()]


def error_of(corpus, read=texts):
    with pytest.raises(UserError) as caught:
        read(corpus)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", PACK)
def test_packed_files_are_read_whole(suffix, tmp_path):
    """Two frames, one behind the other, as `cat` and parallel compressors leave them."""
    lines = [json.dumps({"text": f"{i} {'x' * i}"}).encode() + b"\n" for i in range(3000)]
    data = b"".join(map(PACK[suffix], (b"".join(lines[:2000]), b"".join(lines[2000:]))))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(data)
    assert texts(JsonLines(str(tmp_path))) == [f"{i} {'x' * i}" for i in range(3000)]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("part", [0.3, 0.99])
def test_a_packed_file_that_was_cut_off_is_no_shorter_text(suffix, part, tmp_path):
    data = PACK[suffix](os.urandom(200_000).hex().encode())
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: int(part * len(data))])
    assert error_of(TextFiles(str(path))).startswith(f"{path}: the compressed file is damaged: ")


@pytest.mark.parametrize("suffix", PACK)
def test_a_packed_file_with_damage_inside_is_named(suffix, tmp_path):
    data = bytearray(PACK[suffix](random.Random(0).randbytes(20_000).hex().encode()))
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data)
    assert error_of(TextFiles(str(path))).startswith(f"{path}: ")


def test_zstandard_files_may_start_with_what_is_skipped(tmp_path):
    """pzstd writes such a frame before each of its own."""
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
    (tmp_path / "a.txt.zst").write_bytes(skipped + zstandard.compress(b"text"))
    assert texts(TextFiles(str(tmp_path))) == ["text"]


def test_zstandard_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install 'moe-routing[zst]'" in error_of(TextFiles(str(tmp_path)))


def test_text_that_starts_like_a_packed_file_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("BZh, said the bee")
    assert texts(TextFiles(str(tmp_path))) == ["BZh, said the bee"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16", "utf-32-be"])
def test_a_byte_order_mark_is_no_text_in_any_encoding(encoding, tmp_path):
    mark = "" if encoding == "utf-16" else "\ufeff"  # which writes its own
    (tmp_path / "a.txt").write_bytes(f"{mark}one\ufefftwo".encode(encoding))
    assert texts(TextFiles(str(tmp_path), encoding=encoding)) == ["one\ufefftwo"]


def test_a_byte_order_mark_counts_where_a_byte_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc\xff")
    assert "byte 6 is not UTF-8" in error_of(TextFiles(str(tmp_path)))
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\xff\n')
    assert "byte 17 is not UTF-8" in error_of(JsonLines(str(tmp_path)))


def test_json_lines_of_several_files_in_one_may_have_several_marks(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n' * 2)
    assert texts(JsonLines(str(tmp_path))) == ["a", "a"]


@pytest.mark.parametrize("encoding", ["undefined", "a\0b", "rot13", "utf-nine"])
def test_encodings_that_read_no_text(encoding, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert "is not an encoding" in error_of(TextFiles(str(tmp_path), encoding=encoding))


def test_parquet_text_that_is_not_utf_8_is_named(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    offsets, data = pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, data])
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert error_of(Parquet(str(tmp_path))).startswith(f"{tmp_path / 'a.parquet'}: ")


class Mine:
    """A corpus of one's own."""

    name = "mine"
    holds_out = staticmethod(hashed_hold_out)

    def documents(self):
        yield Document("odd", "half \ud800")


def test_text_that_utf_8_cannot_write_is_named_whatever_corpus_it_is_of(tmp_path):
    assert "document 'odd' holds an unpaired surrogate" in error_of(Mine(), whole)
    (tmp_path / "a.txt").write_bytes(b"\\ud800")
    corpus = TextFiles(str(tmp_path), encoding="unicode_escape")
    assert "document 'a.txt' holds an unpaired surrogate" in error_of(corpus, whole)


def test_a_corpus_of_nulls_says_that_they_were_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 5)
    said = error_of(JsonLines(str(tmp_path)), whole)
    assert "is empty" in said and "left out, null: " in said and "and 2 more" in said


def test_a_file_that_cannot_be_opened_is_named():
    """By a process that is not the superuser, in a folder that all may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "a.txt")
        with open(path, "w") as file:
            file.write("text")
        os.chmod(path, 0)
        done = read_by_nobody(folder)
    assert f"{path}: Permission denied" in done.stdout, done.stderr
