"""The results that stand in the docs are what `moe report` makes of the committed tables."""

from pathlib import Path

import pytest

from moe.reports import page
from moe.reports.read import read

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "benchmarks" / "results" / "sweeps").glob("*/"), key=str)


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda folder: folder.name)
def test_the_docs_have_the_finding_and_the_table_of_each_sweep(folder):
    text = page.markdown([read(str(folder))])
    pages = (ROOT / "docs" / name for name in ("results.md", "routers.md"))
    docs = "".join(page.read_text(encoding="utf-8") for page in pages)
    _, finding, table, _ = text.strip().split("\n\n")
    assert finding in docs and table in docs, f"moe report {folder}"


def test_there_are_results():
    assert [folder.name for folder in SWEEPS] == ["dense_vs_moe", "experts", "routers", "transfer"]
