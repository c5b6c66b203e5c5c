"""Resuming: at every step of a run, and from any mesh on any other.

    python benchmarks/faults_resume.py --out benchmarks/results/faults_resume.json

The first part goes on from each of a run's checkpoints, as `moe train` does, and compares curve,
routing, scores and final arrays with those of the run that never stopped. The second part saves on
eight meshes of 1 to 8 virtual devices, in 1 to 4 processes, and goes on on others: arrays and data
are compared bit for bit, and the next step's loss. On two busy cores: 15 minutes.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import shutil
import socket
import time
from typing import Any

from campaigns import prepared, tell
from faults_kills import Campaign, ended, forked, same
import jax
import numpy as np
import orbax.checkpoint as ocp

from moe.cli import config
from moe.cli import main as cli
from moe.machine import hardware, processes, xla_flags
from moe.runs.setup import Setup
from moe.runs.storage import checkpoint
from moe.training import evaluate
from moe.training.finite import named
from moe.training.run_spec import RunSpec
from moe.training.train_step import to_devices

SAVED, AFTER = 3, 3  # steps before the checkpoint, and after it


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run lives.

    Attributes:
        axes: sizes of mesh axes that are not 1.
        processes: how many processes share its devices evenly.
    """

    axes: dict[str, int]
    processes: int = 1

    @property
    def devices(self) -> int:
        return int(np.prod(list(self.axes.values())))

    def __str__(self) -> str:
        axes = ", ".join(f"{axis} {size}" for axis, size in self.axes.items())
        several = f", {self.processes} processes" if self.processes > 1 else ""
        return f"{self.devices}: {axes}{several}"

    @property
    def bindings(self) -> list[str]:
        """As --gin_bindings has them."""
        sizes = {"data": 1} | self.axes
        axes = [f"MeshShape.{axis} = {size}" for axis, size in sizes.items()]
        return ["train.mesh = @MeshShape()", "train.batch_size = 8", *axes]


PLACES = {
    "a": Place({"data": 8}),
    "b": Place({"fsdp": 2, "expert": 2, "tensor": 2}),
    "c": Place({"data": 2, "expert": 4}, 4),
    "d": Place({"expert": 4}, 2),
    "e": Place({"data": 2, "tensor": 2}),
    "f": Place({"fsdp": 4}, 4),
    "g": Place({"tensor": 2}, 2),
    "h": Place({"data": 1}),
}
PAIRS = ("ah", "ha", "ab", "bc", "cd", "de", "ef", "fg", "gb", "ch", "bf", "da")


def hashes(tree: Any) -> dict[str, str]:
    """The SHA-256 of each array's bits, by name. Collective."""
    whole = processes.gathered(named(tree))
    return {name: hashlib.sha256(np.asarray(a).tobytes()).hexdigest() for name, a in whole.items()}


def go_on(setup: Setup, state: Any, steps: int) -> tuple[Any, list[float], list[str]]:
    """The state after so many steps, their losses, and hashes of their batches' tokens."""
    losses, data = [], []
    made = setup.train_batches.batches(int(state.step), setup.rows)
    for _ in range(steps):
        batch = to_devices(next(made), setup.program.batch_sharding, setup.spec.batch_size)
        data.append(hashes({"tokens": batch.token_BT})["tokens"])
        state, measured = setup.program.step(state, batch)
        losses.append(float(jax.device_get(measured.loss)))
    made.close()
    return state, losses, data


def visit(setup: Setup, own: Path, sources: Sequence[Path], first: bool) -> dict[str, Any]:
    """What a place finds: its own run's, where it is the first visit, else that of each source."""
    found = {}
    if first:
        state, _, _ = go_on(setup, setup.program.init(0), SAVED)
        found[own.name] = {"arrays": hashes(state)}
        with checkpoint.opened(own) as saves:
            saves.save(state, {})
        state, losses, data = go_on(setup, state, AFTER)
        found[own.name] |= {"losses": losses, "data": data, "final": hashes(state)}
    for source in sources:
        with checkpoint.opened(source, read_only=True) as saves:
            restored = saves.restore(setup.program.abstract_state)
        assert restored is not None
        arrays = hashes(restored[0])
        state, losses, data = go_on(setup, restored[0], AFTER)
        final = hashes(state)
        found[source.name] = {"arrays": arrays, "losses": losses, "data": data, "final": final}
    return found


def visited(runs: Campaign, name: str, sources: str, first: bool = False) -> dict[str, Any]:
    """`visit` in processes of their own."""
    place, out = PLACES[name], runs.folder / f"{name}.json"
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"

    def work(process: int) -> int:
        os.environ["XLA_FLAGS"] = " ".join(xla_flags.flags(place.devices // place.processes))
        several = place.processes > 1
        if several:
            processes.join(str(place.processes), address, process)
        spec = config.load([str(runs.config)], place.bindings)
        setup = Setup.of(spec, lambda line: None)
        folders = [runs.folder / "places" / source for source in sources]
        found = visit(setup, runs.folder / "places" / name, folders, first)
        if processes.is_first():
            out.write_text(json.dumps(found), encoding="utf-8")
        if processes.peers is not None:
            processes.peers.done()
        return 0

    running = [forked(lambda i=i: work(i), runs.log) for i in range(place.processes)]
    codes = [ended(pid) for pid in running]
    assert codes == [0] * place.processes, (name, codes, runs.log.read_text()[-3000:])
    return json.loads(out.read_text(encoding="utf-8"))


def from_place_to_place(runs: Campaign) -> dict[str, Any]:
    """All pairs, and each place with itself."""
    at_home = {name: visited(runs, name, "", first=True)[name] for name in PLACES}
    pairs, equal_curves = [], {}
    for name in PLACES:
        sources = "".join(there for there, here in PAIRS if here == name)
        found = visited(runs, name, sources + name)
        equal_curves[str(PLACES[name])] = found[name] == at_home[name]
        for source in sources:
            there, here = at_home[source], found[source]
            loss, expected = here["losses"][0], there["losses"][0]
            pairs.append(
                {
                    "from": str(PLACES[source]),
                    "to": str(PLACES[name]),
                    "arrays_equal": here["arrays"] == there["arrays"],
                    "data_equal": here["data"] == there["data"],
                    "next_loss_differs_by": abs(loss / expected - 1),
                }
            )
    return {"pairs": pairs, "same_place_bit_equal": equal_curves}


def at_every_step(runs: Campaign) -> dict[str, Any]:
    """Go on from each checkpoint of a run, all in one process, which compiles once."""
    out = runs.folder / "every_step.json"

    def work() -> int:
        share_programs()
        out.write_text(json.dumps(unequal_resumes(runs)), encoding="utf-8")
        return 0

    assert ended(forked(work, runs.log)) == 0, runs.log.read_text()[-3000:]
    unequal = json.loads(out.read_text(encoding="utf-8"))
    return {"steps": runs.steps, "resumed_at": runs.steps - 1, "not_bit_identical": unequal}


def share_programs() -> None:
    """Have all runs of this process share their compiled functions; no setting differs that counts.

    Nor is the machine measured each time.
    """
    build, score, made = RunSpec._program, evaluate.batch_scorer, {}
    RunSpec._program = lambda *given: made.setdefault("step", build(*given))
    evaluate.batch_scorer = lambda *given: made.setdefault("scorer", score(*given))
    hardware.matmul_peak = lambda dtype=None: 1e11


def unequal_resumes(runs: Campaign) -> list[int]:
    """The steps from which a run went on to another end."""

    def train(run: Path, *bindings: str) -> tuple[Any, dict[str, np.ndarray]]:
        given = [f"--gin_bindings={binding}" for binding in bindings]
        assert not cli.main(["train", f"--gin_file={runs.config}", f"--workdir={run}", *given])
        state = (run / "checkpoints" / str(runs.steps) / "state").absolute()
        arrays = {n: np.asarray(a) for n, a in ocp.StandardCheckpointer().restore(state).items()}
        return {k: v for k, v in runs.result(run).items() if k != "kept"}, arrays

    whole, unequal = runs.folder / "whole", []
    expected = train(whole, "train.save_every = 1", f"train.keep = {runs.steps + 1}")
    for step in range(1, runs.steps):
        run = Path(shutil.copytree(whole, runs.folder / "again"))
        (run / "summary.json").unlink()
        for later in range(step + 1, runs.steps + 1):
            shutil.rmtree(run / "checkpoints" / str(later))
        found = train(run)
        if found[0] != expected[0] or not same(found[1], expected[1]):
            unequal.append(step)
        shutil.rmtree(run)
    return unequal


def timed(part: Callable[[Campaign], dict], runs: Campaign) -> dict[str, Any]:
    start = time.monotonic()
    found = part(runs)
    return found | {"minutes": round((time.monotonic() - start) / 60, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    with prepared() as folder:
        runs = Campaign(folder, given.steps)
        result = {
            "meshes": timed(from_place_to_place, runs),
            "every_step": timed(at_every_step, runs),
        }
    tell(result, given.out)


if __name__ == "__main__":
    main()
