"""`moe verify` finds what is damaged in a run's folder, names it, and needs no device.

Broken on purpose: only the first fault told; pipes opened; the tokenizer not compared.
"""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import pytest
from tiny import Runs, environment

from moe.cli import main as cli
from moe.runs.storage.folder import RunFolder

SETTINGS = ("train.steps = 4", "train.save_every = 2", "train.keep = 2", "train.artifacts = False")
BPE = ("TextData.tokenizer = @TrainedBPE()", "TrainedBPE.vocab_size = 270")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return Runs(tmp_path_factory.mktemp("verify")).done("run", *SETTINGS, *BPE)


@pytest.fixture
def run(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "run")


def verified(path: Path, capsys) -> tuple[int, list[str]]:
    status = cli.main(["verify", str(path)])
    captured = capsys.readouterr()
    assert captured.err == ""
    return status, captured.out.splitlines()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)


def test_a_sound_run_has_a_line_for_each_part(run, capsys):
    status, lines = verified(run, capsys)
    assert status == 0
    names = [line.split(": ")[0] for line in lines]
    assert names == [
        *("step 2", "step 4", "config.gin", "run.json", "tokenizer/tokenizer.json"),
        *("metrics.jsonl", "routing.jsonl", "documents.jsonl", "summary.json"),
    ]
    assert all(line.split(": ")[1].startswith("sound") for line in lines)
    # As a kill leaves it: half a line, and a save that did not end.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    (run / "checkpoints" / "6.orbax-checkpoint-tmp-1").mkdir()
    shutil.copytree(run / "checkpoints" / "2" / "state", run / "checkpoints/being-deleted/1/state")
    status, lines = verified(run, capsys)
    assert status == 0
    assert "metrics.jsonl: sound (5 lines, the last one cut off, as a kill may leave it)" in lines
    assert any(
        line.startswith("6.orbax-checkpoint-tmp-1: sound (a save that did") for line in lines
    )


def test_every_damaged_file_of_a_checkpoint_is_named(run, capsys, tmp_path):
    step = run / "checkpoints" / "2"
    altered = largest(step)
    flip(altered)
    (step / "metadata-that-came").write_text("")
    (missing,) = step.glob("_CHECKPOINT_METADATA")
    missing.unlink()
    out = tmp_path / "found.json"
    assert cli.main(["verify", str(run), f"--json={out}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 2: damaged: ")
    for words in (
        f"{altered.relative_to(step)} was altered",
        "metadata-that-came is no file of it",
        "_CHECKPOINT_METADATA is missing",
    ):
        assert words in lines[0]
    assert lines[1].startswith("step 4: sound")
    assert lines[-1] == "1 of 9 damaged: step 2"
    found = json.loads(out.read_text())
    assert found["sound"] is False
    assert {len(part["faults"]) for part in found["parts"]} == {0, 3}
    for narrower, status in ((step, 1), (step.parent, 1), (step.with_name("4"), 0)):
        assert verified(narrower, capsys)[0] == status
    os.mkfifo(altered.with_name("pipe"))
    assert "pipe is no file" in verified(step, capsys)[1][0]


def cut_json(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def other_merges(path: Path) -> None:
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))


def broken_line(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"step": 3', b'"step" 3'))


def no_binding(path: Path) -> None:
    path.write_text("train.steps = = 3\n")


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("config.gin", no_binding, "config.gin: damaged: "),
        ("config.gin", Path.unlink, "config.gin: damaged: it is missing"),
        ("run.json", cut_json, "run.json: damaged: "),
        ("summary.json", cut_json, "summary.json: damaged: "),
        ("metrics.jsonl", broken_line, "1 of 4 lines are no JSON, the first in line 3"),
        ("routing.jsonl", broken_line, "routing.jsonl: damaged: 1 of 4"),
        ("tokenizer/tokenizer.json", other_merges, "is not the tokenizer that run.json records"),
    ],
)
def test_damaged_run_files_are_named(name, damage, words, run, capsys):
    damage(run / name)
    status, lines = verified(run, capsys)
    assert status == 1
    assert any(words in line for line in lines)
    assert lines[-1].startswith("1 of 9 damaged") or name == "run.json"


def test_an_altered_tokenizer_is_not_measured_with(run, capsys):
    other_merges(RunFolder(run).tokenizer / "tokenizer.json")
    assert cli.main(["generate", f"--workdir={run}", "--tokens=1"]) == 2
    assert "is not the tokenizer that run.json records" in capsys.readouterr().err


def test_what_is_no_run_is_told(tmp_path, capsys):
    for path, words in (
        (tmp_path, "holds no run and no checkpoint"),
        (tmp_path / "no", "is no folder"),
    ):
        assert cli.main(["verify", str(path)]) == 2
        assert words in capsys.readouterr().err


def test_no_device_is_needed(sound):
    command = [sys.executable, "-m", "moe", "verify", str(sound)]
    nowhere = environment() | {"JAX_PLATFORMS": "nowhere"}
    done = subprocess.run(command, env=nowhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": sound") == 9
