"""The released curves of routed language models, where they are, and the results of their fits.

The data are CC-BY 4.0, of the authors of "Unified Scaling Laws for Routed Language Models" (Clark
et al. 2022; google-deepmind/scaling_laws_for_routing, data/curves.csv.gz), and not a part of this
project: `MOE_ROUTED_CURVES` names the file, or a folder above holds shared/data. The results stand
in benchmarks/results/routed_laws.json and are held to the same bounds everywhere.

Broken on purpose, once: natural logs in the law.
"""

import functools
import json
import os
from pathlib import Path

from marks import mainly
import pytest

from moe.cli import main as cli

ROOT = Path(__file__).parents[1]
NAME = "routed_lm_curves.csv.gz"
ABOVE = [folder / "shared" / "data" / NAME for folder in ROOT.parents]
PLACES = [Path(os.environ.get("MOE_ROUTED_CURVES", "")), *ABOVE]
FOUND = [path for path in PLACES if path.is_file()][:1]

# a, N_cutoff of the paper's table 3
PAPER = {"S-Base": (-0.082, 937e9), "RL-R": (-0.083, 85e9), "Hash": (-0.087, 83e9)}


@functools.cache
def results():  # not at import: smoke tests collect this file where there are no results
    return json.loads((ROOT / "benchmarks" / "results" / "routed_laws.json").read_text())


def check(router, found):
    """The bounds within which the paper's coefficients are reproduced."""
    a, cutoff = PAPER[router]
    assert found["law"] == "routed" and found["points"] > 50
    assert abs(found["coefficients"]["a"]["value"] - a) < 0.004
    assert found["rmsle_log10"] <= 0.0035
    assert cutoff / 1.5 < found["derived"]["N_cutoff"]["value"] < cutoff * 1.5


@pytest.mark.parametrize("router", PAPER)
def test_the_results_are_those_of_the_paper(router):
    check(router, results()[router])
    low, high = results()[router]["coefficients"]["a"]["interval"]
    assert low < PAPER[router][0] < high


def test_the_dense_exponent_is_that_of_the_paper():
    assert abs(results()["Dense"]["coefficients"]["alpha_N"]["value"] - 0.0785) < 0.001


if FOUND:

    @pytest.mark.parametrize("router", mainly(["Dense"], [*PAPER, "Dense"]))
    def test_the_fits_are_those_of_the_results(router, tmp_path):
        """The same flags, as the results hold them."""
        out, told = tmp_path / "fit.json", results()[router]
        same = [f"--{flag}={told[flag]}" for flag in ("law", "columns", "where")]
        assert cli.main(["fit", *same, f"--data={FOUND[0]}", "--bootstrap=0", f"--json={out}"]) == 0
        found = json.loads(out.read_text())
        assert abs(found["objective"] / told["objective"] - 1) < 1e-6
        if router in PAPER:
            check(router, found)
