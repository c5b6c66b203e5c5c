"""Runs that take seconds: a corpus of pseudo-words, a model of width 16, one device."""

import contextlib
import json
import os
from pathlib import Path
import random
import subprocess
import sys

import jax
import pytest

import moe
from moe.cli import main as cli
from moe.machine import hardware, xla_flags
from moe.model.sharding import MeshShape

ROOT = Path(moe.__file__).resolve().parents[1]

BASE = """
train.data = @TextData()
TextData.corpus = @TextFiles()
TextData.tokenizer = @Bytes()
train.model = @Transformer
Transformer.d_model = 16
Transformer.num_layers = 2
Transformer.num_heads = 2
Transformer.moe = @MoELayer
MoELayer.num_experts = 4
MoELayer.d_ff = 16
MoELayer.router = @TopK
TopK.k = 2
train.steps = 12
train.batch_size = 4
train.sequence_length = 32
train.log_every = 1
train.prompts = ()
"""


def environment(devices: int = 1) -> dict[str, str]:
    """For a process of the program: this one, so many virtual devices, quick to compile."""
    flags = " ".join(xla_flags.flags(devices=devices))
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def corpus(folder: Path, documents: int = 30) -> Path:
    """Files of 60 pseudo-words each, the same ones every time."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    folder.mkdir(parents=True)
    for i in range(documents):
        (folder / f"{i:02}.txt").write_text(" ".join(draw.choices(words, k=60)) + "\n")
    return folder


AS_NOBODY = """
import os, sys
from moe.data.corpora.corpus import TextFiles
from moe.errors import UserError
if os.getuid() == 0:
    os.setuid(65534)
try:
    list(TextFiles(sys.argv[1]).documents())
except UserError as error:
    print(error)
"""


def read_by_nobody(path: str | Path) -> subprocess.CompletedProcess:
    """TextFiles(path) read by a process that is not the superuser; it prints the user's error."""
    command = [sys.executable, "-c", AS_NOBODY, str(path)]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


@contextlib.contextmanager
def quick():
    """One device where none are named, no measuring of the machine, compiled programs kept."""
    build = MeshShape.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "matmul_peak", lambda dtype: 1e11)

        def one_device(shape, devices=None):
            return build(shape, jax.devices()[:1] if is_default(shape) else devices)

        patch.setattr(MeshShape, "build", one_device)
        yield


def is_default(shape: MeshShape) -> bool:
    return (shape.data, shape.fsdp, shape.expert, shape.tensor) == (-1, 1, 1, 1)


class Runs:
    """A folder with a corpus, a config and the runs that are made of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.text = corpus(folder / "text")
        self.config = folder / "tiny.gin"
        self.config.write_text(BASE + f"TextFiles.paths = {str(self.text)!r}\n")

    def __call__(self, name: str, *bindings: str, config: Path | None = None) -> int:
        """`moe train` in this process; the exit status."""
        given = [f"--gin_bindings={binding}" for binding in bindings]
        with quick():
            workdir = f"--workdir={self.folder / name}"
            return cli.main(["train", f"--gin_file={config or self.config}", workdir, *given])

    def done(self, name: str, *bindings: str, config: Path | None = None) -> Path:
        """The folder of a run that ended well."""
        assert self(name, *bindings, config=config) == 0
        return self.folder / name


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(run: Path) -> list[dict]:
    """metrics.jsonl without the machine's speed."""
    found = lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in found]


def arrays(run: Path, step: int) -> dict:
    """Every array of a checkpoint by name, as it lies on disk."""
    import orbax.checkpoint as ocp

    checkpointer = ocp.StandardCheckpointer()
    return checkpointer.restore((run / "checkpoints" / str(step) / "state").absolute())
