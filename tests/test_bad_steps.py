"""Bad steps are found where they happen, and skipped or gone back from without a trace.

Broken on purpose: the select of the skipped state left out; the optimizer's state not looked at;
limits from the last step's metrics, too; batches not left out after a rewind; `record` not saved;
negative tokens believed.
"""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Runs, arrays, measured, quick

from moe.cli import config
from moe.data.batches import TrainBatches
from moe.errors import UserError
from moe.runs.loop import Loop
from moe.training import finite
from moe.training.abstract_model import Vocabulary
from moe.training.bad_steps import RewindBadSteps, SkipBadSteps, Watch
from moe.training.run_spec import RunSpec
from moe.training.train_step import TrainingFunctions, to_devices

UP = "stacks.0.unit.blocks.0.feed_forward.experts.up_EDF"
QUERY = "stacks.0.unit.blocks.0.attention.query_DHK"
BIAS = "stacks.0.unit.blocks.0.feed_forward.router.balancer.bias_E"
BALANCED = ("TopK.balancer = @BiasBalancer", "TopK.losses = ()", "Transformer.num_layers = 3")
# Steps (from 0) at which a trapped program breaks, and how.
LOSS, GRADIENT, SPIKE = 3, 5, 7


SKIPS = (
    *BALANCED,
    "train.bad_steps = @SkipBadSteps()",
    "SkipBadSteps.sigmas = 6.0",
    "SkipBadSteps.window = 3",
    "SkipBadSteps.most = 3",
    "train.artifacts = False",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("bad steps"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def trapped(layer, weight, step):
    return weight


def _backward(layer, step, g):
    return g.at[layer, 1].mul(jnp.where(step == GRADIENT, jnp.nan, 1.0)), np.zeros((), "V")


trapped.defvjp(lambda layer, weight, step: (weight, step), _backward)


def with_traps(loss):
    """A loss that is NaN, has NaN in layer 1's gradient, or is 50 times as large."""

    def broken(self, params, state, *rest):
        params = params | {UP: trapped(1, params[UP], state.step)}
        total, measured = loss(self, params, state, *rest)
        factor = jnp.where(state.step == LOSS, jnp.nan, jnp.where(state.step == SPIKE, 50.0, 1.0))
        losses = dataclasses.replace(measured.losses, task=measured.losses.task * factor)
        return total * factor, dataclasses.replace(measured, losses=losses)

    return broken


TRAPPED = with_traps(TrainingFunctions._loss)


@pytest.fixture(scope="module")
def shared():
    """Programs by what broke them, and whether they skip: each is compiled once."""
    return {}


@contextlib.contextmanager
def broken_by(loss, shared):
    """Runs whose loss is this one, with the programs of earlier such runs."""
    build = RunSpec._program

    def once(spec, *given):
        key = loss, isinstance(spec.bad_steps, SkipBadSteps)
        return shared.setdefault(key, build(spec, *given))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingFunctions, "_loss", loss)
        patch.setattr(RunSpec, "_program", once)
        yield


@pytest.fixture
def traps(shared):
    with broken_by(TRAPPED, shared):
        yield


@pytest.fixture(scope="module")
def program(runs, shared):
    """A trapped program that skips, its state, and a batch."""
    with quick(), broken_by(TRAPPED, shared):
        spec = config.load([str(runs.config)], SKIPS)
        text = spec.prepare_data()
        mesh = spec.build_mesh()
        _, program = spec.build(Vocabulary.of(text.tokenizer), mesh, text.train.token_N)
        state = program.init(0)
        batch = text.train_batches(*spec.shape, 0).batch(0)
        batch = to_devices(batch, program.batch_sharding, spec.batch_size)
        state, _ = program.step(state, batch)  # compiled with the traps; moments are not 0
    return program, state, batch


def at(state, step, **changes):
    """A copy, since a step takes its state's memory."""
    copy = jax.tree.map(jnp.copy, state)
    number = jax.device_put(jnp.int32(step), state.step.sharding)  # or it would be compiled anew
    return dataclasses.replace(copy, **{"step": number, **changes})


def edited(values, name, value):
    return values | {name: values[name].at[1, 2].set(value)}


def optimizer_with(state, field, value):
    """AdamW's state with one value of layer 1 changed."""
    clip, adam, *rest = state.opt_state
    adam = adam._replace(**{field: edited(getattr(adam, field), UP, value)})
    return (clip, adam, *rest)


PLACES = {
    "loss": (lambda s: at(s, LOSS), "not finite: loss, gradient norm (all)"),
    "gradient": (
        lambda s: at(s, GRADIENT),
        rf"first (from the loss backwards) in layer 1: gradients.{UP}",
    ),
    "parameter": (
        lambda s: at(s, 1, params=edited(s.params, QUERY, np.nan)),
        f"first in layer 1: params.{QUERY}, before this step",
    ),
    "activation": (
        lambda s: at(s, 1, params=edited(s.params, QUERY, 3e38)),
        "first in layer 1 or before it, by the routers' logits",
    ),
    "infinite moment": (
        lambda s: at(s, 1, opt_state=optimizer_with(s, "nu", np.inf)),
        f"not finite: optimizer state, first in layer 1: opt_state.1.nu.{UP}",
    ),
    "moment": (
        lambda s: at(s, 1, opt_state=optimizer_with(s, "mu", np.nan)),
        f"not finite: update norm, optimizer state, first in layer 1: opt_state.1.mu.{UP}",
    ),
    "router state": (
        lambda s: at(s, 1, router_state=edited(s.router_state, BIAS, np.nan)),
        f"router state, first in layer 1: router_state.{BIAS}",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_first_layer_and_tensor_are_named_and_nothing_is_changed(place, program, traps):
    program, good, batch = program
    change, expected = PLACES[place]
    before = change(good)
    after, metrics = program.step(at(before, int(before.step)), batch)
    metrics = jax.device_get(metrics)
    assert metrics.skipped
    assert expected in (Watch(None).fault(1, metrics) or "")
    jax.tree.map(np.testing.assert_array_equal, at(after, 0), at(before, 0))
    assert int(after.step) == int(before.step) + 1


def test_a_good_step_is_neither_skipped_nor_called_bad(program, traps):
    program, good, batch = program
    after, metrics = program.step(at(good, 1), batch)
    metrics = jax.device_get(metrics)
    assert not metrics.skipped and Watch(None).fault(1, metrics) is None
    assert not any(np.any(flags) for flags in metrics.broken.values())
    assert not np.array_equal(after.params[UP], good.params[UP])
    # The limits are of loss and gradient norm, and inclusive.
    exact = np.array([metrics.loss, metrics.grad_norms["all"]], np.float32)
    for limits, skipped in (
        (exact, False),
        (exact * [0.999, 1], True),
        (exact * [1, 0.999], True),
    ):
        found = program.step(at(good, 1), batch, limits=limits.astype(np.float32))[1]
        assert bool(found.skipped) == skipped


def test_limits_do_not_depend_on_when_metrics_are_read():
    watch = Watch(SkipBadSteps(sigmas=2.0, window=3))
    assert np.isinf(watch.limits(1)).all()
    watch.recent = [(1, 1.0, 10.0), (2, 2.0, 10.0), (4, 3.0, 10.0)]
    # mean 2, standard deviation sqrt(2 / 3); the norm never varies
    expected = [2 + 2 * np.sqrt(2 / 3), 10]
    np.testing.assert_allclose(watch.limits(6), expected, rtol=1e-6)
    watch.recent.append((5, 100.0, 100.0))  # read already, or not
    np.testing.assert_allclose(watch.limits(6), expected, rtol=1e-6)
    assert np.isinf(watch.limits(5)).all()  # only two good steps before step 4
    again = Watch.of(watch.policy, json.loads(json.dumps(watch.record()))["bad_steps"])
    assert again == watch


def test_skipped_steps_are_counted_and_a_run_goes_on_the_same(runs, traps, capsys):
    """NaN at steps 4 and 6, a spike at step 8; saved at each step, or stopped in between."""
    whole = runs.done("skips", *SKIPS, "train.save_every = 1", "train.keep = 12")
    out = capsys.readouterr().out
    assert "step 4 is skipped, 1 of at most 3: not finite: loss" in out
    assert "step 6 is skipped, 2 of at most 3: not finite: gradient norm (all)" in out
    assert "step 8 is skipped, 3 of at most 3: a spike: the loss of" in out
    lines = measured(whole)
    assert [line["bad_steps"] for line in lines] == [0] * 3 + [1] * 2 + [2] * 2 + [3] * 5
    assert lines[3]["loss"] is None and lines[4]["loss"] > 0
    assert json.loads((whole / "summary.json").read_text())["skipped_steps"] == 3
    for bad in (LOSS, GRADIENT, SPIKE):
        before, after = arrays(whole, bad), arrays(whole, bad + 1)
        assert before.pop("step") + 1 == after.pop("step")
        jax.tree.map(np.testing.assert_array_equal, after, before)
    # Without the checkpoints that let the host read metrics early.
    assert runs("stopped", *SKIPS, "train.stop_at = 7") == 0
    stopped = runs.done("stopped", *SKIPS)
    assert measured(stopped) == lines
    jax.tree.map(np.testing.assert_array_equal, arrays(stopped, 12), arrays(whole, 12))


def test_one_bad_step_too_many_ends_the_run(runs, traps, capsys):
    fewer = [binding.replace("most = 3", "most = 1") for binding in SKIPS]
    assert runs("too many", *fewer, "train.save_every = 1") == 2
    error = capsys.readouterr().err
    assert "step 6: not finite: gradient norm (all)" in error
    assert "1 bad steps were skipped, as many as SkipBadSteps.most allows" in error
    assert "checkpoints holds step 5" in error


REWINDS = (
    "train.bad_steps = @RewindBadSteps()",
    "RewindBadSteps.most = 2",
    "train.save_every = 3",
    "train.artifacts = False",
)


def with_bad_texts(texts, loss=TrainingFunctions._loss):
    """A loss that is NaN on batches of these texts."""

    def broken(self, params, state, batch, *rest):
        total, measured = loss(self, params, state, batch, *rest)
        bad = jnp.stack([(batch.token_BT == text).all() for text in texts]).any()
        return total * jnp.where(bad, jnp.nan, 1.0), measured

    return broken


def test_a_second_rewind_to_one_checkpoint_keeps_out_what_the_first_left_out():
    """Step n reads batch n - 1 + left_out, from 0; batches 5 and 6 are bad."""
    watch = Watch.of(RewindBadSteps(most=2), None)
    saved = watch.record().get("bad_steps")
    watch.rewound(bad=6, step=4, record=saved)  # step 6 had batch 5
    assert watch.left_out == 2
    watch.rewound(bad=5, step=4, record=saved)  # step 5 had batch 6
    assert watch.left_out == 3 and watch.rewinds == 2


@pytest.mark.thorough
def test_a_rewind_leaves_out_the_data_of_the_bad_stretch(runs, shared, capsys):
    """Batches 1 and 7 (from 0) are bad: steps 2 and 6 are reached with others, after two rewinds.

    The first goes back to the first state and leaves out batches 0 and 1; step 6 then has batch 7,
    and is left out with those after step 3: batches 5, 6 and 7. Step 4 has batch 8.
    """
    with quick():
        spec = config.load([str(runs.config)], REWINDS)
        made = spec.prepare_data().train_batches(*spec.shape, spec.seed)
        texts = [made.batch(i).token_BT for i in (1, 7)]
    loss = with_bad_texts(texts)
    with broken_by(loss, shared):
        assert runs("rewound", *REWINDS, "train.stop_at = 7") == 0
        out = capsys.readouterr().out
        assert "step 2: not finite" in out
        assert "going on from step 0 without the batches of the 2 steps after it, rewind 1" in out
        assert "going on from step 3 without the batches of the 3 steps after it, rewind 2" in out
        rewound = runs.done("rewound", *REWINDS)
    assert json.loads((rewound / "summary.json").read_text())["rewinds"] == 2
    batch = TrainBatches.batch

    def others(self, i, rows=None):
        return batch(self, i + (2 if i < 3 else 5), rows)

    with pytest.MonkeyPatch.context() as patch, broken_by(loss, shared):
        patch.setattr(TrainBatches, "batch", others)
        expected = runs.done("others", "train.artifacts = False")
    lines = measured(rewound)
    assert [line.pop("bad_steps") for line in lines][-1] == 2
    assert lines == measured(expected)
    jax.tree.map(np.testing.assert_array_equal, arrays(rewound, 12), arrays(expected, 12))


def test_rewinds_are_bounded_and_need_a_checkpoint(runs, traps, capsys):
    """The state's step is at fault, so that no other data help."""
    assert runs("bounded", *REWINDS, *BALANCED) == 2
    captured = capsys.readouterr()
    assert captured.out.count("going on from step 3") == 2
    assert "step 4: not finite: loss" in captured.err
    with pytest.raises(UserError, match=r"set train\.save_every or train\.eval_every"):
        with quick():
            config.load([str(runs.config)], REWINDS[:1])


def breaking(change):
    """Loop._step with the state changed before step 2."""
    step = Loop._step

    def broken(self, state, batch, number, given):
        return step(self, change(state) if number == 2 else state, batch, number, given)

    return broken


STATES = {
    "optimizer": (
        lambda s: at(s, 1, opt_state=optimizer_with(s, "nu", np.inf)),
        f"step 2: not finite: optimizer state, first in layer 1: opt_state.1.nu.{UP}",
    ),
    "router": (
        lambda s: at(s, 1, router_state=edited(s.router_state, BIAS, np.nan)),
        f"router state, first in layer 1: router_state.{BIAS}",
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_broken_state_ends_the_run_in_the_same_step_and_is_not_saved(
    kind, runs, traps, capsys, monkeypatch
):
    change, expected = STATES[kind]
    monkeypatch.setattr(Loop, "_step", breaking(change))
    assert runs(kind, *BALANCED, "train.save_every = 1", "train.artifacts = False") == 2
    error = capsys.readouterr().err
    assert "step 2: not finite" in error and expected in error and "holds step 1" in error
    assert [path.name for path in (runs.folder / kind / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize("token", [-1, 257])
def test_a_broken_batch_is_named_before_it_is_trained_on(token, runs, traps, capsys, monkeypatch):
    """The third step's batch."""
    batch = TrainBatches.batch

    def broken(self, i, rows=None):
        found = batch(self, i, rows)
        if i != 2:
            return found
        token_BT = np.array(found.token_BT)
        token_BT[1, 5] = token
        return dataclasses.replace(found, token_BT=token_BT)

    monkeypatch.setattr(TrainBatches, "batch", broken)
    name = f"batch {token}"
    assert runs(name, *BALANCED, "train.save_every = 1", "train.artifacts = False") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"step 3: the batch is broken, first in token_BT, row 1, place 5: token {token}," in line
    assert "the vocabulary has 257" in line and "holds step 2" in line
    kept = sorted(path.name for path in (runs.folder / name / "checkpoints").iterdir())
    assert kept == ["1", "2"]


def test_whoever_met_a_bad_step_may_choose_to_skip_it(runs, traps, capsys):
    plain = (*BALANCED, "train.save_every = 3", "train.artifacts = False")
    assert runs("chosen", *plain) == 2
    assert "set train.bad_steps" in capsys.readouterr().err
    assert runs("chosen", *plain, "train.bad_steps = @SkipBadSteps()") == 0
    assert "step 4 is skipped, 1 of at most 20" in capsys.readouterr().out


def test_layers_are_those_of_the_model():
    """Two stacks: one layer, then two units of two blocks; layers 0, then 1 to 4."""
    sizes = {
        "params.stacks.0.unit.a_D": 1,
        "params.stacks.1.unit.blocks.0.a_D": 2,
        "params.stacks.1.unit.blocks.1.a_D": 2,
        "params.embedding_VD": 7,
    }
    found = [[finite.layer_of(name, row, sizes) for row in range(n)] for name, n in sizes.items()]
    assert found == [[0], [1, 3], [2, 4], [None] * 7]
    assert finite.place("params.embedding_VD", 3, sizes) == "row 3"


def test_the_policy_may_change_and_the_data_may_not():
    names = RunSpec.may_change()
    assert {"train.bad_steps", "SkipBadSteps.most", "RewindBadSteps.sigmas"} <= set(names)
    assert "train.batch_size" not in names
