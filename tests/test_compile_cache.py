"""The cache of compiled programs: on by default, told, and never in the way."""

import os
import subprocess
import sys

import jax
import pytest
from tiny import environment

from moe.machine import compile_cache
from moe.machine.compile_cache import Counts

PROGRAM = """
from moe.machine import compile_cache
compile_cache.prepare()
import jax, jax.numpy as jnp
before = compile_cache.counts()
print(float(jax.jit(lambda x: jnp.sin(x) + 1)(2.0)), compile_cache.counts().since(before))
"""


def run_once(cache, **settings):
    """What the program above prints, in a process of its own, and what it warns of."""
    env = {k: v for k, v in environment().items() if k not in compile_cache.SETTINGS}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    settings = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **settings}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**env, "MOE_CACHE": str(cache), **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    value, _, told = done.stdout.strip().partition(" ")
    assert float(value) == pytest.approx(1.9092974)
    return told.strip(), done.stderr


def test_a_program_is_compiled_once_for_all_processes(tmp_path):
    assert run_once(tmp_path) == ("(new to the cache)", "")
    assert run_once(tmp_path) == ("(from the cache)", "")


def test_what_a_killed_process_left_is_told_once_and_mended(tmp_path):
    run_once(tmp_path)
    (entry,) = (tmp_path / "compiled").glob("jit__lambda*-cache")
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    told, warned = run_once(tmp_path)
    assert told == "(new to the cache)"
    assert warned == (
        "jit__lambda in the cache of compiled programs is damaged; it is compiled anew\n"
    )
    assert run_once(tmp_path) == ("(from the cache)", "")
    # Killed between an entry and the file that says when it was read: JAX before 0.12 then writes
    # no other entry.
    lost = entry.with_name("jit_lost-0-cache")
    lost.write_bytes(b"")
    entry.unlink()
    told, warned = run_once(tmp_path)
    if jax.__version_info__ < (0, 12):
        assert warned.startswith("jit__lambda is not kept in the cache of compiled programs: FileN")
        assert not lost.exists() and warned.count("\n") == 1
        assert run_once(tmp_path) == ("(new to the cache)", "")
    assert run_once(tmp_path) == ("(from the cache)", "")


def test_it_can_be_turned_off(tmp_path):
    assert run_once(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == ("", "")
    assert not list((tmp_path / "compiled").iterdir())


@pytest.fixture
def no_cache_yet(monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_folder_that_cannot_be_made_costs_nothing(tmp_path, no_cache_yet):
    (tmp_path / "file").write_text("in the way")
    no_cache_yet.setenv("MOE_CACHE", str(tmp_path / "file"))
    compile_cache.prepare()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_what_the_user_set_stays(tmp_path, no_cache_yet):
    no_cache_yet.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    compile_cache.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "mine")
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ


@pytest.mark.parametrize(
    ("hits", "misses", "told"),
    [
        (0, 0, ""),
        (2, 0, " (from the cache)"),
        (0, 2, " (new to the cache)"),
        (2, 1, " (2 of 3 programs from the cache)"),
    ],
)
def test_hits_and_misses_are_told(hits, misses, told):
    assert Counts(5 + hits, 7 + misses).since(Counts(5, 7)) == told
