"""What a user may get wrong: one clear line, status 2, no traceback, and nothing lost."""

import fcntl
from pathlib import Path
import subprocess
import sys
import time

import pytest
from tiny import Runs, arrays, environment, quick

from moe.cli import main as cli


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("bad_input"))


@pytest.fixture(scope="module")
def base(runs):
    assert runs("base", "train.steps = 3", "train.stop_at = 2") == 0
    return runs.folder / "base"


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


MISTAKES = {
    "heads": (
        ("Transformer.num_heads = 3",),
        ("d_model=16", "num_heads=3"),
    ),
    "too many experts per token": (("TopK.k = 5",), ("k=5", "4")),
    "no capacity": (
        ("MoELayer.capacity = @Capacity()", "Capacity.factor = 0.0"),
        ("Capacity.factor", "above 0 or None, got 0.0"),
    ),
    "no gradient for the router": (("TopK.k = 1", "TopK.renormalise = True"), ("k=1", "gates=")),
    "a mesh of other devices": (
        ("train.mesh = @MeshShape()", "MeshShape.data = 3"),
        ("data=3", "there are 8"),
    ),
    "a batch that the mesh does not divide": (
        ("train.mesh = @MeshShape()", "MeshShape.data = 8"),
        ("train.batch_size", "8"),
    ),
    "a buffer of nothing": (
        ("MoELayer.dispatcher = @Sorted()", "Sorted.buffer = 0.0"),
        ("Sorted.buffer", "above 0 or None, got 0.0"),
    ),
    "dropout without slots": (
        ("MoELayer.dispatcher = @Sorted()", "FeedForwardExperts.dropout = 0.4"),
        ("MoELayer.dispatcher = @Sorted()", "FeedForwardExperts", "@SlotGather()"),
    ),
    "micro-batches": (("train.accumulate = 3",), ("batch_size=4", "accumulate=3")),
    "a router that sees the future": (
        ("MoELayer.router = @SoftMoE",),
        ("SoftMoE", "TopK", "Switch", "Hash", "MaskedToken"),
    ),
    "an ignored setting": (
        ("MoELayer.router = @Hash", "BalanceLoss.coefficient = 0.1"),
        ("would ignore BalanceLoss.coefficient",),
    ),
    "no such file": (("TextFiles.paths = 'texts'",), ("no file or folder 'texts'",)),
    "a short text": (("train.sequence_length = 100000",), ("100000", "100001", "shorter sequence")),
    "no steps": (("train.steps = 0",), ("train.steps", "at least 1, got 0")),
    "positions": (("Transformer.positions = 'rotery'",), ("rotery", "rotary")),
    "learned positions": (
        ("Transformer.positions = 'learned'", "Transformer.max_length = 8"),
        ("max_length=8", "sequence_length=32"),
    ),
    "no layers": (("Transformer.num_layers = 0",), ("Transformer.num_layers", "at least 1, got 0")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_setting_that_cannot_be_is_one_line(mistake, runs, capsys):
    bindings, expected = MISTAKES[mistake]
    name = f"mistake of {mistake}"
    assert runs(name, *bindings) == 2
    error = capsys.readouterr().err
    assert error.startswith("moe: error: ") and error.count("\n") == 1, error
    assert all(word in error for word in expected), error
    assert not (runs.folder / name / "checkpoints").exists()


def test_a_text_that_cannot_be_is_one_line(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs.folder)
    for name, content in {"empty": b"", "latin": b"caf\xe9 au lait"}.items():
        folder = runs.folder / name
        folder.mkdir()
        for i in range(2):
            (folder / f"{i}.txt").write_bytes(content)
        assert runs(f"run of {name}", f"TextFiles.paths = '{name}'") == 2
    empty, latin = capsys.readouterr().err.splitlines()
    assert "'empty' is empty" in empty
    assert "0.txt: byte 3 is not UTF-8" in latin


@pytest.mark.thorough
def test_an_unused_setting_of_a_file_is_told_and_harmless(runs, capsys):
    config = runs.folder / "hash.gin"
    config.write_text("include 'tiny.gin'\nMoELayer.router = @Hash\n")
    runs.done("hash", "train.steps = 2", config=config)
    assert "settings that this run does not use: TopK.k" in capsys.readouterr().out


def test_the_folder_of_another_run_is_left_alone(runs, base, capsys):
    before, saved = snapshot(base), arrays(base, 2)
    assert runs("base", "train.steps = 3", "Transformer.d_model = 32", "train.seed = 5") == 2
    error = capsys.readouterr().err
    assert "choose another --workdir" in error
    assert "Transformer.d_model: 16 there, 32 here" in error
    assert "train.seed: 0 there, 5 here" in error
    assert snapshot(base) == before
    assert arrays(base, 2).keys() == saved.keys()


def test_another_text_does_not_go_on_with_a_run(runs, base, capsys):
    before = snapshot(base)
    document = runs.text / "00.txt"
    text = document.read_text()
    document.write_text(text + "more\n")
    try:
        assert runs("base", "train.steps = 3", "train.stop_at = 2") == 2
    finally:
        document.write_text(text)
    assert "data " in capsys.readouterr().err
    assert snapshot(base) == before


def test_two_processes_do_not_share_a_folder(runs, base, capsys):
    with (base / ".lock").open("a+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        holder.truncate(0)
        holder.write("process 7 on desk")
        holder.flush()
        before = snapshot(base)
        assert runs("base", "train.steps = 3") == 2
    assert f"{base} is in use by process 7 on desk" in capsys.readouterr().err
    assert snapshot(base) == before


def test_a_file_in_the_place_of_the_folder(runs, capsys):
    (runs.folder / "file").write_text("mine")
    assert runs("file") == 2
    assert runs("file/below") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"moe: error: {runs.folder / 'file'}: File exists"
    assert second.startswith("moe: error: ") and "Not a directory" in second
    assert (runs.folder / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written(runs, capsys):
    with quick():
        given = [f"--gin_file={runs.config}", "--workdir=/dev/null/run"]
        assert cli.main(["train", *given]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_without_a_run(runs, capsys):
    for command in ("eval", "generate"):
        assert cli.main([command, f"--workdir={runs.folder / 'none'}"]) == 2
        assert "holds no run" in capsys.readouterr().err


PROGRAM = "from moe.cli.main import main; sys.exit(main(sys.argv[1:]))"


def child(*arguments: str, code: str = PROGRAM):
    """The program in a process of its own."""
    command = [sys.executable, "-c", f"import sys; {code}", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def test_all_wrong_names_are_told_at_once_and_soon(runs, tmp_path):
    bindings = ("TopK.kk = 2", "Transfomer.d_model = 8", "train.model = @Tranformer")
    given = [f"--gin_bindings={binding}" for binding in bindings]
    workdir = tmp_path / "run"
    start = time.monotonic()
    done = child("train", f"--gin_file={runs.config}", f"--workdir={workdir}", *given)
    seconds = time.monotonic() - start
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "3 problems" in done.stderr
    for near in ("'k'", "'Transformer'", "'@Transformer'"):
        assert f"did you mean {near}" in done.stderr
    assert not workdir.exists()
    assert seconds < 10  # under 3 s on an idle machine; most of it is importing jax


@pytest.mark.thorough
def test_a_full_disk_costs_no_checkpoint(runs, tmp_path):
    """No file may grow over 24 kB: the run ends with status 2, and the next one starts well."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from moe.cli import main as cli;"
        "from moe.machine.user_cache import default_cache_dir;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, resource.RLIM_INFINITY));"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    given = [f"--gin_file={runs.config}", f"--workdir={tmp_path / 'run'}"]
    given += ["--gin_bindings=train.steps = 3", "--gin_bindings=train.save_every = 1"]
    done = child("train", *given, code=code)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("moe: error: ") == 1 and "File too large" in done.stderr, done.stderr
    # Nothing of the cancelled writers of the other files, however they were interleaved.
    assert "Event loop is closed" not in done.stderr and "never retrieved" not in done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
