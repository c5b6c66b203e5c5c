"""The program: quick help, one line for a mistake, the right exit status."""

import ast
import errno
import importlib.util
import os
from pathlib import Path
import subprocess
import sys
import time
from types import SimpleNamespace

import gin
import pytest

import moe
from moe.cli import main as cli
from moe.cli.commands import COMMANDS, EVAL, GENERATE, TRAIN
from moe.errors import Problems, UserError

ROOT = Path(moe.__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture
def train(monkeypatch):
    """Puts a function in the place of the train command and calls the program."""

    def call(run, *arguments):
        module = SimpleNamespace(run=run)
        monkeypatch.setitem(sys.modules, TRAIN.module, module)
        return cli.main(["train", "--workdir=w", *arguments])

    return call


@pytest.mark.smoke
def test_help_is_quick_and_loads_nothing_heavy(tmp_path):
    code = (
        "import sys; from moe.cli import main as cli; status = cli.main(sys.argv[1:]);"
        "heavy = {'jax', 'flax', 'gin', 'numpy', 'orbax', 'grain', 'rich'} & set(sys.modules);"
        "sys.exit(status or (f'loaded {heavy}' if heavy else 0))"
    )
    for arguments in (["--help"], ["generate", "--help"], ["--version"]):
        command = [sys.executable, "-c", code, *arguments]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
        assert time.perf_counter() - start < 1.0
        assert done.returncode == 0, done.stderr
        assert done.stdout and not done.stderr


def test_every_listed_command_has_a_module_with_run():
    for command in COMMANDS:
        spec = importlib.util.find_spec(command.module)
        assert spec is not None and spec.origin is not None, command.module
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        runs = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run"]
        assert len(runs) == 1 and len(runs[0].args.args) == 1


def test_help_names_every_command_and_flag(capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command.name} " in overview
        assert cli.main([command.name, "--help"]) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {cli.form(flag)} " in text for flag in command.flags)
        assert command.example in text
        assert all(len(line) <= 100 for line in (overview + text).splitlines())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_examples_in_the_help_are_accepted(command, monkeypatch):
    words = command.example.replace('"Once upon"', "Once").split()
    assert words[:2] == ["moe", command.name]
    found = vars(cli.parse(command, words[2:]))
    first = next(name for name in ("topology", "law", "workdir", *found) if name in found)
    given = found[command.positional or first]
    known = ("runs/quickstart", "routed", "my_router.py:MyRouter", "layer", "v5e:2x2", "routers")
    if command.name == "launch":
        assert vars(cli.parse(TRAIN, given[1:]))["gin_file"]
    else:
        assert given in known or given == ["runs/routers"] or found["gin_file"]


def test_flags_become_attributes():
    given = ["--workdir", "w", "--gin_file=a", "--gin_file=b,c", "--gin_bindings=x.y = [1, 2]"]
    assert vars(cli.parse(TRAIN, given)) == {
        "workdir": "w",
        "gin_file": ["a", "b,c"],
        "gin_bindings": ["x.y = [1, 2]"],
        "json": None,
        **dict.fromkeys(("processes", "coordinator", "process")),
    }
    assert vars(cli.parse(EVAL, ["--workdir=w", "--step=0"])) == {
        "workdir": "w",
        "gin_bindings": [],
        "import": [],
        "step": 0,
        "weights": None,
        "weights_of": None,
        "rounding": "nearest",
        "calibration_bytes": None,
        "json": None,
    }
    assert vars(cli.parse(GENERATE, ["--workdir=w", "--prompt=--help", "--top_p=0.9"])) == {
        "workdir": "w",
        "prompt": "--help",
        "tokens": None,
        "temperature": 1.0,
        "top_k": None,
        "top_p": 0.9,
        "min_p": None,
        "repetition_penalty": 1.0,
        "context": None,
        "draft": None,
        "beams": None,
        "ahead": 4,
        "order": "surest",
        "seed": 0,
        "count": 1,
        "rounding": "nearest",
        **dict.fromkeys(("best_of", "weights", "weights_of", "calibration_bytes")),
        **{name: [] for name in ("import", "logit_bias")},
        "json": None,
    }


MISTAKES = {
    "trian": "unknown command 'trian'; did you mean 'train'?",
    "xyzzy": "unknown command 'xyzzy'; there are train, launch, eval, generate",
    "--workdir=w train": "the command comes first",
    "train": "moe train needs --workdir=FOLDER",
    "train --workdir=": "moe train needs --workdir=FOLDER",
    "train --workdir": "--workdir has no value",
    "train --wrkdir=w": "unknown flag --wrkdir; did you mean '--workdir'?",
    "train --workdir=w --zzz": "unknown flag --zzz; there are --workdir, --gin_file,",
    "train --workdir=w quickstart.gin": "did you mean --gin_file=quickstart.gin?",
    "train quickstart.gin --workdir=w": "did you mean --gin_file=quickstart.gin?",
    "eval --workdir=w --step=-1": "--step=-1: expected a whole number of at least 0",
    "generate --workdir=w --tokens=abc": "--tokens=abc: expected a whole number of at least 1",
    "generate --workdir=w --tokens=0": "--tokens=0: expected a whole number of at least 1",
    "generate --workdir=w --tokens=1.5": "--tokens=1.5: expected a whole number",
    "generate --workdir=w --temperature=nan": "expected a number of at least 0",
    "generate --workdir=w --temperature=inf": "expected a number of at least 0",
    "generate --workdir=w --top_p=2": "--top_p=2.0: expected a number from 0 to 1",
}


@pytest.mark.parametrize("line, expected", MISTAKES.items(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_status_2(line, expected, capsys):
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert not out and expected in err
    assert err.startswith("moe: error: ") and err.count("\n") == 1


def test_the_program_tells_a_mistake_without_a_traceback(tmp_path):
    done = program("generate", "--workdir=w", "--tokens=abc", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1


def raises(error: BaseException):
    def run(flags):
        raise error

    return run


def test_a_users_error_of_a_command_is_told(train, capsys):
    assert train(raises(UserError("no corpus 'x'"))) == 2
    assert capsys.readouterr().err == "moe: error: no corpus 'x'\n"
    assert train(raises(Problems(["a.gin:1: x", "b.gin:2: y"]))) == 2
    assert capsys.readouterr().err == "moe: error: 2 problems\n  a.gin:1: x\n  b.gin:2: y\n"
    assert (
        train(raises(UserError("what differs:\nthis\nand that"))) == 2
    )  # one mistake of three lines
    assert capsys.readouterr().err == "moe: error: what differs:\n  this\n  and that\n"


def test_the_status_of_a_command_is_the_programs(train):
    assert train(lambda flags: 0 if flags.json == "out" else 1, "--json=out") == 0
    assert train(lambda flags: 3) == 3


def test_an_interrupt_is_one_line(train, capsys):
    assert train(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "moe: interrupted\n"


@pytest.mark.parametrize("number", (errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOTDIR))
def test_a_disk_that_refuses_is_one_line_with_its_path(number, train, capsys):
    assert train(raises(OSError(number, os.strerror(number), "/full/disk"))) == 2
    assert capsys.readouterr().err == f"moe: error: /full/disk: {os.strerror(number)}\n"
    assert train(raises(OSError(number, os.strerror(number)))) == 2
    assert capsys.readouterr().err == f"moe: error: w: {os.strerror(number)}\n"


def test_a_file_where_the_folder_should_be(tmp_path, train, capsys):
    (tmp_path / "file").touch()
    assert train(lambda flags: (tmp_path / "file").mkdir(exist_ok=True)) == 2
    assert capsys.readouterr().err == f"moe: error: {tmp_path}/file: File exists\n"


@gin.configurable(module="cli_tests")
def fault(kind, needed=gin.REQUIRED):
    if kind == "inner":
        return _two(*[1])
    raise kind


def _two(a, b):
    return a + b


@gin.configurable(module="cli_tests")
class Needy:
    def __init__(self, *, width: int):
        self.width = width


def test_errors_that_passed_through_gin_are_still_told_apart(train, capsys):
    """gin hides errno and filename, and appends where the error was."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")
    for error in (UserError("bad size"), full):
        assert train(lambda flags, e=error: fault(e, needed=1)) == 2
    expected = "moe: error: bad size\nmoe: error: /full/disk: No space left on device\n"
    assert capsys.readouterr().err == expected


def test_a_parameter_that_the_config_forgot_is_named(train, capsys):
    assert train(lambda flags: fault(1)) == 2
    assert train(lambda flags: Needy()) == 2
    expected = "fault: 'needed'", "Needy: 'width'"
    lines = [f"moe: error: the config sets no value for {name}\n" for name in expected]
    assert capsys.readouterr().err == "".join(lines)


def test_a_fault_of_the_program_keeps_its_traceback(train):
    for error in (ValueError("shape"), KeyError("x"), OSError(errno.ENOENT, "gone", "x")):
        with pytest.raises(type(error)):
            train(raises(error))
    with pytest.raises(TypeError, match="_two"):
        train(lambda flags: fault("inner", needed=1))


def test_text_that_is_not_utf8_is_refused(capsys):
    """Bytes of the command line that are no UTF-8 come as halves of surrogate pairs."""
    words = ["generate", "--workdir=nowhere", "--prompt=caf\udce9"]
    assert cli.main(words) == 2
    assert "--prompt holds bytes that are not UTF-8" in capsys.readouterr().err
    assert cli.main(["train", "--workdir=w", "--gin_bindings=train.prompts = ('\udce9',)"]) == 2
    assert "--gin_bindings holds bytes that are not UTF-8" in capsys.readouterr().err
    assert cli.main(["train", "--workdir=caf\udce9", "--gin_file=quickstart.gin"]) == 2
    assert "--workdir holds bytes that are not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eval", "train"])
def test_a_file_of_results_that_cannot_be_is_told_before_the_work(name, tmp_path, capsys):
    """Not after hours of it."""
    where = tmp_path / "nowhere" / "results.json"
    given = [f"--workdir={tmp_path / 'run'}", f"--json={where}"]
    given += ["--gin_file=quickstart.gin"] if name == "train" else []
    assert cli.main([name, *given]) == 2
    assert f"--json={where}: there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
