"""That every command's process keeps the memory it freed, whenever it first uses a device."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import sys

import jax
import jax.numpy as jnp

from moe.cli import main as cli

if sys.argv[1] == "command":
    cli.main(["bench", "nothing"])
add_one = jax.jit(lambda x: x + 1)
x = jnp.zeros(2**24)  # 64 MiB, 16,384 pages

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        add_one(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(new_pages() for _ in range(5)))
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_a_command_keeps_freed_memory():
    assert new_pages("command") < 1_000
    assert new_pages("none") > 10_000


def new_pages(mode: str) -> int:
    """Pages the kernel gives ten calls that free what those before used; the best of five times."""
    run = [sys.executable, "-c", SCRIPT, mode]
    return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
