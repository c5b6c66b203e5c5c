"""A run in small that is killed: `python tests/kills.py FOLDER [KILLS]`.

Each process goes on from the newest checkpoint, trains by a rule that shows any step that was lost
or done twice, and is killed with SIGKILL at a named point of a save or at a random moment. Prints
JSON: how many kills there were, where, and how many checkpoints were lost or wrong.
"""

from collections.abc import Callable
import json
import os
from pathlib import Path
import random
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from moe.runs.storage import checkpoint, manifest
from moe.training.train_step import TrainState

POINTS = ("before manifest", "before rename", "after rename")


def first() -> TrainState:
    return TrainState(jnp.int32(0), {"w": np.arange(3000, dtype=np.float32)}, {}, {})


def trained(state: TrainState) -> TrainState:
    w = np.asarray(state.params["w"])
    return TrainState(
        jnp.int32(int(state.step) + 1),
        {"w": jnp.asarray(w * np.float32(0.999) + int(state.step))},
        {},
        {},
    )


def abstract() -> TrainState:
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.tree.map(jnp.asarray, first())
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), state)


def dies_at(point: str, save: int) -> None:
    """Kill this process at a point of its nth save."""
    seen = 0
    write, sync = manifest.write, manifest.fsync_folder

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def writes(folder, step):
        nonlocal seen
        seen += 1
        if seen == save and point == "before manifest":
            die()
        write(folder, step)
        if seen == save and point == "before rename":
            die()

    def syncs(folder):
        if seen == save and point == "after rename" and folder.name == "checkpoints":
            die()
        sync(folder)

    manifest.write, manifest.fsync_folder = writes, syncs


def run(folder: Path, steps: int) -> None:
    """Go on from the newest checkpoint, which is looked at first, with a save at each step."""
    said, told = [], folder / "durable"
    durable = int(told.read_text() or 0) if told.exists() else 0
    with checkpoint.opened(folder / "checkpoints") as saves:
        found = saves.restore(abstract(), say=said.append)
        assert not said, said  # no kill may look like damage
        state = found[0] if found else first()
        began = int(state.step)
        assert began >= durable, "a step was lost"
        expected = first()
        for _ in range(began):
            expected = trained(expected)
        np.testing.assert_array_equal(state.params["w"], expected.params["w"])
        for _ in range(steps):
            state = trained(state)
            saves.save(state, {})
            saves.wait()
            told.write_text(str(int(state.step)))


def child(work: Callable[[], None]) -> int:
    """A forked process that does the work; nothing of JAX has started in this one."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def main(folder: Path, kills: int) -> dict:
    draw, points, killed, wrong = random.Random(0), [], 0, 0

    for i in range(kills):
        point = (*POINTS, None)[i % 4]

        def work(point=point, i=i):
            if point:
                dies_at(point, 1 + i // 4 % 3)
            run(folder, 4 if point else 100)

        pid = child(work)
        if point is None:
            time.sleep(draw.uniform(0.3, 3))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        killed += os.WIFSIGNALED(status)
        wrong += os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0
        points += [point] if point and os.WIFSIGNALED(status) else []
    wrong += os.waitpid(child(lambda: run(folder, 1)), 0)[1] != 0
    count = {point: points.count(point) for point in POINTS}
    return {"killed": killed, "points": count, "lost": wrong}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 12)))
