"""Deterministic mode: what is refused where, and that runs of it give equal bits.

Broken on purpose: the flag believed wherever its name stands; cuDNN looked for in the reasons, too;
a seed that differs in one of the two processes.
"""

import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import Runs, arrays, environment, measured

from layers.dispatch import SlotGather, Sorted
from layers.kernels.choice import Choice
from moe.runs.determinism import Backend, obstacles

ON = "--xla_gpu_deterministic_ops=true"
H100 = Backend("gpu", "NVIDIA H100 80GB HBM3", f"--xla_other=1 {ON}")
CHUNKS = [Choice("chunks", "cudnn computes in bfloat16, not float32")]
CUDNN = [Choice("cudnn", "it never holds ...")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("determinism"))


@pytest.mark.parametrize(
    ("backend", "attention", "dispatcher", "parts"),
    [
        (Backend("cpu", "cpu", ""), CHUNKS, None, []),
        (Backend("tpu", "TPU v5p", ""), [Choice("splash", "it never holds ...")], Sorted(), []),
        (H100, CHUNKS, SlotGather(), []),
        (H100, CHUNKS, Sorted("hopper"), []),
        (H100._replace(flags=""), CHUNKS, None, [f"XLA_FLAGS has {ON}"]),
        (H100._replace(flags=f"{ON} {ON[:-4]}false"), CHUNKS, None, [f"XLA_FLAGS has {ON}"]),
        (H100._replace(flags="--xla_gpu_deterministic_ops"), CHUNKS, None, []),
        (H100._replace(flags="--xla_gpu_deterministic_ops_not=true"), CHUNKS, None, [ON]),
        (H100, CUDNN, None, ["Attention.implementation = 'chunks'"]),
        (H100, CHUNKS + CUDNN, None, ["Attention.implementation = 'chunks'"]),
        (H100._replace(flags=""), CUDNN, None, [ON, "cuDNN's attention"]),
        (Backend("gpu", "AMD Instinct", ON), CHUNKS, None, ["nothing is known of AMD Instinct"]),
    ],
)
def test_what_has_no_deterministic_path_is_refused_with_the_way_out(
    backend, attention, dispatcher, parts
):
    found = obstacles(backend, attention, dispatcher)
    assert len(found) == len(parts)
    assert all(part in line for part, line in zip(parts, found, strict=True))


def test_the_clock_decides_nothing_in_deterministic_mode(runs, capsys):
    clock = ("train.fit_steps = True", "train.max_seconds = 9.0")
    assert runs("clock", "train.deterministic = True", *clock) == 2
    error = capsys.readouterr().err
    assert "train.fit_steps=True: the number of steps depends on their time" in error
    assert "train.max_seconds=9.0: the clock decides where it ends; leave it out" in error
    assert not (runs.folder / "clock" / "run.json").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("devices", [1, 4])
def test_two_processes_give_equal_bits(runs, devices):
    """With everything that is random: noise of the router, dropout of experts, data, values."""
    given = ["train.deterministic = True", "train.steps = 4", "train.artifacts = False"]
    given += ["MoELayer.router = @NoisyTopK", "FeedForwardExperts.dropout = 0.1"]
    command = [sys.executable, "-m", "moe", "train", f"--gin_file={runs.config}"]
    command += [f"--gin_bindings={binding}" for binding in given]
    found = []
    for number in (1, 2):
        run = runs.folder / f"{devices} devices, {number}"
        done = subprocess.run(
            [*command, f"--workdir={run}"], env=environment(devices), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.append((measured(run), arrays(run, 4)))
    assert found[0][0] == found[1][0]
    jax.tree.map(np.testing.assert_array_equal, found[0][1], found[1][1])
