"""A config is data: what a received one says runs nothing, reads and writes nothing elsewhere."""

import importlib
import json
import os
from pathlib import Path
import sys
import time

import gin
import pytest

from moe import settings
from moe.cli import config, main
from moe.errors import UserError, printable
from moe.runs.storage.folder import RunFolder

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CANARY = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder with a module that leaves a trace where it is imported."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    (tmp_path / "evil_module.py").write_text(CANARY)
    return tmp_path


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def refused(*files: str, **how) -> str:
    with pytest.raises(UserError) as caught:
        settings.load(files, **how)
    return str(caught.value)


@pytest.mark.parametrize("form", ["import evil_module", "from evil_module import x"])
@pytest.mark.parametrize("command", ["eval", "generate", "describe"])
def test_a_run_folder_runs_no_code(evil, capsys, form, command):
    write(evil / "config.gin", f"include 'quickstart.gin'\n{form}\n")
    assert main.main([command, f"--workdir={evil}"]) == main.MISTAKE
    said = capsys.readouterr().err
    assert "config.gin:2" in said and "--import=evil_module" in said, said
    assert not (evil / "evil_module.ran").exists() and str(evil) not in sys.path


def test_a_module_that_the_user_names_is_imported(evil, monkeypatch):
    write(evil / "config.gin", "include 'quickstart.gin'\nimport evil_module\n")
    monkeypatch.syspath_prepend(evil)
    config.of_folder(str(evil), imports=["evil_module"])
    assert (evil / "evil_module.ran").exists()


def test_a_config_of_the_users_own_imports_what_lies_beside_it(evil):
    settings.load([write(evil / "own.gin", "import evil_module\n")])
    assert (evil / "evil_module.ran").exists()


def test_a_config_that_cannot_be_read_imports_nothing(evil):
    refused(write(evil / "own.gin", "import evil_module\ntrain.steps = = 3\n"))
    assert not (evil / "evil_module.ran").exists()


def test_a_received_config_chooses_no_cache(tmp_path):
    text = "include 'quickstart.gin'\nTextData.cache_dir = '/somewhere'\n"
    write(tmp_path / "config.gin", text)
    config.of_folder(str(tmp_path))
    assert "cache_dir" not in gin.config_str()
    config.of_folder(str(tmp_path), ["TextData.cache_dir = '/mine'"])
    assert gin.query_parameter("TextData.cache_dir") == "/mine"


def test_includes_stay_near(tmp_path, monkeypatch):
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    write(tmp_path / "secret.txt", "a word:x:0:0\n")
    os.symlink(tmp_path / "secret.txt", inner / "link.gin")
    for name in ("../secret.txt", str(tmp_path / "secret.txt"), "link.gin"):
        said = refused(write(inner / "own.gin", f"include '{name}'\n"))
        assert "own.gin:1" in said and "outside" in said and "a word" not in said, said


@pytest.mark.parametrize("name", ["9" * 5000, "~nobody_here/x.gin", "a\\0b", "", ".", "\\ud800"])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
    assert "own.gin:1" in refused(write(tmp_path / "own.gin", f"include '{name}'\n"))


def test_includes_that_fan_out_end(tmp_path):
    for n in range(22):
        write(tmp_path / f"{n}.gin", f"include '{n + 1}.gin'\n" * 2)
    write(tmp_path / "22.gin", "")
    started = time.monotonic()
    assert "at most" in refused(str(tmp_path / "0.gin"))
    for n in range(5):
        write(tmp_path / f"{n}.gin", f"include '{n + 1}.gin'\n" * 8)
    write(tmp_path / "5.gin", "")
    assert "256 files" in refused(str(tmp_path / "0.gin"))
    assert time.monotonic() - started < 10


def test_a_config_has_a_size(tmp_path):
    with open(tmp_path / "large.gin", "wb") as file:
        file.truncate(2**40)  # a sparse file: it could not be read
    assert "bytes" in refused(str(tmp_path / "large.gin"))
    assert refused(write(tmp_path / "deep.gin", "train.prompts = " + "(" * 5000))
    assert "bytes" in refused(*[write(tmp_path / "half.gin", "#" * 2**19)] * 3)


def test_mutated_configs_are_refused_in_words_or_are_other_configs(tmp_path, monkeypatch):
    """The short form of benchmarks/faults.py."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    found = importlib.import_module("faults").campaign(80, tmp_path)
    assert found["configs"] == 80 and not found["faults"], found
    assert 20 < found["refused"] and 5 < found["changed"], found


def test_control_characters_are_shown_as_escapes(tmp_path, capsys):
    assert printable("a\x1b]0;b\x07\tc\n\u202e\x9b") == "a\\x1b]0;b\\x07\tc\n\\u202e\\x9b"
    write(tmp_path / "own.gin", "train.steps = '\x1b]0;owned\x07'\n")
    assert main.main(["train", f"--gin_file={tmp_path}/own.gin", f"--workdir={tmp_path}/w"]) == 2
    assert "\x1b" not in capsys.readouterr().err


LINKS = (".lock", "samples.txt", "metrics.jsonl", "checkpoints", "tensorboard/events")


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_through_a_link(tmp_path, name):
    precious, folder = tmp_path / "precious", RunFolder(tmp_path / "run")
    precious.write_text("mine")
    (folder.path / name).parent.mkdir(parents=True)
    (folder.path / name).symlink_to(precious)
    with pytest.raises(UserError, match="link"), folder.locked():
        pass
    assert precious.read_text() == "mine"


DAMAGES = (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, b'{"step": "x"}', b" " * 2**25)


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_damaged_files_of_a_run_are_one_line(tmp_path, damage):
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "3").mkdir(parents=True)
    folder.config.write_text("train.steps = 3\n")
    folder.run.write_bytes(damage)
    folder.summary.write_bytes(damage)
    for call in (
        lambda: folder.refuse_another_run("train.steps = 3\n", {}, 3, ()),
        lambda: folder.complete(3, None),
    ):
        with pytest.raises(UserError, match=r"json is damaged: .*move it away") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage", [b"train.steps = = 3\n", b"\xff\xfe", b"train.steps = (", b"#" * 2**25]
)
def test_a_damaged_config_of_a_run_is_one_line(tmp_path, damage):
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "3").mkdir(parents=True)
    folder.config.write_bytes(damage)
    with pytest.raises(UserError, match=r"config.gin is damaged: .*move it away") as caught:
        folder.refuse_another_run("train.steps = 3\n", {}, 3, ())
    assert "\n" not in str(caught.value)


def test_checkpoints_without_a_config_are_not_continued(tmp_path):
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no config\.gin"):
        folder.refuse_another_run("train.steps = 3\n", {}, 3, ())


def test_a_log_keeps_its_good_lines(tmp_path):
    folder = RunFolder(tmp_path)
    good = [json.dumps({"step": n}) + "\n" for n in (1, 2, 3)]
    bad = ["[]\n", '{"step": null}\n', "\x00\n", "[" * 10**5 + "\n", "x" * 2**25 + "\n"]
    folder.metrics.write_text("".join([*bad, *good, '{"step": 1']))
    folder.cut_logs(2)
    assert folder.metrics.read_text() == "".join(good[:2])


def test_a_run_goes_on_with_a_version_that_has_more_options(tmp_path):
    """At their defaults; recorded ones whose default has changed since are told."""
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "3").mkdir(parents=True)
    folder.config.write_text("train.steps = 3\n\n# Defaults in force:\nTransformer.scan = True\n")

    def refuse(given: str, *defaults: str) -> None:
        lines = ["train.steps = 3", given, "# Defaults in force:", *defaults, ""]
        folder.refuse_another_run("\n".join(lines), {}, 3, ())

    refuse("", "Transformer.scan = True", "train.later = None")
    with pytest.raises(UserError, match=r"differs:\n  Transformer.scan: True there, None here$"):
        refuse("", "Transformer.scan = None", "train.later = None")
    with pytest.raises(UserError, match=r"differs:\n  train.later: not set there, 7 here$"):
        refuse("train.later = 7", "Transformer.scan = True")


def test_another_mesh_is_the_same_run(tmp_path):
    from moe.training.run_spec import RunSpec

    folder = RunFolder(tmp_path)
    (folder.checkpoints / "3").mkdir(parents=True)
    folder.config.write_text("MeshShape.data = 8\ntrain.mesh = @MeshShape()\n")
    may = RunSpec.may_change()
    folder.refuse_another_run("MeshShape.data = 2\nMeshShape.fsdp = 4\n", {}, 3, may)
    with pytest.raises(UserError, match="another run"):
        folder.refuse_another_run("train.seed = 1\n", {}, 3, may)
