"""Every notebook runs from top to bottom, at tiny size."""

from pathlib import Path
import re
import runpy

import nbclient
import nbformat
import pytest

from moe.machine import xla_flags

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = [
    "train.steps = 4",
    "train.batch_size = 4",
    "train.sequence_length = 128",
    "train.log_every = 2",
    "Transformer.d_model = 32",
    "Transformer.num_layers = 2",
    "MoELayer.d_ff = 32",
    "StandardLibrary.max_bytes = 400_000",
    "TrainedBPE.vocab_size = 512",
]
SMALLER = {
    "TRIALS, SEEDS = 3, 3": "TRIALS, SEEDS = 0, 2",
    "RUNS, NOISE, RESAMPLES = 120, 0.003, 20": "RUNS, NOISE, RESAMPLES = 60, 0.003, 3",
}


@pytest.mark.thorough
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    # A notebook has one device, not the eight of the tests.
    monkeypatch.setenv("XLA_FLAGS", " ".join(xla_flags.flags(devices=1)))
    notebook = nbformat.read(path, as_version=4)
    settings = next(cell for cell in notebook.cells if "BINDINGS = []" in cell.source)
    settings.source = settings.source.replace("BINDINGS = []", f"BINDINGS = {TINY}")
    for full, small in SMALLER.items():
        settings.source = settings.source.replace(full, small)
    nbclient.NotebookClient(
        notebook, timeout=480, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 2
    folders = workdirs(notebook)
    assert all((tmp_path / folder / "summary.json").exists() for folder in folders)


def workdirs(notebook) -> set[str]:
    """The folders of the runs that a notebook makes."""
    return {f for cell in notebook.cells for f in re.findall(r'"(runs/\w+)"', cell.source)}


def test_notebooks_of_one_folder_keep_their_runs_apart():
    found = [workdirs(nbformat.read(path, as_version=4)) for path in NOTEBOOKS]
    assert len(set.union(*found)) == sum(map(len, found)) >= 3


def test_the_address_of_the_repository_stands_in_one_place():
    """setup.py has it; a script writes it everywhere else."""
    addresses = runpy.run_path(str(SCRIPTS / "set_addresses.py"))
    name = addresses["repository"]()
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert text.count(name) == 2
        elsewhere = addresses["with_addresses"](text, "else/where")
        assert elsewhere.count("else/where") == 2 and name not in elsewhere
        assert addresses["with_addresses"](elsewhere, name) == text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs_and_opens_in_colab(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert f"notebooks/{path.name}" in notebook.cells[0].source
    first_code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "google.colab" in first_code.source and "pip install" in first_code.source
