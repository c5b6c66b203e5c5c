"""Training with rounded weights: gradients pass straight through, float weights are kept.

Broken on purpose, each seen red: gradients that stop at the rounding, a restored run that is not
rounded.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
from models import moe, tokens
import numpy as np
import optax
import pytest
from tiny import Runs, arrays, measured, quick

from moe.cli import config
from moe.cli import main as cli
from moe.data.batches import train_batch
from moe.model import functional, sharding
from moe.model.transformer import Transformer
from moe.runs.restore import restore_run
from moe.training import train_step
from moe.training.objective import NextToken
from moe.training.quantisation import Quantisation

V, HOW = 11, Quantisation("int2", 4)
ROUNDED = (
    "train.weights = @Quantisation()",
    "Quantisation.format = 'int2'",
    "Quantisation.block = 8",
    "Transformer.num_layers = 1",
    "train.artifacts = False",
    "train.steps = 6",
)


def program_of(rounding, scan: bool, accumulate: int, **mesh):
    """The gradients of a batch of eight, by name: of a model whose weights are rounded so."""
    devices = jax.devices() if mesh else jax.devices()[:1]
    make = functools.partial(
        Transformer, V, d_model=16, num_layers=2, num_heads=2, moe=moe(), scan=scan
    )
    graph, *abstract = functional.abstract(make)
    functions = train_step.TrainingFunctions(
        dataclasses.replace(graph, rounding=rounding),
        tuple(abstract),
        objective=NextToken(),
        optimizer=optax.sgd(1e-3),
        num_bytes_2V=np.ones((2, V), np.int32),
        mesh=sharding.MeshShape(**mesh).build(devices),
        seed=0,
        accumulate=accumulate,
        global_batch_losses=True,
    )
    return graph, functions.program()


def drawn():
    """A small model's graph, parameters drawn by NumPy, and no state."""
    graph, params, _ = functional.abstract(lambda: Transformer(V, d_model=16, num_heads=2))
    draw = np.random.default_rng(0)
    return graph, {n: jnp.asarray(draw.normal(size=a.shape), a.dtype) for n, a in params.items()}


def test_a_module_computes_with_exactly_the_rounded_values():
    graph, params = drawn()
    graph = dataclasses.replace(graph, rounding=HOW)
    _, inside, _ = functional.split(graph.merge(params, {}))
    plain, once = graph.rounded_once(params)
    assert plain.rounding is None and plain.rounded_once(once)[1] is once
    for name, value in once.items():
        np.testing.assert_array_equal(inside[name], value, err_msg=name)


def test_gradients_are_those_at_the_rounded_weights():
    plain, params = drawn()
    rounded = dataclasses.replace(plain, rounding=HOW)

    def loss(graph, params):
        module = graph.merge(params, {})
        return jnp.square(module.logits(module(tokens()).hidden_BTD)).sum()

    run = {
        name: jax.jit(jax.grad(functools.partial(loss, g)))
        for name, g in (("plain", plain), ("rounded", rounded))
    }
    found, expected = run["rounded"](params), run["plain"](HOW(params, plain.declared))
    for name, gradient in found.items():
        scale = jnp.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], atol=1e-4 * scale, err_msg=name)
    other = run["plain"](params)["embedding_VD"]
    assert jnp.abs(other - expected["embedding_VD"]).max() > 0.01 * jnp.abs(other).max()


@pytest.mark.thorough
def test_so_they_are_on_a_mesh_unrolled_and_accumulated():
    window_BW = np.random.default_rng(0).integers(0, V, (8, 7)).astype(np.int32)
    batch = train_batch(window_BW, np.arange(8, dtype=np.int32))
    graph, plain = program_of(None, True, 1)
    first = plain.init(0)
    params = HOW(first.params, graph.declared)
    expected, there = plain.gradients(dataclasses.replace(first, params=params), batch)
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    _, rounded = program_of(HOW, False, 2, **mesh)
    state = rounded.init(0)
    for name, value in state.params.items():  # first values are not rounded
        np.testing.assert_array_equal(value, first.params[name])
    found, here = rounded.gradients(state, batch)
    np.testing.assert_allclose(here.loss, there.loss, rtol=1e-5)
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=2e-3, atol=2e-5, err_msg=name)
    float_weights, _ = plain.gradients(first, batch)
    name = "stacks.0.unit.blocks.0.attention.query_DHK"
    assert jnp.abs(float_weights[name] - expected[name]).max() > 1e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("rounded"))
    made.done("whole", *ROUNDED)
    return made


@pytest.mark.thorough
def test_a_run_goes_on_bit_for_bit_and_keeps_floats(runs):
    whole, parts = runs.folder / "whole", runs.done("parts", *ROUNDED, "train.stop_at = 3")
    assert runs("parts", *ROUNDED) == 0
    assert measured(whole) == measured(parts)
    ours, theirs = (arrays(run, 6) for run in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    query = ours["params.stacks.0.unit.blocks.0.attention.query_DHK"]
    assert len(np.unique(query[0, :8, 0, 0])) == 8  # of int2 there would be four


def test_every_command_sees_the_same_model(runs, capsys):
    run = runs.folder / "whole"
    summary = json.loads((run / "summary.json").read_text())

    def evaluated(*flags: str) -> dict:
        words = ["eval", f"--workdir={run}", *flags, f"--json={runs.folder / 'found.json'}"]
        with quick():
            assert cli.main(words) == 0
        return json.loads((runs.folder / "found.json").read_text())

    found = evaluated()
    assert found["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], abs=1e-6)
    assert found["weights"].startswith("int2 in blocks of 8: attention")
    assert "rounding" not in found and found["bits_per_weight"] == 4
    spec = config.of_folder(str(run))
    rounded, floats = (
        restore_run(str(run), dataclasses.replace(spec, weights=how))
        for how in (spec.weights, None)
    )
    expected = Quantisation("int2", 8)(floats.params, floats.model.graph.declared)
    assert rounded.model.graph.rounding is None
    jax.tree.map(np.testing.assert_array_equal, rounded.params, expected)
    second = evaluated("--weights=int2:8", "--rounding=gptq", "--calibration_bytes=3000")
    assert "the run computes with int2 in blocks of 8" in capsys.readouterr().err
    assert second["rounding"] == "gptq" and second["calibration_bytes"] >= 3000
    assert second["bits_per_byte"] != found["bits_per_byte"]


@pytest.mark.parametrize(
    ("bindings", "said"),
    [
        (["Quantisation.block = 7"], "blocks of 7 don't divide the 16 rows of"),
        (["Quantisation.format = 'int3'"], "int3"),
        (["Quantisation.roles = ('head',)"], "the model has no matrices of head"),
        (["Quantisation.roles = ('experts',)"], "did you mean 'expert'?"),
    ],
)
def test_what_can_not_be_is_told_before_anything_is_compiled(bindings, said, runs, capsys):
    assert runs("wrong", *ROUNDED[:1], *bindings) == 2
    error = capsys.readouterr().err
    assert said in error and "compiling" not in error


def test_a_missing_package_is_told_at_the_start(runs, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert runs("wrong", *ROUNDED) == 2
    error = capsys.readouterr().err
    assert "pip install 'moe-routing[quantise]'" in error and "reading the corpus" not in error
    assert len([line for line in error.splitlines() if line.startswith("moe: error")]) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounding=gptq"], "--rounding=gptq needs --weights=FORMAT"),
        (["--weights=int4", "--rounding=gpt"], "no such rounding; did you mean 'gptq'?"),
        (
            ["--weights=int4", "--calibration_bytes=9"],
            "--calibration_bytes=9 needs --rounding=gptq",
        ),
    ],
)
def test_flags_that_say_nothing_are_refused(flags, said, runs, capsys):
    with quick():
        assert cli.main(["eval", f"--workdir={runs.folder / 'whole'}", *flags]) == 2
    assert said in capsys.readouterr().err
