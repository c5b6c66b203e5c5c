"""Shared by benchmarks of whole runs: `moe` in parallel processes, and tables of results."""

import argparse
from collections.abc import Callable, Sequence
import concurrent.futures
import itertools
import json
import os
from pathlib import Path
import queue
import statistics
import subprocess
import sys

QUICKSTART = ("train.max_seconds = None", "train.prompts = ()")
SMALL = (
    "Transformer.d_model = 64",
    "Transformer.num_heads = 1",
    "TrainedBPE.vocab_size = 2048",
    "MoELayer.d_ff = 64",
)


class Place:
    """Cores that belong to one run at a time, and a folder for its files."""

    def __init__(self, cores: Sequence[int], folder: Path):
        self.cores = ",".join(map(str, cores))
        self.folder = folder

    def moe(self, *words: str, bindings: Sequence[str] = ()) -> dict:
        """Run a command of `moe` on these cores; returns what it writes with --json."""
        path = self.folder / f"result-{self.cores}.json"
        given = [*words, *(f"--gin_bindings={binding}" for binding in bindings), f"--json={path}"]
        pin = ["taskset", "--cpu-list", self.cores]
        command = [*pin, sys.executable, "-m", "moe", *given]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        subprocess.run(command, check=True, **out)
        return json.loads(path.read_text())


def arguments(description: str, steps: int, **more) -> argparse.Namespace:
    """The parsed flags of such a benchmark; `more` are further ones."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, help="results; runs in it are not repeated")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, default=1, help="runs at a time, each on its own cores"
    )
    parser.add_argument("--folder", default="runs/benchmark", help="for the files of runs")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args()


def measure(
    given: argparse.Namespace,
    cases: Sequence[str],
    one: Callable[..., dict],
    table: Callable[..., str],
    **settings,
) -> None:
    """Run each case with each seed, and write JSON and Markdown after each run.

    All cases of one seed come before the next seed. Runs in the JSON file are not repeated.

    Args:
        given: the flags, of `arguments`.
        cases: names of the cases.
        one: one(case, seed, place, steps=..., **settings) makes a run and returns its results.
        table: table(runs, steps=..., **settings) returns the Markdown of all runs' results.
        settings: further settings of all runs.
    """
    path, folder = Path(given.json), Path(given.folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"steps": given.steps, **settings}
    runs = read_runs(path, settings)
    done = {(run["case"], run["seed"]) for run in runs}
    wanted = [(case, seed) for seed, case in itertools.product(range(given.seeds), cases)]
    order = {case: place for place, case in enumerate(cases)}
    cores = sorted(os.sched_getaffinity(0))
    free: queue.Queue = queue.Queue()
    for worker in range(given.workers):
        free.put(Place(cores[worker :: given.workers], folder))

    def work(case, seed):
        place = free.get()
        try:
            return {"case": case, "seed": seed, **one(case, seed, place, **settings)}
        finally:
            free.put(place)

    def write():
        path.write_text(json.dumps(settings | {"runs": runs}, indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table(runs, **settings) + "\n", encoding="utf-8")

    failed = 0
    with concurrent.futures.ThreadPoolExecutor(given.workers) as pool:
        left = [pool.submit(work, *pair) for pair in wanted if pair not in done]
        for finished in concurrent.futures.as_completed(left):
            try:
                run = finished.result()
            except subprocess.CalledProcessError as error:  # the others go on
                failed += 1
                print(f"{error}\n{error.stdout}", flush=True)
                continue
            runs.append(run)
            runs.sort(key=lambda run: (run["seed"], order.get(run["case"], len(order))))
            write()
            print(f"{len(runs)} of {len(wanted)}: {run}", flush=True)
    write()  # for a new table, where no run was left
    print(table(runs, **settings))
    if failed:
        raise SystemExit(f"{failed} runs failed")


def read_runs(path: Path, settings: dict) -> list[dict]:
    """The runs of an earlier call with the same settings."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    if any(record[name] != value for name, value in settings.items()):
        raise SystemExit(f"{path} holds runs with other settings than {settings}")
    return record["runs"]


def by_case(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs of each case, in the order of first appearance."""
    cases = dict.fromkeys(run["case"] for run in runs)
    return {case: [run for run in runs if run["case"] == case] for case in cases}


def spread(values: Sequence[float], digits: int = 4) -> str:
    """The mean, and for several values its standard error."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def rows(header: Sequence[str], body: Sequence[Sequence]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
