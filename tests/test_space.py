"""A run that the disk has no room for is told so before it trains.

Broken on purpose: the checkpoint that is being written not counted; those that are there not.
"""

import collections
from pathlib import Path
import shutil

import pytest
from tiny import Runs

from moe.runs.storage import space
from moe.runs.storage.space import Room

Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def with_free(free, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))


def test_nothing_is_trained_where_no_checkpoint_fits(runs, monkeypatch, capsys):
    with_free(50_000, monkeypatch)
    assert runs("full") == 2
    error = capsys.readouterr().err
    # 13,600 parameters or so, with AdamW's two moments, in float32
    assert "a checkpoint takes 1" in error and "kB, and 50.0 kB are free: nothing" in error
    assert error.count("\n") == 1
    assert not (runs.folder / "full" / "metrics.jsonl").exists()


@pytest.mark.thorough
def test_a_run_whose_disk_may_get_full_says_so_and_ends(runs, monkeypatch, capsys):
    """Three checkpoints at a time: two are kept, and one is written before the oldest goes."""
    settings = ("train.save_every = 1", "train.artifacts = False", "train.steps = 4")
    seen: list[Room] = []
    check = space.check

    def told(found: Room, folder: Path, say):
        seen.append(found)
        check(found, folder, say)

    monkeypatch.setattr(space, "check", told)
    with_free(400_000, monkeypatch)
    runs.done("nearly", *settings, "train.stop_at = 2")
    assert (
        "the disk may get full: the run keeps up to 3 checkpoints of 1" in capsys.readouterr().out
    )
    runs.done("nearly", *settings)
    first, again = seen
    assert (first.count, again.count) == (3, 3) and first.each == again.each
    folder = runs.folder / "nearly" / "checkpoints"
    on_disk = sum(path.stat().st_size for path in (folder / "4").rglob("*") if path.is_file())
    assert 0.7 * on_disk < first.each < 1.1 * on_disk  # files of metadata are 38 kB
    assert first.there == 0 and 2 * first.each < again.there < 3 * first.each


@pytest.mark.parametrize(
    ("free", "there", "enough"),
    [(300, 0, True), (299, 0, False), (100, 200, True), (99, 200, False)],
)
def test_what_is_there_counts(free, there, enough):
    assert Room(each=100, count=3, there=there, free=free).enough == enough


def test_few_saves_need_less(runs):
    assert space.size(1_500_000_000) == "1.5 GB" and space.size(12) == "12 bytes"
