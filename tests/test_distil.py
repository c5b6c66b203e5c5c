"""Distillation: its loss against the formula, a run with a teacher end to end, and each refusal.

Broken once, each seen red: the loss without temperature^2, its gradient without the temperature,
with the wrong sign or of unscored tokens; a teacher by the training rule; the shares of both terms
swapped; a reported loss with the second term; the newest checkpoint for a run that goes on; no look
at its fingerprint; no tokenizer, objective or length compared; a teacher's config that is trusted,
or read into the run's own; one thing left out of what is put back; a teacher's values on every
device.
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BASE, Runs, arrays, lines, measured

from layers.kernels import cross_entropy
from layers.kernels.divergence import divergence_sum
from layers.logical_axes import sharding_rules
from layers.moe_layer import MoELayer
from moe import settings
from moe.cli import config
from moe.cli import main as cli
from moe.data.batches import train_batch
from moe.errors import UserError
from moe.model import functional, sharding
from moe.model.sharding import MeshShape
from moe.model.transformer import Transformer
from moe.planning import plan as planning
from moe.planning.chips import Topology
from moe.runs.restore import restore_run
from moe.runs.storage import checkpoint, manifest
from moe.sweeps.cell import build, read_config
from moe.training import objective as objectives
from moe.training.abstract_model import Vocabulary
from moe.training.distillation import Distillation, Teacher
from moe.training.run_spec import RunSpec
from moe.training.train_step import to_devices
from routing import NoisyTopK, TopK

B, T, D, DT, V = 16, 12, 5, 7, 11


def inputs(seed: int = 0):
    """Output weights and representations of student and teacher, and which tokens are scored."""
    keys = jax.random.split(jax.random.key(seed), 5)
    return (
        jax.random.normal(keys[0], (D, V)),
        3 * jax.random.normal(keys[1], (B, T, D)),
        jax.random.normal(keys[2], (DT, V)),
        3 * jax.random.normal(keys[3], (B, T, DT)),
        jax.random.bernoulli(keys[4], 0.7, (B, T)),
    )


def plain(student, teacher, scored, temperature) -> float:
    """Hinton et al.'s formula in float64, a token at a time, from logits (B, T, V)."""
    total = 0.0
    for s_V, t_V in zip(student[scored], teacher[scored], strict=True):
        p_V, q_V = (np.exp(a / temperature) / np.exp(a / temperature).sum() for a in (t_V, s_V))
        total += temperature**2 * sum(p * np.log(p / q) for p, q in zip(p_V, q_V, strict=True))
    return total


@pytest.mark.parametrize("block", [1, 50, 10**9])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_value_and_gradients_are_those_of_the_formula(block, temperature, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_LOGITS", block)
    weight, hidden, teacher_weight, teacher_hidden, scored = inputs()

    def ours(w, h, tw, th):
        return 0.5 * divergence_sum(w, h, tw, th, scored, temperature)

    def theirs(w, h, tw, th):
        s, t = ((a @ b) / temperature for a, b in ((h, w), (th, tw)))
        each = (jax.nn.softmax(t) * (jax.nn.log_softmax(t) - jax.nn.log_softmax(s))).sum(-1)
        return 0.5 * temperature**2 * jnp.where(scored, each, 0).sum()

    arrays = weight, hidden, teacher_weight, teacher_hidden
    value, gradients = jax.value_and_grad(ours, (0, 1, 2, 3))(*arrays)
    logits = (
        np.asarray(h, np.float64) @ np.asarray(w, np.float64) for w, h in (arrays[:2], arrays[2:])
    )
    np.testing.assert_allclose(
        value, 0.5 * plain(*logits, np.asarray(scored), temperature), rtol=1e-5
    )
    expected = jax.grad(theirs, (0, 1))(*arrays)
    for got, want in zip(gradients[:2], expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for got in gradients[2:]:  # the teacher learns nothing
        assert not np.asarray(got).any()


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "data": 2, "tensor": 2}, {"sequence": 4}])
def test_a_mesh_changes_nothing(sizes):
    """Sharded by sequences alone, with the vocabulary cut, and with tokens cut."""
    arrays = inputs(1)
    scored = arrays[-1]

    def loss(w, h, *rest):
        return divergence_sum(w, h, *rest, scored, 2.0)

    grad = jax.jit(jax.value_and_grad(loss, (0, 1)))
    want, wanted = grad(*arrays[:4])
    mesh = MeshShape(**({"data": -1} | sizes)).build()
    with sharding_rules(sharding.rule(mesh), mesh.devices.flat[0]):
        got, found = jax.jit(jax.value_and_grad(lambda *a: loss(*a), (0, 1)))(*arrays[:4])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


MOE = functools.partial(MoELayer, num_experts=4, d_ff=16, router=NoisyTopK)
LARGE = functools.partial(Transformer, d_model=16, num_layers=1, num_heads=2, moe=MOE)
DENSE = functools.partial(Transformer, d_model=8, num_layers=1, num_heads=2)
ONE = MeshShape(data=1, fsdp=1, expert=1)
RUN = RunSpec(data=None, model=DENSE, mesh=ONE, steps=3, batch_size=B, sequence_length=T)


def program_of(student, teacher, distil=None, **changed):
    """The models without values and the training step of a student, 11 tokens in the vocabulary."""
    distil = distil or Distillation("nowhere", temperature=2.0, weight=0.3)
    spec = dataclasses.replace(RUN, model=student, distil=distil, **changed)
    mesh = spec.build_mesh(jax.devices()[: 8 if spec.mesh != ONE else 1])
    of_teacher = dataclasses.replace(spec, model=teacher).build_model(Vocabulary(V))
    taught = Teacher.of(of_teacher, distil, mesh)
    return taught, *spec.build(Vocabulary(V), mesh, teacher=taught)


def values_of(model, seed: int):
    return functional.initial_values(model.graph, *model.shapes, seed)


def rows_of(program):
    window_BW = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)
    batch = train_batch(window_BW, np.arange(B, dtype=np.int32), document_id=3)
    return to_devices(batch, program.batch_sharding, B)


def given_of(taught, params, router_state, **numbers):
    values = taught.with_values(params, router_state).values
    return values._replace(**{name: np.float32(value) for name, value in numbers.items()})


def test_a_step_learns_from_both_and_its_teacher_reads_by_the_evaluation_rule():
    """The teacher's router is noisy in training. The loss that is reported stays the task's."""
    taught, model, program = program_of(DENSE, LARGE)
    state, rows = program.init(0), rows_of(program)
    values = values_of(taught.model, 7)

    def at(weight, values=values):
        given = given_of(taught, *values, weight=weight)
        return program.gradients(state, rows, teacher=given)

    (text, _), (both, metrics), (teacher, _) = at(0.0), at(0.3), at(1.0)
    for name, grad in at(0.0, values_of(taught.model, 8))[0].items():  # no teacher matters there
        np.testing.assert_array_equal(grad, text[name], err_msg=name)
    for name in both:
        mixed = 0.7 * text[name] + 0.3 * teacher[name]
        np.testing.assert_allclose(both[name], mixed, rtol=1e-4, atol=1e-6, err_msg=name)
    tokens = objectives.tokens_of(rows, objectives.step_key(0, 1), train=False)
    logits = jax.jit(lambda one: one.logits(one(tokens).hidden_BTD))
    whole = (
        model.graph.merge(state.params, state.router_state),
        taught.model.graph.merge(*values),
    )
    student, other = (np.asarray(logits(one), np.float64) for one in whole)
    scored, target = np.asarray(rows.scored_BT), np.asarray(rows.target_BT)
    picked = np.take_along_axis(student, target[..., None], -1)[..., 0]
    nats = np.log(np.exp(student).sum(-1)) - picked
    np.testing.assert_allclose(metrics.loss, nats[scored].mean(), rtol=1e-5)
    expected = plain(student, other, scored, 2.0) / scored.sum()
    np.testing.assert_allclose(metrics.distillation, expected, rtol=1e-5)


@pytest.mark.thorough
def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    taught, _, program = program_of(DENSE, DENSE)
    state = program.init(0)
    same = given_of(taught, state.params, state.router_state, weight=1.0)
    grads, metrics = program.gradients(state, rows_of(program), teacher=same)
    assert abs(float(metrics.distillation)) < 1e-6
    for name, grad in grads.items():
        assert np.abs(grad).max() < 1e-6, name
    other = given_of(taught, *values_of(taught.model, 7), weight=1.0)
    grads, metrics = program.gradients(state, rows_of(program), teacher=other)
    assert float(metrics.distillation) > 0.01 and np.abs(grads["embedding_VD"]).max() > 1e-3


@pytest.mark.thorough
def test_micro_batches_a_mesh_and_unrolled_layers_change_nothing():
    """The teacher's values are cut as its parameters are; they are no part of the state."""
    teacher = functools.partial(LARGE, num_layers=2)
    student = functools.partial(teacher, moe=functools.partial(MOE, router=TopK))
    taught, _, program = program_of(student, teacher)
    mesh = MeshShape(data=2, fsdp=2, expert=2)
    unrolled = functools.partial(student, scan=False)
    wide, _, other = program_of(unrolled, teacher, mesh=mesh, accumulate=2)
    values = values_of(taught.model, 7)
    (name,) = (n for n in values[0] if n.endswith("experts.up_EDF"))
    placed = jax.device_put(values, tuple(wide.shardings(other.batch_sharding.mesh)[:2]))
    assert placed[0][name].addressable_shards[0].data.size == values[0][name].size / 4
    state = program.init(0)
    assert all(not n.startswith("teacher") for n in checkpoint.as_tree(state))
    want, wanted = program.gradients(state, rows_of(program), teacher=given_of(taught, *values))
    got, found = other.gradients(other.init(0), rows_of(other), teacher=given_of(wide, *placed))
    np.testing.assert_allclose(found.distillation, wanted.distillation, rtol=1e-5)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-5)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-6, err_msg=name)


ONE_LAYER = ("Transformer.num_layers = 1", "train.steps = 8", "train.save_every = 2")
STUDENT = (*ONE_LAYER, "Transformer.moe = None", "Transformer.d_model = 8", "train.seed = 3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A mixture that was trained for a while, with checkpoints of steps 2 and 4."""
    runs = Runs(tmp_path_factory.mktemp("distil"))
    runs.teacher = runs.folder / "teacher"
    assert runs("teacher", *ONE_LAYER, "train.stop_at = 4") == 0
    return runs


def taught(teacher, *bindings) -> tuple[str, ...]:
    named = ("train.distil = @Distillation()", f"Distillation.teacher = {str(teacher)!r}")
    return (*STUDENT, *named, *bindings)


def test_a_run_with_a_teacher_goes_on_bit_for_bit_with_the_checkpoint_it_began_with(runs, capsys):
    teacher, whole, stopped = (runs.folder / name for name in ("growing", "whole", "stopped"))
    shutil.copytree(runs.teacher, teacher)
    newest, began_with = (teacher / "checkpoints" / step for step in ("4", "2"))
    shutil.rmtree(newest)
    assert runs("whole", *taught(teacher), "train.stop_at = 6") == 0
    assert "growing, step 2: " in capsys.readouterr().out
    record = json.loads((whole / "run.json").read_text())["teacher"]
    assert record["run"] == str(teacher) and record["step"] == 2
    assert all(line["distillation"] > 0 for line in lines(whole / "metrics.jsonl"))
    # The student's own settings are in force, and recorded, though the teacher's were read.
    text = (whole / "config.gin").read_text()
    assert "Transformer.d_model = 8\n" in text and "train.seed = 3\n" in text
    assert not any(name.startswith("teacher") for name in arrays(whole, 6))

    assert runs("stopped", *taught(teacher), "train.stop_at = 2") == 0
    shutil.copytree(runs.teacher / "checkpoints" / "4", newest)  # the teacher has learned more
    capsys.readouterr()
    assert runs("stopped", *taught(teacher), "train.stop_at = 6") == 0
    assert "growing, step 2: " in capsys.readouterr().out
    assert measured(stopped) == measured(whole)
    ours, theirs = arrays(stopped, 6), arrays(whole, 6)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)

    runs.done("whole", *taught(teacher))
    # Another checkpoint in its place, or none, is not gone on with; nor is the run by itself.
    (extra,) = (began_with / "extra").glob("metadata")
    extra.write_text(extra.read_text() + " ")
    manifest.write(began_with, 2)
    assert runs("stopped", *taught(teacher)) == 2
    assert "step 2 is not the one that this run began with" in capsys.readouterr().err
    shutil.rmtree(began_with)  # the teacher has trained on, and keeps its last ones
    assert runs("stopped", *taught(teacher)) == 2
    assert "began with the checkpoint of step 2, which that run has no more" in (
        capsys.readouterr().err
    )
    shutil.rmtree(teacher)
    assert runs("stopped", *taught(teacher)) == 2
    assert "no run there: it has no config.gin" in capsys.readouterr().err
    assert runs("stopped", *STUDENT) == 2
    assert "train.distil: @Distillation() there, None here" in capsys.readouterr().err
    # The student needs no teacher to be measured, nor to be found finished.
    assert restore_run(str(whole), config.of_folder(str(whole)), step=6).step == 6
    capsys.readouterr()
    assert runs("whole", *taught(teacher)) == 0
    assert "this run is complete at step 8" in capsys.readouterr().out


def copy_with(runs, name, change) -> str:
    """A copy of the teacher's folder with another config."""
    path = runs.folder / name
    shutil.copytree(runs.teacher, path, dirs_exist_ok=True)
    text = path / "config.gin"
    text.write_text(change(text.read_text()))
    return str(path)


def short(runs) -> str:
    def change(text):
        text = text.replace("max_length = None", "max_length = 32")
        return text.replace("positions = 'rotary'", "positions = 'learned'")

    return copy_with(runs, "short", change)


def importing(runs) -> str:
    return copy_with(runs, "importing", lambda text: "import not_ours\n" + text)


@pytest.mark.parametrize(
    ("teacher", "bindings", "said"),
    [
        ("nowhere", (), "nowhere': no run there: it has no config.gin"),
        (
            "teacher/checkpoints/2",
            (),
            "this is a checkpoint; set Distillation.teacher = '{folder}/teacher' and "
            "Distillation.step = 2",
        ),
        (
            "teacher",
            ("TextData.tokenizer = @TrainedBPE()", "TrainedBPE.vocab_size = 300"),
            "another tokenizer; take its own: TextData.tokenizer = @TokenizerFile() and "
            "TokenizerFile.path = '{folder}/teacher/tokenizer'",
        ),
        (
            "teacher",
            ("train.objective = @MaskedToken()",),
            "train.objective is @NextToken(), this run's @MaskedToken(); they must be the same",
        ),
        (
            short,
            ("train.sequence_length = 64",),
            "max_length=32 is shorter than sequence_length=64",
        ),
        (importing, (), "import it in this run's config: import not_ours"),
        ("teacher", ("Distillation.step = 3",), "has no checkpoint of step 3; it has [2, 4]"),
        (
            "teacher",
            ("Distillation.weight = 1.5",),
            "Distillation.weight: expected at most 1, got 1.5",
        ),
        (
            "teacher",
            ("Distillation.temperature = 0.0",),
            "Distillation.temperature: expected a number above 0",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_what_can_teach_nothing_is_told_in_a_line(teacher, bindings, said, runs, capsys):
    path = teacher(runs) if callable(teacher) else str(runs.folder / teacher)
    assert runs("refused", *taught(path, *bindings)) == 2
    err = capsys.readouterr().err.strip()
    assert said.format(folder=runs.folder) in err and "\n" not in err, err
    shutil.rmtree(runs.folder / "refused", ignore_errors=True)


def test_numbers_out_of_range_are_refused_in_python_too():
    for numbers in ({"weight": -0.1}, {"weight": 1.1}, {"temperature": 0.0}):
        with pytest.raises(UserError, match=r"Distillation\."):
            Distillation("runs/teacher", **numbers)


def test_a_configuration_aside_changes_nothing(runs):
    """Neither what is set, nor what was used of it, nor what came by hand."""
    config.bind([str(runs.config)], ["train.seed = 3", "AdamW.b1 = 0.5", "train.optimizer = None"])
    RunSpec()
    before = settings.operative(), settings.unused()
    with settings.aside():
        config.bind([str(runs.teacher / "config.gin")], ["train.seed = 9", "TopK.k = 1"])
        assert RunSpec().seed == 9
        spec = RunSpec(data=None)
        spec.build_model(Vocabulary(V))
    assert (settings.operative(), settings.unused()) == before
    assert RunSpec().seed == 3
    with pytest.raises(UserError, match=r"this run would ignore AdamW\.b1"):
        settings.refuse_ignored(lambda line: None)


def test_a_sweep_can_have_it_as_an_arm_and_a_plan_says_what_it_leaves_out(tmp_path, capsys):
    """No teacher is at hand there."""
    base = tmp_path / "base.gin"
    base.write_text(BASE + "TextFiles.paths = 'texts'\n")
    arm = ("train.distil = @Distillation()", "Distillation.teacher = 'runs/teacher'")
    built = build(read_config([str(base), *arm]))
    assert built.spec.distil == Distillation("runs/teacher")
    assert not any(name.startswith("Distillation") for name in built.unused)
    given = [f"--gin_bindings={line}" for line in arm]
    assert cli.main(["describe", f"--gin_file={base}", *given]) == 0
    said = "0.5 of the loss from runs/teacher, its newest checkpoint, at temperature 2"
    assert f"{said}; its FLOPs are left out" in capsys.readouterr().out
    config.bind([str(base)], arm)
    step = planning.build(Topology.read("v5e:2x2"), 257)
    assert step.left_out == f"the teacher's values and its forward pass ({said})"
