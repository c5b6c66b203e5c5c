"""Several real processes (gloo): what they train together is what one of them trains alone."""

from pathlib import Path
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny

from moe.errors import UserError
from moe.machine import processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tiny.Runs(tmp_path_factory.mktemp("processes"))


def together(count: int, devices: int, *given: str) -> list[subprocess.CompletedProcess]:
    """`moe train` in so many processes at once, each with so many virtual devices."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "moe", "train", *given]
    command += [f"--processes={count}", f"--coordinator=127.0.0.1:{port}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        subprocess.Popen([*command, f"--process={i}"], env=tiny.environment(devices), **pipes)
        for i in range(count)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, text)
        for process, text in zip(running, said, strict=True)
    ]


def same_measurements(one: Path, other: Path):
    """Every logged loss, norm and load, to the rounding of another order of sums."""
    lines = [tiny.measured(run) for run in (one, other)]
    assert len(lines[0]) == len(lines[1]) > 0
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            np.testing.assert_allclose(b[name], value, rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        pytest.param(2, 2, {"data": 1, "fsdp": 2, "expert": 2}, id="two processes of two devices"),
        pytest.param(4, 1, {"data": 2, "expert": 2}, id="four of one", marks=pytest.mark.thorough),
    ],
)
def test_processes_train_what_one_trains(runs, tmp_path, count, devices, mesh):
    """With experts that live in different processes, and rows that travel between them."""
    steps = ("train.steps = 3", "Transformer.num_layers = 1", "MoELayer.dispatcher = @Sorted()")
    alone = runs.done("alone", *steps)
    run = tmp_path / "run"
    given = [f"--gin_file={runs.config}", f"--workdir={run}"]
    bindings = (*steps, "train.mesh = @MeshShape()")
    bindings += tuple(f"MeshShape.{axis} = {size}" for axis, size in mesh.items())
    done = together(count, devices, *given, *(f"--gin_bindings={line}" for line in bindings))
    for process in done:
        assert process.returncode == 0, process.stdout
    assert "this model" in done[0].stdout and "this model" not in done[1].stdout
    same_measurements(alone, run)
    assert (run / "summary.json").exists()


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ((None, "a:1", None), "belong to --processes=N"),
        (("two", None, None), "--processes=two: a number of processes, or auto"),
        (("2", None, None), "--coordinator=HOST:PORT of the first process, and --process=0 to 1"),
        (("2", "a:1", 2), "--process=2: 0 to 1"),
        (("auto", "a:1", None), "by itself"),
    ],
)
def test_flags_that_do_not_go_together(given, part):
    with pytest.raises(UserError) as refusal:
        processes.join(*given)
    assert part in str(refusal.value)
