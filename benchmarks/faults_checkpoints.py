"""What damage to checkpoints, and kills in the middle of a save, cost: nothing may be silent.

    python benchmarks/faults_checkpoints.py --out benchmarks/results/faults_checkpoints.json

Every file of a checkpoint with 20 random flipped bits in turn, and cut, emptied, deleted, renamed
and swapped; kills by `tests/kills.py`; and the seconds that manifest, verification and the search
for values that are not finite take beside Orbax's own. On one core: 5 minutes.
"""

import argparse
import json
from pathlib import Path
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from campaigns import tell
import jax
import jax.numpy as jnp

from moe.runs.storage import checkpoint, manifest
from moe.training.finite import not_finite
from moe.training.train_step import TrainState

FLIPS = 20
KILLS = Path(__file__).resolve().parents[1] / "tests" / "kills.py"
UNLISTED = "commit_success.txt"  # a constant that nobody reads


def state_of(step: int, megabytes: float) -> TrainState:
    """A state of 8 float32 arrays."""
    size = int(megabytes * 2**20) // 4 // 8
    keys = jax.random.split(jax.random.key(step), 8)
    params = {f"w{i}_D": jax.random.normal(key, (size,)) for i, key in enumerate(keys)}
    return TrainState(jnp.int32(step), params, {}, {})


def caught(folder: Path) -> bool:
    try:
        manifest.verify(folder)
    except manifest.Damaged:
        return True
    return False


def damages(path: Path, other: Path, draw: random.Random):
    """Pairs of a fault's name and a function that does it to a file."""

    def flip():
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)

    def cut():
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])

    yield from [("flipped bit", flip)] * FLIPS
    yield "cut", cut
    yield "emptied", lambda: path.write_bytes(b"")
    yield "deleted", path.unlink
    yield "renamed", lambda: path.rename(path.with_name(path.name + "0"))
    if other.exists() and other.read_bytes() != path.read_bytes():
        yield "swapped with the other step's", lambda: shutil.copyfile(other, path)


def damage_every_file(folder: Path) -> dict[str, dict[str, int]]:
    """By fault: how many were tried, and how many the manifest did not notice."""
    with checkpoint.opened(folder) as saves:
        for step in (1, 2):
            saves.save(state_of(step, 1), {"seed": 0}, val_loss=3.0 - step)
    draw, found = random.Random(0), {}
    home, kept = folder / "2", folder.parent / "kept"
    shutil.copytree(home, kept)
    names = [p.relative_to(kept) for p in sorted(kept.rglob("*")) if p.is_file()]
    for name in names:
        if name.name == UNLISTED:
            continue
        for fault, do in damages(home / name, folder / "1" / name, draw):
            do()
            count = found.setdefault(fault, {"tried": 0, "silent": 0})
            count["tried"] += 1
            count["silent"] += not caught(home)
            (home / f"{name}0").unlink(missing_ok=True)
            shutil.copyfile(kept / name, home / name)
    assert not caught(home)
    return found


def costs(folder: Path, megabytes: int, repeats: int = 5) -> dict[str, float]:
    """Median seconds of each part, with the pages of the files in memory."""
    state, write, spent = state_of(1, megabytes), manifest.write, []

    def timed(*given):
        started = time.perf_counter()
        write(*given)
        spent.append(time.perf_counter() - started)

    manifest.write = timed
    parts: dict[str, list[float]] = {}

    def measure(name: str, call):
        started = time.perf_counter()
        result = call()
        parts.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def whole_save(saves, step):
        saves.save(TrainState(jnp.int32(step), state.params, {}, {}), {})
        saves.wait()

    not_finite(state.params)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )
    with checkpoint.opened(folder) as saves:
        for step in range(1, repeats + 1):
            measure("save until durable", lambda step=step: whole_save(saves, step))
            measure("search for not finite", lambda: not_finite(state.params))
            measure("verify", lambda step=step: manifest.verify(folder / str(step)))
            measure("restore", lambda: saves.restore(abstract))
    manifest.write = write
    median = {name: round(statistics.median(values), 4) for name, values in parts.items()}
    return median | {"manifest and fsync": round(statistics.median(spent), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--megabytes", type=int, default=256)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "kills").mkdir()
        command = [sys.executable, str(KILLS), str(folder / "kills"), str(given.kills)]
        kills = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result = {
            "kills": json.loads(kills.splitlines()[-1]),
            "faults": damage_every_file(folder / "faults" / "checkpoints"),
            "megabytes": given.megabytes,
            "seconds": costs(folder / "costs" / "checkpoints", given.megabytes),
        }
    tell(result, given.out)


if __name__ == "__main__":
    main()
