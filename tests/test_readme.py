"""Every shell block of the README runs, in order and in one folder, as its reader would type it.

Three commands are watched instead of run at full size: `make` shows what it would do (CI runs the
targets themselves), `pip` checks that the extras exist, and `moe train` gets a smaller text, a
smaller model and two steps.
"""

import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import pytest
from tiny import environment

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
SMALL = (
    "TrainedBPE.vocab_size = 300",
    "Transformer.d_model = 16",
    "Transformer.num_layers = 1",
    "Transformer.num_heads = 2",
    "MoELayer.d_ff = 16",
    "train.sequence_length = 32",
    "train.batch_size = 4",
    "train.steps = 2",
    "train.prompts = ('def ',)",
)


def command(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\nset -e\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def shell(tmp_path):
    """A folder with a reader's commands first on the path."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    moe = f'exec "{sys.executable}" -m moe "$@"'
    small = " ".join(f'--gin_bindings="{binding}"' for binding in SMALL)
    repeat = "*config.gin*"  # a run's own config says all of it already
    command(
        bin_,
        "moe",
        f'if [[ $1 == train && $* != {repeat} ]]; then set -- "$@" {small}; fi\n'
        f"if [[ $1 == train && $* != *TextFiles* && $* != {repeat} ]]; then\n"
        f'  set -- "$@" --gin_bindings="StandardLibrary.max_bytes = 200_000"\nfi\n{moe}',
    )
    command(bin_, "make", f'exec {MAKE} -n -C "{ROOT}" VENV=/nowhere "$@"')
    extras = "\n".join(re.findall(r'^        "(\w+)":', (ROOT / "setup.py").read_text(), re.M))
    command(
        bin_,
        "pip",
        'for extra in $(grep -oP "(?<=\\[)\\w+" <<< "$*"); do\n'
        f'  grep -qx "$extra" <<< "{extras}" || {{ echo "no extra $extra"; exit 1; }}\ndone',
    )
    own = {
        **environment(),
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "MAKEFLAGS": "",
    }
    work = tmp_path / "work"
    work.mkdir()

    def run(block: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-e", "-c", block], cwd=work, env=own, capture_output=True, text=True
        )

    return run


@pytest.mark.thorough
def test_every_shell_block_runs(shell, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    kinds = re.findall(r"^```(\w*)$", readme, re.MULTILINE)[::2]
    assert set(kinds) == {"sh", "text", "python"}, "every block says what it is"
    assert len(blocks) == kinds.count("sh") >= 5
    out = ""
    for block in blocks:
        done = shell(block)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        out += done.stdout
    assert "this model" in out and "bits_per_byte" in out
    assert (tmp_path / "work/runs/quickstart/picture.png").stat().st_size > 10_000


def test_the_python_block_runs(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.startswith("(1, 5, 257) [[")
