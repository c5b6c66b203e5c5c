"""The check of an accelerator: parts fail by themselves, and rows are written as they come."""

import json
from pathlib import Path
import sys

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import accelerator
    import accelerator_parts

    return accelerator, accelerator_parts


def test_parts_write_rows_and_a_summary(benchmarks, tmp_path, monkeypatch, capsys):
    """The machine first, with what is missing; kernels of other platforms fail alone."""
    accelerator, parts = benchmarks
    words = [f"--folder={tmp_path}", "--small", "--part=machine", "--part=attention"]
    monkeypatch.setattr(sys, "argv", ["accelerator.py", *words, "--part=torch eager"])
    accelerator.main()
    lines = (tmp_path / "accelerator.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["part"] == "machine" and rows[0]["matmul_peak_flops"] > 1e9
    assert set(rows[0]["missing"]) <= set(parts.PACKAGES)
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["jax"] == jax.__version__ and set(found["parts"]) >= {"attention"}
    ran = found["parts"]["attention"]
    assert [row["kernel"] for row in ran] == ["chunks", "chunks"]
    assert all(row["milliseconds"] > 0 and row["temporaries"] > 0 for row in ran)
    failed = [row for row in found["failed"] if row["part"] == "attention"]
    assert [row["kernel"] for row in failed] == ["cudnn", "splash"] * 2
    assert "needs an NVIDIA GPU" in failed[0]["error"]
    assert f"{len(rows)} rows, {len(found['failed'])} failed" in capsys.readouterr().out


def test_a_part_that_fails_or_hangs_is_one_row(benchmarks, tmp_path):
    accelerator, _ = benchmarks
    row = accelerator.run_part("nonsense", tmp_path / "rows.jsonl", 60, small=True)
    assert row["part"] == "nonsense" and "exit status 1: KeyError: 'nonsense'" in row["error"]
    row = accelerator.run_part("machine", tmp_path / "rows.jsonl", 0.2, small=True)
    assert row["error"] == "not done after 0 s" and row["seconds"] < 20


@pytest.mark.thorough
def test_one_way_of_multiplying_fails_alone(benchmarks, monkeypatch):
    """tokamax is not installed, but asked for: an error in its rows, numbers in all others."""
    _, parts = benchmarks
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: name == "tokamax")
    rows = list(parts.matmuls(True, "olmoe"))
    failed = {row["what"] for row in rows if "error" in row}
    assert failed == {"tokamax"} and {row["what"] for row in rows} >= {"dense", "slot_blocks"}
    done = [row for row in rows if "error" not in row]
    assert all(row["tflops_step"] > 0 and row["case"] == "olmoe" for row in done)
    assert {(row["what"], row["load"]) for row in done} >= {("slot_blocks", "zipf")}


def test_zipf_gives_every_row_to_an_expert(benchmarks):
    _, parts = benchmarks
    count_E = parts.zipf(101, 4)  # 48.48, 24.24, 16.16 and 12.12; the first has the rest
    assert count_E.tolist() == [49, 24, 16, 12] and parts.even(100, 4).tolist() == [25] * 4


def test_a_trace_names_its_kernels(benchmarks, tmp_path):
    _, parts = benchmarks
    x = jnp.ones((256, 256))
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        multiply(x, x).block_until_ready()
    total, kernels = parts.by_kernel(str(tmp_path))
    assert total == sum(kernels.values()) > 0 and len(kernels) == 1  # one matmul, by any name
