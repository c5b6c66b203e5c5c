"""What XLA is told: nothing on CPUs, nothing that the user has set, and flags that XLA knows.

Broken once, each seen red: flags set for a CPU; a flag of the user's overwritten; a misspelt flag.
"""

import os
import subprocess
import sys

import pytest

from moe.machine import accelerator


def test_a_gpu_gets_flags_and_memory_and_a_cpu_nothing():
    environment = {"JAX_PLATFORMS": "cuda,cpu"}
    accelerator.prepare(environment)
    assert environment["XLA_FLAGS"] == " ".join(accelerator.GPU_FLAGS)
    assert 0.75 < float(environment["XLA_CLIENT_MEM_FRACTION"]) < 1
    for platforms in ("cpu", "cpu,cuda", "tpu"):
        environment = {"JAX_PLATFORMS": platforms}
        accelerator.prepare(environment)
        assert environment == {"JAX_PLATFORMS": platforms}


def test_what_the_user_set_stays():
    name = accelerator.GPU_FLAGS[0].partition("=")[0]
    given = {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": f"--xla_dump_to=x {name}=false"}
    for variable in accelerator.MEMORY:
        environment = given | {variable: "0.5"}
        accelerator.prepare(environment)
        assert environment == given | {variable: "0.5"}
    environment = {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": "--xla_dump_to=x"}
    accelerator.prepare(environment)
    assert environment["XLA_FLAGS"].split() == ["--xla_dump_to=x", *accelerator.GPU_FLAGS]


@pytest.mark.parametrize(
    ("files", "packages", "expected"),
    [
        ((), ("jax_plugins", "jax_plugins.xla_cuda13", "libtpu"), "cpu"),
        (("/dev/nvidiactl",), (), "cpu"),
        (("/dev/nvidiactl",), ("jax_plugins", "jax_plugins.xla_cuda13"), "gpu"),
        (("/dev/dxg",), ("jax_plugins", "jax_plugins.xla_cuda12"), "gpu"),
        (("/dev/vfio/0",), ("libtpu",), "tpu"),
    ],
)
def test_the_platform_is_guessed_by_devices_and_packages(files, packages, expected):
    found = accelerator.platform({}, files.__contains__, packages.__contains__)
    assert found == expected


def test_xla_knows_the_flags_and_run_json_shows_them():
    """XLA ends the process at a flag that it doesn't know."""
    script = (
        "from moe.machine import accelerator\n"
        "accelerator.prepare()\n"
        "import os; os.environ['JAX_PLATFORMS'] = 'cpu'\n"
        "import jax; jax.devices()\n"
        "print(accelerator.shown())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in accelerator.SHOWN}
    environment |= {"JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in (*accelerator.GPU_FLAGS, *accelerator.GPU_MEMORY):
        assert flag in done.stdout
