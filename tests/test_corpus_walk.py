"""Walks through folders and globs: they end, and account for each entry."""

import glob
import os
from pathlib import Path

import pytest

from moe.data.corpora.corpus import JsonLines, TextFiles
from moe.data.corpora.walk import find_files
from moe.errors import UserError


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return str(folder)


def names(paths):
    return [name for name, _ in find_files(paths)]


def error_of(paths):
    with pytest.raises(UserError) as caught:
        find_files(paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "**", "**/**/*"])
def test_links_that_make_endless_names_are_read_once(tmp_path, pattern):
    """Two links to the folder itself make 2^40 names before the system stops following them."""
    write(tmp_path, "a.txt", "sub/b.txt")
    for link in ("0", "z", "sub/up"):
        (tmp_path / link).symlink_to(tmp_path)
    assert names(str(tmp_path / pattern)) == ["a.txt", "sub/b.txt"]


def test_folders_that_are_linked_twice_at_each_level_are_listed_once(tmp_path):
    """Without a memory, 2^30 ways."""
    folder = tmp_path
    for _ in range(30):
        (folder / "r").mkdir()
        (folder / "s").symlink_to(folder / "r")
        folder /= "r"
    write(folder, "a.txt")
    left_out = {}
    assert len(find_files(str(tmp_path), left_out=left_out)) == 1
    assert [len(places) for places in left_out.values()] == [30]


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_folders_deeper_than_python_calls_itself(tmp_path, pattern, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        os.mkdir("d")
        os.chdir("d")
    write(Path("."), "a.txt")
    try:
        assert names(str(tmp_path / pattern)) == ["d/" * 1100 + "a.txt"]
    finally:  # pytest's own clearing up calls itself
        os.remove("a.txt")
        for _ in range(1100):
            os.chdir("..")
            os.rmdir("d")


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_a_path_that_is_too_long_to_open_is_an_error(tmp_path, pattern, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(45):
        os.mkdir("d" * 100)
        os.chdir("d" * 100)
    write(Path("."), "a.txt")
    assert "too long" in error_of(str(tmp_path / pattern))


PATTERNS = """* *.txt ** **/*.txt **/**/*.txt s*/* */* **/b/* **/b/**/*.txt */b/?.txt [ax].txt b/*
    .h*/* **/.h/* **/.* */*/*.md s/b/*.txt b*.txt **/s* nothing/*"""


@pytest.mark.parametrize("pattern", PATTERNS.split())
def test_patterns_find_what_pythons_own_glob_finds(tmp_path, pattern):
    write(tmp_path, "a.txt", "b.md", "b/c.txt", "s/x.txt", "s/b/x.txt", "s/b/b/y.txt", "s/b/z.md")
    write(tmp_path, ".h/k.txt", "s/.h/l.txt", "s/.m.txt")
    there = glob.glob(str(tmp_path / pattern), recursive=True)
    expected = sorted({os.path.realpath(path) for path in there if os.path.isfile(path)})
    if expected:
        found = find_files(str(tmp_path / pattern))
        assert sorted(os.path.realpath(path) for _, path in found) == expected
    else:
        assert "no file matches" in error_of(str(tmp_path / pattern))


def test_each_reason_is_told_with_its_number_and_three_examples(tmp_path):
    write(tmp_path, "a.jsonl", *(f"{i}.md" for i in range(5)), ".hidden/b.jsonl", ".c.jsonl")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "z.jsonl").symlink_to("a.jsonl")
    corpus = JsonLines(str(tmp_path))
    assert len(list(corpus.documents())) == 1
    at = f"{tmp_path}/"
    assert sorted(corpus.left_out()) == [
        f"left out, another suffix: {at}0.md, {at}1.md, {at}2.md and 2 more",
        f"left out, hidden: {at}.c.jsonl, {at}.hidden",
        f"left out, reached before by another name: {at}z.jsonl",
    ]


@pytest.mark.parametrize("given", ["", [], ["a\0b"], "x" * 5000, "x" * 5000 + "*", "a.txt/b/c"])
def test_paths_that_name_nothing_are_one_line(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.txt")
    assert error_of(given)


def test_a_user_that_is_not_there_is_no_folder():
    assert "no file or folder" in error_of("~nobody-of-this-name/texts")


def test_the_shortest_name_of_a_file_stands(tmp_path):
    write(tmp_path, "z/far.txt")
    write(tmp_path / "a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "z")
    assert [d.name for d in TextFiles(str(tmp_path)).documents()] == ["z/far.txt"]
