"""Silent corruption is found, and a sound run is the same with checks as without.

Broken on purpose: the checksum's factors all 1, or even at some places; no comparison before a
save; devices grouped by something else than what they hold; the trial's state not a copy.
"""

import dataclasses
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest
from tiny import ROOT, Runs, arrays, environment, measured

from moe.data.batches import train_batch
from moe.machine import exits
from moe.model.sharding import MeshShape
from moe.runs.loop import Loop
from moe.training import evaluate
from moe.training.checksums import checksums
from moe.training.corruption import Checker, Corrupted, CorruptionChecks, coverage
from moe.training.run_spec import RunSpec
from moe.training.train_step import Jitted, StepMetrics, TrainState

EVERY = CorruptionChecks(1, 1)


def flipped(value: jax.Array, device: int, word: int = 0) -> jax.Array:
    """The array with a bit of a number flipped on one device.

    Of float32 the mantissa's 17th bit: an update's rounding may undo a change of the lowest one.
    """
    parts = []
    for shard in value.addressable_shards:
        copy = np.array(shard.data)
        if shard.device.id == device:
            raw = copy.reshape(-1).view(np.uint8)
            raw[word * copy.itemsize + max(copy.itemsize - 2, 0)] ^= 1
        parts.append(jax.device_put(copy, shard.device))
    return jax.make_array_from_single_device_arrays(value.shape, value.sharding, parts)


def state_on(mesh, **arrays_and_specs) -> TrainState:
    params = {
        name: jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))
        for name, (value, spec) in arrays_and_specs.items()
    }
    whole = NamedSharding(mesh, PartitionSpec())
    return TrainState(jax.device_put(jnp.int32(7), whole), params, {}, ())


@pytest.fixture(scope="module")
def mesh():
    return MeshShape(data=2, fsdp=2, expert=2).build()


@pytest.fixture
def state(mesh):
    """Arrays of several types; on the mesh data varies slowest, expert fastest."""
    draw = jnp.arange(32.0).reshape(4, 8)
    return state_on(
        mesh,
        a_whole=(draw, ()),
        b_by_expert=(draw.astype(jnp.bfloat16), ("expert",)),
        c_by_all=(jnp.arange(8, dtype=jnp.int8), (("data", "fsdp", "expert"),)),
        d_by_fsdp=(jnp.arange(8) % 2 == 0, ("fsdp",)),
    )


def with_param(state, name, value):
    return dataclasses.replace(state, params=state.params | {name: value})


def test_copies_that_agree_pass(mesh, state):
    checker = Checker(EVERY, mesh, lambda: "")
    checker.replicas(state, 7)
    sums_PN = checksums(mesh, state.params)
    assert sums_PN.shape == (8, 4) and sums_PN.dtype == np.uint32
    assert [len(set(column)) for column in sums_PN.T] == [1, 2, 8, 1]
    size = [32 * 4, 32 * 2, 8, 8, 4]
    assert coverage(state) == (sum(size) - 8) / sum(size)


@pytest.mark.parametrize(
    ("name", "device", "found"),
    [
        ("a_whole", 5, "device 5 from devices 0, 1, 2, 3, 4, 6 and 7"),
        ("b_by_expert", 3, "device 3 from devices 1, 5 and 7"),
        ("d_by_fsdp", 0, "device 0 from devices 1, 4 and 5"),
    ],
)
def test_the_copy_with_a_flipped_bit_is_named(mesh, state, name, device, found):
    broken = with_param(state, name, flipped(state.params[name], device, 2))
    with pytest.raises(Corrupted) as refusal:
        Checker(EVERY, mesh, lambda: "the last good checkpoint: none").replicas(broken, 7)
    text = str(refusal.value)
    assert text.startswith(f"step 7: copies of params.{name} differ: {found} (1 of 5 arrays do)")
    assert text.endswith("the last good checkpoint: none") and "\n" not in text


def test_of_two_copies_both_are_named():
    mesh = MeshShape(data=2, fsdp=4).build()
    state = state_on(mesh, a=(jnp.arange(16.0), ("fsdp",)))
    broken = with_param(state, "a", flipped(state.params["a"], 6))
    with pytest.raises(Corrupted, match="devices 2 and 6 have different bits"):
        Checker(EVERY, mesh, lambda: "").replicas(broken, 1)
    Checker(CorruptionChecks(None, 1), mesh, lambda: "").replicas(broken, 1)
    Checker(None, mesh, lambda: "").replicas(broken, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint16", "bool", "int32"])
def test_every_flipped_bit_and_every_swap_changes_the_sum(dtype):
    mesh = MeshShape(data=1).build(jax.devices()[:1])
    rng = np.random.default_rng(0)
    value_N = np.asarray(jnp.asarray(rng.integers(0, 2, 64)).astype(dtype))
    whole = NamedSharding(mesh, PartitionSpec())

    def total(changed_N):
        return int(checksums(mesh, {"a": jax.device_put(changed_N, whole)})[0, 0])

    bits = 1 if dtype == "bool" else 8 * value_N.itemsize
    seen = {total(value_N)}
    for bit in range(bits):
        changed = value_N.copy()
        changed.view(np.uint8)[5 * value_N.itemsize + bit // 8] ^= 1 << bit % 8
        seen.add(total(changed))
    zeros, ones = np.flatnonzero(value_N == 0), np.flatnonzero(value_N != 0)
    changed = value_N.copy()
    changed[[zeros[0], ones[0]]] = changed[[ones[0], zeros[0]]]
    seen.add(total(changed))
    assert len(seen) == bits + 2


# Runs.

CHECKED = (
    "train.checks = @CorruptionChecks()",
    "CorruptionChecks.replicas_every = 2",
    "CorruptionChecks.recompute_every = 3",
)
SPREAD = ("MeshShape.data = 8", "train.mesh = @MeshShape()", "train.batch_size = 8")
SHORT = ("Transformer.num_layers = 1", "train.steps = 6", "train.artifacts = False")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("corruption"))


@pytest.fixture(scope="module")
def compiled():
    return {}


@pytest.fixture
def one_program(compiled, monkeypatch):
    """Runs on 8 devices share what they compile; checks are no part of it."""
    build, score = RunSpec._program, evaluate.batch_scorer

    def step_of(*given):
        return compiled.setdefault("step", build(*given))

    def scorer(*given):
        return compiled.setdefault("scorer", score(*given))

    monkeypatch.setattr(RunSpec, "_program", step_of)
    monkeypatch.setattr(evaluate, "batch_scorer", scorer)


def test_a_sound_run_passes_and_its_curve_is_the_same(runs, one_program, capsys):
    plain = runs.done("plain", *SPREAD, *SHORT)
    checked = runs.done("checked", *SPREAD, *SHORT, *CHECKED)
    assert "checks: 100% of the state has copies on this mesh" in capsys.readouterr().out
    assert measured(checked) == measured(plain)
    jax.tree.map(np.testing.assert_array_equal, arrays(checked, 6), arrays(plain, 6))


def corrupting(step: int, device: int):
    """Loop._step with one bit of a parameter's copy flipped after a step."""
    before = Loop._step

    def broken(self, state, batch, number, given):
        state, measured = before(self, state, batch, number, given)
        if number == step:
            name = "embedding_VD"
            state = with_param(state, name, flipped(state.params[name], device))
        return state, measured

    return broken


@pytest.mark.parametrize(
    ("bindings", "found"),
    [
        (CHECKED, 4),
        ((CHECKED[0], "train.save_every = 5", "CorruptionChecks.recompute_every = None"), 5),
    ],
    ids=["when due", "before a save"],
)
def test_a_corrupted_copy_ends_the_run_and_is_not_saved(
    bindings, found, runs, one_program, capsys, monkeypatch
):
    """Also where no comparison is due before the next checkpoint."""
    monkeypatch.setattr(Loop, "_step", corrupting(3, 4))
    name = f"corrupted {found}"
    code = runs(name, *SPREAD, *SHORT, "train.save_every = 2", *bindings)
    assert code == exits.CORRUPTED == 83
    (line,) = capsys.readouterr().err.splitlines()
    # What a wrong copy adds to all gradients, all copies have: it stays the only one that differs.
    assert f"step {found}: copies of params.embedding_VD differ: device 4 from devices 0, 1" in line
    steps = [path.name for path in (runs.folder / name / "checkpoints").iterdir()]
    assert steps == (["2"] if found == 4 else [])
    assert ("holds step 2" if steps else "there is no checkpoint yet") in line


def test_a_step_that_is_impure_is_found(mesh):
    """Of the second call the loss is a thousandth larger."""
    calls = []

    def count(step):
        calls.append(int(step))
        return np.float32(1 + 1e-3 * (len(calls) == 2))

    @jax.jit
    def step(state, batch):
        factor = jax.pure_callback(count, jax.ShapeDtypeStruct((), np.float32), state.step)
        norms = {"all": jnp.float32(1)}
        loss = batch.token_BT.sum() * factor
        metrics = StepMetrics(loss, state.step, factor, state.step, None, norms)
        return dataclasses.replace(state, params={"a": state.params["a"] + 1}), metrics

    one = MeshShape(data=1).build(jax.devices()[:1])
    state = state_on(one, a=(jnp.arange(4.0), ()))
    batch = train_batch(np.arange(18, dtype=np.int32).reshape(2, 9), np.arange(2, dtype=np.int32))
    checker = Checker(EVERY, one, lambda: "none is saved")
    trial = checker.trial(step, state, batch)
    again = "step 8: computed again from the same state and batch, loss has other bits on device 0"
    with pytest.raises(Corrupted, match=rf"{again} \(2 of 7 arrays do\); .*; none is saved"):
        checker.compare(trial, *step(state, batch), 8)
    trial = checker.trial(step, state, batch)
    checker.compare(trial, *step(state, batch), 8)


def test_a_device_that_computes_something_else_the_second_time_is_named(
    runs, one_program, capsys, monkeypatch
):
    """Steps 3 and 6 are computed twice; the seventh call is the first one of step 6."""
    call, calls = Jitted.__call__, []

    def broken(self, state, batch, **given):
        state, measured = call(self, state, batch, **given)
        calls.append(int(state.step))
        if len(calls) == 7:
            state = with_param(state, "embedding_VD", flipped(state.params["embedding_VD"], 6))
        return state, measured

    monkeypatch.setattr(Jitted, "__call__", broken)
    assert runs("twice", *SPREAD, *SHORT, *CHECKED, "train.save_every = 2") == exits.CORRUPTED
    (line,) = capsys.readouterr().err.splitlines()
    found = "step 6: computed again from the same state and batch, params.embedding_VD has other"
    assert f"{found} bits on device 6 (1 of " in line and "holds step 4" in line
    assert calls == [1, 2, 3, 3, 4, 5, 6, 6]


PROCESS = """
import sys
import jax, jax.numpy as jnp
from moe.machine import processes
processes.join("2", sys.argv[1], int(sys.argv[2]))
from test_corruption import EVERY, flipped, state_on, with_param
from moe.model.sharding import MeshShape
from moe.training.corruption import Checker
mesh = MeshShape(data=4).build()
state = state_on(mesh, a=(jnp.arange(8.0), ()), b=(jnp.arange(8.0), ("data",)))
checker = Checker(EVERY, mesh, lambda: "")
checker.replicas(state, 1)
last = jax.devices()[-1].id
try:
    checker.replicas(with_param(state, "a", flipped(state.params["a"], last)), 2)
except Exception as error:
    print(error)
"""


@pytest.mark.thorough
def test_copies_of_several_processes_are_compared():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    surroundings = environment(devices=2)
    surroundings["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    command = [sys.executable, "-c", PROCESS, f"127.0.0.1:{port}"]
    running = [
        subprocess.Popen(
            [*command, str(i)],
            env=surroundings,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    told = [process.communicate(timeout=100) for process in running]
    lines = [out.strip().splitlines()[-1:] for out, _ in told]
    assert lines[0] == lines[1] and lines[0], told
    where = r"device (\d+) \(process 1\) from devices \d+ \(process 0\), .* and \d+ \(process 1\)"
    assert re.match(rf"step 2: copies of params.a differ: {where} \(1 of 3", lines[0][0])
