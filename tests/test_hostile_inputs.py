"""No received file runs code, writes elsewhere, takes all memory, or ends in a traceback.

The corpus is in hostile.py, hostile_runs.py and hostile_data.py. Seen red, on the code before there
was a corpus: two dozen cases, of pipes and devices, nested manifests and tables, panics of the
tokenizers, bombs, a shard that is an archive, negative tokens, and sweeps with values of other
kinds. What `judged` looks for is broken one by one below.
"""

import hostile
import hostile_data
import hostile_runs
import pytest
import synthetic_sweep
from tiny import Runs

assert hostile_data and hostile_runs  # whose cases are in the corpus
SETTINGS = ("train.steps = 2", "train.save_every = 1", "Transformer.num_layers = 1")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run and a sweep to do harm to."""
    folder = tmp_path_factory.mktemp("sound")
    run = Runs(folder).done("run", *SETTINGS, "train.artifacts = False")
    return run, synthetic_sweep.write(folder / "sweep", {"base": 0.0, "good": -0.06})


# They take half a second or more, and others are like them.
SLOW = {
    *("a_million_layers", "handlers_of_a_module", "arrays_of_nothing", "a_bomb_of_gzip"),
    *("arrays_described_by_nothing", "a_bomb_of_zstandard", "a_bomb_of_xz", "a_bomb_of_parquet"),
    *("a_table_that_is_a_bomb", "a_plan_with_a_hundred_thousand_ranges"),
}


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(one, id=one.name, marks=[pytest.mark.thorough] if one.name in SLOW else [])
        for one in hostile.CASES
    ],
)
def test_harm_is_refused_in_a_line(one, sound, tmp_path):
    found = hostile.tried(one, hostile.Place(tmp_path / "case", *sound))
    assert not found["faults"], found


def test_the_corpus_is_large_and_of_every_kind():
    kinds = {one.kind for one in hostile.CASES}
    assert len(hostile.CASES) >= 100 and len(kinds) == 8
    assert len({one.name for one in hostile.CASES}) == len(hostile.CASES)


def test_the_judge_sees_each_fault(tmp_path):
    """A line too many, a wrong status, a traceback, escape sequences, a name that is missing."""
    one = hostile.Case(lambda place: [], "a config", names="config.gin")
    good = "moe: error: config.gin:1: wrong\n"
    assert not hostile.judged(one, 2, "", good)
    for status, err in (
        (0, ""),
        (1, good),
        (2, good + "more\n"),
        (2, "config.gin\n"),
        (2, good + "Traceback (most recent call last):\n"),
        (2, good.replace("wrong", "\x1b]0;owned\x07")),
        (2, "moe: error: wrong\n"),
        (2, good.replace("wrong", "x" * 3000)),
    ):
        assert hostile.judged(one, status, "", err), (status, err)
