"""The corpus of hostile inputs, each through the command that reads it.

    python benchmarks/faults_hostile.py [--out=OUT.json]

The cases are those of tests/hostile_runs.py and tests/hostile_data.py. No module may be imported,
no file outside of the output be changed, and no error be more than a line.
"""

import argparse
import collections
from pathlib import Path
import sys

from campaigns import prepared, tell
import hostile
import hostile_data
import hostile_runs
import synthetic_sweep
import tiny

assert hostile_data and hostile_runs  # whose cases are in the corpus
SETTINGS = ("train.steps = 2", "train.save_every = 1", "Transformer.num_layers = 1")


def campaign(folder: Path) -> dict:
    """What came of each case, summed up."""
    run = tiny.Runs(folder / "sound").done("run", *SETTINGS, "train.artifacts = False")
    sweep = synthetic_sweep.write(folder / "sweep", {"base": 0.0, "good": -0.06})
    found = [
        hostile.tried(one, hostile.Place(folder / one.name, run, sweep)) for one in hostile.CASES
    ]
    kinds = collections.Counter(one["kind"] for one in found)
    slowest = max(found, key=lambda one: one["seconds"])
    largest = max(found, key=lambda one: one["megabytes"])
    return {
        "cases": len(found),
        "by_kind": dict(sorted(kinds.items())),
        "slowest": {name: slowest[name] for name in ("case", "seconds")},
        "most_memory": {name: largest[name] for name in ("case", "megabytes")},
        "faults": {one["case"]: one["faults"] for one in found if one["faults"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with prepared() as folder:
        result = campaign(folder)
    tell(result, given.out)
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
