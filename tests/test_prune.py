"""Experts taken out of a run, or merged: which, what is left, and the folder that is written.

Broken on purpose, each of which made a test here fail: the mean over all tokens in place of an
expert's own, gates left out of the saliency, and counted twice where inputs have them, padding
counted, the lowest kept in place of the highest, one kept set for all layers, hidden units averaged
without alignment, the new folder written in its place, DSelectK and Switch with scores that depend
on each other accepted.
"""

import contextlib
import dataclasses
import io
import json
import os
from pathlib import Path

from flax import nnx
import jax
import jax.numpy as jnp
from marks import mainly
import numpy as np
import pytest
from tiny import BASE as TINY
from tiny import Runs, arrays, quick

from layers.moe_layer import MoELayer
from moe.cli import config
from moe.cli import main as cli
from moe.cli.eval import evaluate_run
from moe.cli.prune import smaller_model, with_fewer, with_float_weights
from moe.errors import UserError
from moe.pruning.choose import Choice, How, choose
from moe.pruning.measure import Measured, measured_on_text, watch
from moe.pruning.refusals import check_model
from moe.pruning.shrink import aligned, averaged
from moe.runs.restore import restore_run
from moe.training.abstract_model import Vocabulary
import routing
from routing import Tokens, TopK, initialize
from routing.algorithms.base import BASE
from routing.algorithms.controls import AllExperts, FrozenTopK
from routing.algorithms.sinkhorn import Sinkhorn
from routing.inputs import RouterInputs
from routing.records import Sizes, gates_GTE

EXACT = (
    "TopK.gates = 'softmax_of_selected'",
    "TopK.balancer = @BiasBalancer",
    "train.optimizer = @AdamW()",
    "AdamW.learning_rate = 0.02",
    "train.artifacts = False",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("prune"))
    return runs, runs.done("whole", *EXACT)


@pytest.fixture(scope="module")
def run(made):
    with quick():
        return restore_run(str(made[1]), config.of_folder(str(made[1])))


def loaded(folder):
    return lambda more: config.of_folder(str(folder), more)


def moe(*words: str) -> tuple[int, str]:
    """A command in this process: its status and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with quick(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(words))
    return status, out.getvalue() + err.getvalue()


def test_of_a_run_with_rounded_weights_the_floats_are_kept(made, run):
    rounding = ["train.weights = @Quantisation()", "Quantisation.format = 'int2'"]
    spec = config.of_folder(str(made[1]), rounding)
    with quick():
        found = with_float_weights(str(made[1]), spec, None)
    assert found.model.graph.rounding == spec.weights is not None
    for name, array in run.params.items():
        np.testing.assert_array_equal(found.params[name], array)


def measured(run) -> Measured:
    return measured_on_text(run.model, run, run.mesh, run.spec.prepare_data(), 4000, 0)


@pytest.mark.parametrize("gates_on", ["output", "input"])
def test_saliencies_are_those_of_a_slow_loop(gates_on):
    """B = 2 sequences of T = 6 tokens, two of which are padding; E = 4, K = 2."""
    from layers.experts.feed_forward_experts import FeedForwardExperts

    layer = MoELayer(
        d_model=8,
        vocab_size=9,
        num_experts=4,
        d_ff=6,
        activation="relu",
        router=lambda sizes: TopK(sizes, k=2),
        experts=lambda sizes: FeedForwardExperts(sizes, gates_on=gates_on),
    )
    initialize(layer, 0)
    watch(layer)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 6, 8))
    tokens = Tokens.of(jnp.zeros((2, 6), jnp.int32))
    tokens = dataclasses.replace(tokens, segment_BT=tokens.segment_BT.at[1, 4:].set(0))
    _, output = jax.jit(lambda x: layer(x, tokens))(x_BTD)
    sums = output.stats.batch_sums["companion/measure"]

    count_E, norm_E, logits_EE = np.zeros(4, int), np.zeros(4), np.zeros((4, 4))
    up_EDF, down_EFD = (
        np.asarray(layer.experts.up_EDF[...]),
        np.asarray(layer.experts.down_EFD[...]),
    )
    for b, t in ((b, t) for b in range(2) for t in range(6) if not (b == 1 and t >= 4)):
        x_D = np.asarray(x_BTD[b, t])
        logit_E = x_D @ np.asarray(layer.router.weight_DE[...])
        gate_E = np.exp(logit_E) / np.exp(logit_E).sum()
        logits_EE += np.outer(logit_E, logit_E)
        for e in np.argsort(-gate_E)[:2]:
            before, after = (gate_E[e], 1) if gates_on == "input" else (1, gate_E[e])
            y_D = after * (np.maximum(before * x_D @ up_EDF[e], 0) @ down_EFD[e])
            count_E[e] += 1
            norm_E[e] += np.sqrt((y_D**2).sum())
    np.testing.assert_array_equal(sums["count"], count_E)
    np.testing.assert_allclose(sums["norm"], norm_E, rtol=1e-5)
    np.testing.assert_allclose(sums["logits"], logits_EE, rtol=1e-4, atol=1e-5)
    found = Measured(count_E[None], norm_E[None], logits_EE[None], 10)
    np.testing.assert_allclose(found.saliency_LE[0], norm_E / np.maximum(count_E, 1))


def test_the_lowest_go_in_each_layer():
    count_LE = np.array([[8.0, 1, 4, 0], [2, 2, 2, 9]])
    norm_LE = np.array([[8.0, 6, 2, 0], [2, 4, 6, 9]])  # means 1, 6, 0.5, 0 and 1, 2, 3, 1
    found = Measured(count_LE, norm_LE, np.tile(np.eye(4), (2, 1, 1)), 13)
    assert choose(found, How(), 2).kept_LN.tolist() == [[0, 1], [1, 2]]
    assert choose(found, How(by="load"), 2).kept_LN.tolist() == [[0, 2], [0, 3]]
    drawn = [choose(found, How(by="random", seed=seed), 2).kept_LN for seed in range(8)]
    assert len({a.tobytes() for a in drawn}) > 4
    np.testing.assert_array_equal(drawn[3], choose(found, How(by="random", seed=3), 2).kept_LN)
    like_EE = np.array([[4.0, 0, 1, -1], [0, 1, 0, 0], [1, 0, 1, 0.9], [-1, 0, 0.9, 1]])
    found = Measured(count_LE, norm_LE, np.stack([like_EE, like_EE]), 13)
    homes = choose(found, How("merge", "load"), 2).home_LE
    assert homes.tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]  # 2 by load goes with 3, whose cosine wins
    assert choose(found, How(by="load"), 2).home_LE.tolist() == [[0, -1, 1, -1], [0, -1, -1, 1]]


def experts_of(seed: int, width: int = 6) -> dict[str, np.ndarray]:
    """Two random experts (2, 4, F) and the same ones with their hidden units in another order."""
    rng = np.random.default_rng(seed)
    up_EDF, gate_EDF = rng.normal(size=(2, 2, 4, width)).astype(np.float32)
    down_EFD = rng.normal(size=(2, width, 4)).astype(np.float32)
    order_F = rng.permutation(width)
    return {
        "x.up_EDF": np.concatenate([up_EDF, up_EDF[:, :, order_F]]),
        "x.gate_EDF": np.concatenate([gate_EDF, gate_EDF[:, :, order_F]]),
        "x.down_EFD": np.concatenate([down_EFD, down_EFD[:, order_F]]),
    }


def test_averages_are_weighted_and_of_aligned_units():
    own = experts_of(0)
    order_F = aligned(own, 0, 2)
    np.testing.assert_array_equal(own["x.up_EDF"][2][:, order_F], own["x.up_EDF"][0])
    kept_LN, home_LE = np.array([[0, 1]]), np.array([[0, 1, 0, 1]])
    same = averaged(own, 0, Choice(kept_LN, home_LE, np.array([[3.0, 1, 2, 4]])))
    for name, a in own.items():  # an expert and its reordered copy are one
        np.testing.assert_allclose(same[name][:2], a[:2], rtol=1e-6)
    third = {name: np.concatenate([a[:1], a[:1] + 3, a[:1] - 1]) for name, a in own.items()}
    weights = np.array([[3.0, 1, 0]])
    kept = averaged(third, 0, Choice(np.array([[0]]), np.array([[0, 0, 0]]), weights))
    for name, a in third.items():  # (3 w + 1 (w + 3)) / 4 and nothing of the last
        np.testing.assert_allclose(kept[name][0], a[0] + 0.75, rtol=1e-5)
    none = averaged(third, 0, Choice(np.array([[0]]), np.array([[0, 0, 0]]), 0 * weights))
    np.testing.assert_array_equal(none["x.up_EDF"][0], third["x.up_EDF"][0])


def test_each_layer_keeps_its_own_slices(made, run):
    _, model = smaller_model(loaded(made[1]), run, 2)
    choice = Choice(np.array([[0, 3], [1, 2]]), np.full((2, 4), -1), np.ones((2, 4)))
    fewer = with_fewer(run, model, choice)
    unit = "stacks.0.unit.blocks.0.feed_forward"
    for name, axis in ((f"{unit}.experts.up_EDF", 0), (f"{unit}.router.weight_DE", 1)):
        for layer, kept in enumerate(choice.kept_LN):
            want = np.take(np.asarray(run.params[name])[layer], kept, axis=axis)
            np.testing.assert_array_equal(fewer.params[name][layer], want)
    [bias] = run.router_state
    want = [np.asarray(run.router_state[bias])[i][k] for i, k in enumerate(choice.kept_LN)]
    np.testing.assert_array_equal(fewer.router_state[bias], np.stack(want))
    same = [n for n in run.params if fewer.params[n].shape == run.params[n].shape]
    assert same and all(fewer.params[n] is run.params[n] for n in same)


@pytest.mark.parametrize("method", ["prune", "merge"])
def test_with_all_kept_nothing_changes(method, made, run):
    with quick():
        _, model = smaller_model(loaded(made[1]), run, 4)
    fewer = with_fewer(run, model, choose(measured(run), How(method), 4))
    for old, new in ((run.params, fewer.params), (run.router_state, fewer.router_state)):
        assert old.keys() == new.keys()
        assert all(np.array_equal(old[name], new[name]) for name in old)


def test_an_expert_that_no_token_chose_is_not_missed(made, run):
    """A bias that keeps expert 2 of the first layer and expert 0 of the second from all tokens."""
    [bias] = run.router_state
    closed = jnp.zeros((2, 4)).at[0, 2].set(-1e3).at[1, 0].set(-1e3)
    run = dataclasses.replace(run, router_state={bias: closed})
    with quick():
        found, whole = measured(run), evaluate_run(run)
        assert (found.count_LE == 0).tolist() == (closed < 0).tolist()
        assert found.count_LE.sum() == 2 * 2 * found.tokens
        _, model = smaller_model(loaded(made[1]), run, 3)
        for method in ("prune", "merge"):
            choice = choose(found, How(method), 3)
            assert choice.kept_LN.tolist() == [[0, 1, 3], [1, 2, 3]]
            fewer = evaluate_run(with_fewer(run, model, choice))
            assert abs(fewer.loss - whole.loss) < 1e-6
        moved = choose(found, How(), 3)
        moved = dataclasses.replace(moved, kept_LN=moved.kept_LN[::-1])
        assert abs(evaluate_run(with_fewer(run, model, moved)).loss - whole.loss) > 1e-4


ACCEPTED = [
    *(TopK, routing.Switch, routing.NoisyTopK, routing.GShard, routing.VMoE, routing.ReMoE),
    *(routing.Sampled, BASE, Sinkhorn, FrozenTopK, AllExperts),
]
QUICK = (TopK, routing.Switch, routing.ReMoE, BASE)
THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize("router", mainly(QUICK, ACCEPTED), ids=lambda router: router.__name__)
def test_a_router_that_may_lose_experts_scores_each_alone(router):
    """Without expert 1, tokens that had not chosen it keep their experts and the gates' ratios."""
    x_BTD = 2 * jax.random.normal(jax.random.key(0), (2, 24, 8))
    inputs = RouterInputs.of(x_BTD, Tokens.of(jnp.zeros((2, 24), jnp.int32)))
    assert router.needs_all_experts is None
    whole, fewer = (initialize(router(Sizes(8, n, 9)), 0) for n in (5, 4))
    _, values = nnx.split(whole)
    own = dict(nnx.to_flat_state(values))
    draws = iter(jax.random.split(jax.random.key(7), len(own)))
    new = {p: v.replace(jax.random.normal(next(draws), v.shape)) for p, v in own.items()}
    nnx.update(whole, nnx.from_flat_state(list(new.items())))
    _, small = nnx.split(fewer)
    for path, variable in nnx.to_flat_state(small):
        old = new[path][...]
        axes = [i for i, n in enumerate(old.shape) if n != variable.shape[i]]
        variable.set_value(jnp.delete(old, 1, axis=axes[0]) if axes else old)
    nnx.update(fewer, small)
    with jax.default_matmul_precision("highest"):
        before, after = (
            np.asarray(jax.jit(lambda x, r=r: gates_GTE(r.route(x).decision))(inputs))
            for r in (whole, fewer)
        )
    others = np.delete(before, 1, axis=-1)
    told = (before[..., 1] == 0) if router is not AllExperts else np.ones((2, 24), bool)
    assert told.sum() > 5
    np.testing.assert_array_equal((others > 0)[told], (after > 0)[told])
    shares = [gates / np.maximum(gates.sum(-1, keepdims=True), 1e-9) for gates in (others, after)]
    np.testing.assert_allclose(shares[0][told], shares[1][told], atol=1e-5)


@pytest.mark.parametrize(
    ("files", "bindings", "reason"),
    [
        ("models/dense.gin", "", "the run is dense"),
        ("routers/hash_random.gin", "", "Hash can't do without .*: its table names experts"),
        pytest.param(
            "routers/hierarchical.gin", "", "Hierarchical .*: experts lie in groups", marks=THOROUGH
        ),
        ("routers/expert_choice.gin", "", "ExpertChoiceRouter .*: a removed expert's tokens"),
        pytest.param("routers/lory.gin", "", "Lory .*: it merges", marks=THOROUGH),
        pytest.param("routers/dselect_k.gin", "", "DSelectK .*: its selectors", marks=THOROUGH),
        pytest.param(
            "routers/peer.gin",
            "MoELayer.num_experts = 64",
            "ProductKeys .*: experts are all pairs",
            marks=THOROUGH,
        ),
        ("", "TopK.expert_groups = 2", "TopK .* groups of equal size"),
        ("routers/moe_plus_plus.gin", "", "TopK .*: the next router reads its logits"),
        ("routers/moe_plus_plus.gin", "TopK.residual = False", "ZeroCopyConstant can't do without"),
        ("routers/default_moe.gin", "", "DefaultVectors can't do without"),
        pytest.param(
            "routers/latent_moe.gin", "", "LatentExperts can't do without", marks=THOROUGH
        ),
        ("models/mixture_of_depths.gin", "", "MixtureOfDepths: experts behind a router of depths"),
        pytest.param("routers/gated_shared.gin", "", None, marks=THOROUGH),
        ("routers/llama4.gin", "", None),
        pytest.param("routers/loss_free.gin", "", None, marks=THOROUGH),
    ],
)
def test_what_needs_all_of_its_experts_is_refused_by_name(files, bindings, reason, tmp_path):
    base = tmp_path / "tiny.gin"
    base.write_text(TINY + "TextFiles.paths = 'nowhere'\n")
    small = ["Transformer.d_model = 16", "MoELayer.num_experts = 16", "train.steps = 1"]
    spec = config.load([str(base), *filter(None, [files])], [*small, *filter(None, [bindings])])
    model = spec.build_model(Vocabulary(257))
    if reason is None:
        return check_model(model)
    with pytest.raises(UserError, match=reason):
        check_model(model)


@pytest.fixture(scope="module")
def pruned(made):
    """A new run's folder, what --json has, and what was printed."""
    new, told = made[0].folder / "new", made[0].folder / "told.json"
    words = ("--experts=2", f"--to={new}", f"--json={told}", "--calibration_bytes=4000")
    status, said = moe("prune", f"--workdir={made[1]}", *words)
    assert status == 0 and "2 of 4 experts in each layer" in said
    return new, json.loads(told.read_text())


def test_the_new_folder_says_where_it_comes_from(made, run, pruned):
    whole, (new, found) = made[1], pruned
    about, before = (json.loads((path / "run.json").read_text()) for path in (new, whole))
    assert about["pruned"] == found and found["run"] == str(whole) and found["step"] == 12
    assert about["parameters_total"] < before["parameters_total"]
    assert about["corpus"] == before["corpus"]
    assert found["kept"] == choose(measured(run), How(), 2).kept_LN.tolist()
    name = "params.stacks.0.unit.blocks.0.feed_forward.experts.down_EFD"
    old_LEFD, new_LEFD = arrays(whole, 12)[name], arrays(new, 12)[name]
    for layer, kept in enumerate(found["kept"]):
        np.testing.assert_array_equal(new_LEFD[layer], np.asarray(old_LEFD)[layer][kept])
    assert "MoELayer.num_experts = 2" in (new / "config.gin").read_text()
    assert moe("verify", str(new))[0] == 0


def test_a_pruned_run_is_evaluated_and_not_gone_on_with(pruned):
    new = pruned[0]
    assert moe("eval", f"--workdir={new}")[0] == 0
    before = sorted(p.name for p in new.rglob("*"))
    status, said = moe("train", f"--gin_file={new}/config.gin", f"--workdir={new}")
    assert status == 2 and f"with train.start_from = '{new}'" in said
    assert "without optimizer state" in said
    asked = (f"train.start_from = '{new}'", "train.start_from_optimizer = True")
    given = [f"--gin_bindings={binding}" for binding in asked]
    other = f"--workdir={new}-with-optimizer"
    status, said = moe("train", f"--gin_file={new}/config.gin", other, *given)
    assert status == 2 and "leave out train.start_from_optimizer" in said
    assert before == sorted(p.name for p in new.rglob("*"))


@pytest.mark.thorough
def test_a_pruned_run_writes_and_learns_on(pruned, tmp_path):
    new = pruned[0]
    assert moe("generate", f"--workdir={new}", "--tokens=2")[0] == 0
    again = [f"--gin_bindings=train.start_from = '{new}'", "--gin_bindings=train.steps = 2"]
    again += ["--gin_bindings=train.artifacts = False", f"--workdir={tmp_path / 'on'}"]
    status, said = moe("train", f"--gin_file={new}/config.gin", *again)
    assert status == 0 and f"starting from step 12 of {new}" in said


def test_a_kill_leaves_no_half_run(made, tmp_path, monkeypatch):
    """Killed just before the last act; then the same command, which clears up."""
    new = tmp_path / "new"
    command = ("prune", f"--workdir={made[1]}", "--experts=2", f"--to={new}")
    command = (*command, "--by=load", "--calibration_bytes=4000")
    rename = os.rename

    def killed(old, to):
        if Path(to) == new:
            raise KeyboardInterrupt
        return rename(old, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        assert moe(*command)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == [".new.unfinished"]
    (tmp_path / ".new.unfinished" / "routing.jsonl").write_text("left behind")
    assert moe(*command)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert not (new / "routing.jsonl").exists()
    status, said = moe(*command)
    assert (
        status == 2
        and said == f"moe: error: --to={new} exists already; name a folder that doesn't\n"
    )


@pytest.mark.thorough
def test_a_curve_writes_no_run(made, tmp_path):
    path = tmp_path / "curve.json"
    words = ("prune", f"--workdir={made[1]}", "--experts=2", f"--curve={path}")
    assert moe(*words)[0] == 0
    found = json.loads(path.read_text())
    whole = json.loads((made[1] / "summary.json").read_text())["val_bits_per_byte"]
    assert found["whole"]["bits_per_byte"] == pytest.approx(whole, abs=1e-6)
    rows = {(row["method"], row["by"]): row["bits_per_byte"] for row in found["rows"]}
    assert set(rows) == {("prune", "saliency"), ("merge", "saliency"), ("prune", "random")}
    assert all(abs(value - whole) > 1e-4 for value in rows.values())
    assert rows["prune", "saliency"] != rows["merge", "saliency"]
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.json", "curve.png"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--experts=1 --to=new", "--experts=1: TopK.k=2 experts per token, but there are 1"),
        ("--experts=5 --to=new", "--experts=5: each layer has 4 experts; choose 1 to 4"),
        ("--experts=0 --to=new", "--experts=0: a layer needs at least 1 expert"),
        ("--experts=x --to=new", "--experts=x: whole numbers are expected, such as 4 or 6,4,2"),
        ("--experts=3,2 --to=new", "--experts=3,2: a new run has one number; or use --curve"),
        ("--experts=2", "moe prune needs --to=FOLDER, for a new run, or --curve=PATH.json"),
        (
            "--experts=2 --to=new --method=mrge",
            "--method=mrge: no such choice; did you mean 'merge'",
        ),
        (
            "--experts=2 --to=new --by=luck",
            "--by=luck: no such choice: one of saliency, load, random",
        ),
        ("--experts=2 --curve=nowhere/c.json", "--curve=nowhere/c.json: expected NAME.json in a"),
    ],
)
def test_a_mistake_is_one_line(words, said, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, told = moe("prune", f"--workdir={made[1]}", *words.split())
    assert status == 2 and told.startswith(f"moe: error: {said}") and told.count("\n") == 1
    assert not list(tmp_path.iterdir())
