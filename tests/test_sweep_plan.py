"""Plans of sweeps: mistakes, matching, equal tuning, and which trials follow from which results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BASE

from moe.cli import config
from moe.errors import UserError
from moe.model.flops import Costs
from moe.model.sharding import MeshShape
from moe.planning.plan import batch_of
from moe.settings import read
from moe.sweeps import plan as plans
from moe.sweeps import tune
from moe.sweeps.cell import build, matched, parameters_read, read_config
from moe.sweeps.plan import Cell, Plan
from moe.sweeps.spec import SweepSpec
from moe.training.abstract_model import Vocabulary

ARMS = {"a": (), "b": ("TopK.k = 1",)}
GOOD = {"question": "?", "base": ("run.gin",), "arms": ARMS, "baseline": "a"}
RATE = {"AdamW.learning_rate": (1e-3, 1e-1, "log")}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"baseline": "aa"}, "sweep.baseline: no arm 'aa'; did you mean 'a'?"),
        ({"outside": ("c",)}, "sweep.outside: no arm 'c'"),
        (
            {"outside": {"a": {"x.z": 1}}, "axes": {"x.y": (1,)}},
            "no axis 'x.z'; did you mean 'x.y'?",
        ),
        ({"outside": {"a": ("x.y",)}, "axes": {"x.y": (1,)}}, "expected its place by axis"),
        ({"arms": {}}, "sweep.arms is empty"),
        ({"arms": ARMS | {"c": "x.gin"}}, "'c': write a list of changes, as ['x.gin']"),
        ({"base": "run.gin"}, "sweep.base='run.gin': write a list"),
        ({"axes": {"TopK.k": ()}}, "'TopK.k': expected some values"),
        ({"axes": {"size": (1, 2)}}, "'size' is no setting; give each value its changes"),
        ({"tune": RATE}, "sweep.trials=0 runs to search them"),
        ({"trials": 3}, "sweep.tune names no range"),
        ({"tune": {"x.y": (1, 2)}, "trials": 1}, "expected (low, high, 'log' or 'linear')"),
        ({"tune": {"x.y": (2, 1, "log")}, "trials": 1}, "expected 0 < low < high"),
        ({"tune": {"x.y": ("a", 3e-2, "log")}, "trials": 1}, "expected two numbers, got 'a', 0.03"),
        ({"tune": {"x.y": (0, float("inf"), "linear")}, "trials": 1}, "two numbers, got 0, inf"),
        ({"tune": {"x.y": (False, True, "linear")}, "trials": 1}, "two numbers, got False"),
        ({"axes": {"x.y": (dict, list)}}, "take named changes, as {'switch': ('x.y = @Switch',)"),
        ({"controls": ("sham",)}, "'sham': expected 'same' or 'shuffled'"),
        ({"match": "wall_time"}, "needs sweep.seconds"),
        ({"flops": 1e9, "tokens_per_parameter": 2.0}, "both set train.steps"),
    ],
)
def test_mistakes_are_told(changed, said):
    with pytest.raises(UserError, match=r"sweep\.") as caught:
        SweepSpec(**GOOD | changed)
    assert said in str(caught.value)


def test_arms_times_axes_and_arms_outside():
    spec = SweepSpec(
        **GOOD | {"axes": {"E": {"x": ("e = 1",), "y": ("e = 2",)}}, "outside": ("b",)}
    )
    found = [(arm, axes, changes) for arm, axes, changes in spec.places()]
    assert found == [
        ("a", {"E": "x"}, ["run.gin", "e = 1"]),
        ("a", {"E": "y"}, ["run.gin", "e = 2"]),
        ("b", {}, ["run.gin", "TopK.k = 1"]),
    ]


def test_an_arm_outside_of_one_axis_is_the_baseline_along_the_others():
    axes = {"size": {"s": (), "m": ()}, "x.E": (4, 8)}
    spec = SweepSpec(**GOOD | {"axes": axes, "outside": {"a": {"x.E": 1}}})
    cells = {plans.cell_name(arm, at): (arm, at, changes) for arm, at, changes in spec.places()}
    assert list(cells)[:3] == ["a, size=s, E=1", "a, size=m, E=1", "b, size=s, E=4"]
    assert len(cells) == 6 and cells["a, size=m, E=1"][1:] == ({"size": "m", "x.E": 1}, ["run.gin"])
    assert plans.baseline_of("b, size=m, E=8", cells, spec) == "a, size=m, E=1"
    assert plans.baseline_of("a, size=m, E=1", cells, spec) == "a, size=m, E=1"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "base.gin"
    path.write_text(BASE + "TextFiles.paths = 'none'\n")
    return str(path)


def test_later_changes_win_also_over_settings_by_files_after_them(base, tmp_path):
    (tmp_path / "more.gin").write_text("TopK.k = 3\nwidth = 8\nMoELayer.d_ff = %width\n")
    changes = [base, "TopK.k = 1", str(tmp_path / "more.gin"), "train.steps = 7"]
    built = build(read_config(changes))
    assert built.model.moe_layer.router.k == 3 and built.spec.steps == 7
    assert built.model.moe_layer.experts.hidden_width == 8
    with pytest.raises(UserError, match=r"nowhere\.gin: no such file"):
        read_config([base, "nowhere.gin"])


def test_one_setting_is_solved_for_and_the_rest_is_told(base):
    two = build(read_config([base]))
    one = read_config([base, "TopK.k = 1"])
    target = two.amount("active_flops")
    first = build(one)
    config_, built, solved, off = matched(
        one, first, "active_flops", target, ("FeedForward.d_ff", "MoELayer.d_ff"), 0.01
    )
    assert solved == {"MoELayer.d_ff": 32} and config_.settings["MoELayer.d_ff"] == "32"
    assert built.model.costs.flops_per_token == pytest.approx(target, rel=0.01) and abs(off) < 0.01
    assert matched(one, first, "data", two.amount("data"), (), 0.01)[2] == {}
    steps = matched(
        one, first, "training_flops", two.amount("training_flops"), ("train.steps",), 0.1
    )
    assert steps[2]["train.steps"] > 12
    with pytest.raises(UserError, match=r"can't be matched within 1.0%: nearest is .* may change"):
        matched(one, first, "active_flops", 2.001 * target, ("train.log_every",), 0.01)
    memory = two.amount("memory")
    assert memory >= 3 * 4 * two.model.costs.parameters_total  # weights and two moments


def made(base: str, *more: str, **changed) -> Plan:
    arms = {"two": (), "one": ("TopK.k = 1",)}
    fields = {"base": (base, *more), "arms": arms, "baseline": "two", "tolerance": 0.02} | changed
    return plans.make(SweepSpec(question="?", **fields), "s", lambda line: None)


def test_a_budget_counts_for_the_size_that_was_solved_for(base):
    """Half as many choices cost half; experts are widened then, and the steps are as many."""
    two, one = made(base, flops=1e10).cells
    assert one.facts["solved"] == {"MoELayer.d_ff": 32}
    assert one.facts["steps"] == pytest.approx(two.facts["steps"], rel=0.03)
    assert one.facts["training_flops"] == pytest.approx(1e10, rel=0.01)


@pytest.mark.parametrize(
    ("more", "changed", "said"),
    [
        (("train.max_seconds = 9",), {}, "would end by the clock, at unequal tokens"),
        (("train.fit_steps = True",), {}, "would end by the clock, at unequal tokens"),
        (
            (),
            {"tune": {"Zipf.exponent": (0.5, 1, "linear")}, "trials": 2},
            "no arm reads Zipf.exponent",
        ),
        (("train.data = None",), {"controls": ("shuffled",)}, "needs train.data = @TextData()"),
    ],
)
def test_sweeps_that_would_mislead_are_refused(base, more, changed, said):
    with pytest.raises(UserError, match=r".") as caught:
        made(base, *more, **changed)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"axes": {"train.seed": (5, 6)}}, "sweep.axes: 'train.seed' is set by the sweep (sweep.s"),
        (
            {"axes": {"train.steps": (5, 6)}, "tokens_per_parameter": 1.0},
            "'train.steps' is set by the sweep (sweep.tokens_per_parameter)",
        ),
        (
            {"axes": {"x": {"y": ("train.steps = 5",)}}, "flops": 1e9},
            "sweep.axes: 'x': 'y': 'train.steps' is set by the sweep (sweep.flops)",
        ),
        (
            {"arms": {"two": ("AdamW.learning_rate = 1.0",)}, "tune": RATE, "trials": 1},
            "sweep.arms: 'two': 'AdamW.learning_rate' is set by the sweep (sweep.tune)",
        ),
        (
            {"axes": {"train.max_seconds": (5, 6)}, "match": "wall_time", "seconds": 1.0},
            "'train.max_seconds' is set by the sweep (sweep.seconds)",
        ),
        (
            {"arms": {"two": ("TopK.k = 1",)}, "axes": {"TopK.k": (1, 2)}},
            "sweep.arms: 'two': 'TopK.k' is set by the axis 'TopK.k'",
        ),
        ({"arms": {"two": (), "": ()}}, "'' can't name a folder"),
        ({"arms": {"two": (), "..": ()}}, "'..' can't name a folder"),
        ({"arms": {"two": (), "n" * 201: ()}}, "can't name a folder; name the arm with 1 to 200"),
    ],
)
def test_what_the_sweep_sets_itself_and_names_of_no_folder_are_refused(base, changed, said):
    with pytest.raises(UserError, match=r".") as caught:
        made(base, **changed)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_settings_that_no_cell_of_an_arm_or_axis_reads_are_refused_together(base):
    arms = {"two": (), "one": ("Switch.jitter = 0.3",), "bad": ("TopK.k = -1",)}
    axes = {"Cosine.warmup": (0.1,), "x": {"y": ("Muon.momentum = 0.5",)}}
    with pytest.raises(UserError, match=r".") as caught:
        made(base, "train.optimizer = @AdamW()", arms=arms, axes=axes, match=None)
    said = str(caught.value).splitlines()
    assert "one: nothing that this arm builds reads Switch.jitter" in said
    assert "sweep.axes: 'x': 'y': nothing that any arm builds reads Muon.momentum" in said
    assert any(line.startswith("bad, ") for line in said) and "warmup" not in "".join(said[1:])
    with pytest.raises(UserError, match=r"^sweep.axes: nothing .* reads Switch.jitter$"):
        made(base, axes={"Switch.jitter": (0.1,)}, match=None, arms={"two": ()})
    # An arm may read it at one place of the axes alone.
    axes = {"r": {"k": (), "s": ("MoELayer.router = @Switch",)}}
    plan = made(base, arms={"two": ("Switch.jitter = 0.3",)}, axes=axes, match=None)
    assert len(plan.cells) == 2


def test_the_settings_of_a_usual_schedule_can_be_tuned(base):
    plan = made(base, tune={"Cosine.warmup": (0.01, 0.1, "log")}, trials=2)
    assert all(cell.tuned == ("Cosine.warmup",) for cell in plan.cells)


def plan_of(**changed) -> Plan:
    """A plan of three cells without models."""
    facts = {"amount": 1.0, "training_flops": 1.0, "state_bytes": 1}
    cells = [
        Cell(n, n, {}, "a", {"x.y": "1"}, (), (), tuple(RATE) if n != "c" else (), facts)
        for n in "abc"
    ]
    own = {
        "name": "s",
        "question": "?",
        "baseline": "a",
        "delta": 0.01,
        "match": "active_flops",
        "tolerance": 0.01,
        "ranges": RATE,
        "trials": 4,
        "widen": 0,
        "seeds": 2,
        "controls": ("same",),
        "seed": 0,
        "cells": tuple(cells),
    }
    return Plan(**own | changed)


def results_of(trials, score):
    return {
        t.name: {
            "trial": t.name,
            "cell": t.cell.name,
            "phase": t.phase,
            "number": t.number,
            "seed": t.seed,
            "tuned": t.tuned,
            "given": t.text(),
            "status": "diverged" if score(t) is None else "finished",
            "validation_bits_per_byte": score(t),
        }
        for t in trials
    }


def near(best):
    """A score that is lowest at a learning rate, and none where it is above 0.05."""

    def score(trial):
        rate = trial.tuned.get("AdamW.learning_rate", best)
        return None if rate > 0.05 else abs(rate / best - 1)

    return score


def test_every_arm_is_tuned_alike_and_reported_with_fresh_seeds_at_its_best():
    plan = plan_of()
    tuning = plan.trials_now({})
    assert [t.phase for t in tuning] == ["tuning"] * 12 and {t.seed for t in tuning} == {0}
    of_a, of_b, of_c = ([t.tuned for t in tuning if t.cell.name == n] for n in "abc")
    assert of_a == of_b and len({t["AdamW.learning_rate"] for t in of_a}) == 4
    assert of_c == [{}] * 4  # as many trials, though it reads nothing that is tuned
    results = results_of(tuning[:-1], near(0.01))
    assert plan.trials_now(results) == tuning, "a trial of tuning is left"
    results = results_of(tuning, near(0.01))
    reported = plan.trials_now(results)[12:]
    assert [(t.cell.name, t.phase, t.seed) for t in reported] == [
        *(("a", "report", 1), ("b", "report", 1), ("c", "report", 1)),
        *(("a", "report", 2), ("b", "report", 2), ("c", "report", 2)),
        *(("a", "same", 10_001), ("a", "same", 10_002)),
    ]
    best = min(of_a, key=lambda v: abs(v["AdamW.learning_rate"] / 0.01 - 1))
    assert all(t.tuned == best for t in reported if t.cell.name != "c")
    assert len(tuning + reported) == plan.number_of_trials()
    assert Plan.of_json(plan.as_json()) == plan


def test_a_cell_whose_tuning_failed_throughout_is_not_reported():
    plan = plan_of()
    tuning = plan.trials_now({})
    results = results_of(tuning, lambda t: None if t.cell.name == "b" else 1.0)
    assert {t.cell.name for t in plan.trials_now(results)[12:]} == {"a", "c"}
    assert plan.untuned(results) == ["b"] and plan.untuned({}) == []
    assert plan.number_of_trials(results) == len(plan.trials_now(results)) == 18
    assert plan.number_of_trials(results_of(tuning, lambda t: None)) == 12


def test_ranges_are_widened_for_all_arms_where_one_is_best_at_an_edge():
    plan = plan_of(widen=2)
    first = plan.trials_now({})
    results = results_of(first, near(1e-4))  # below all that was tried
    second = plan.trials_now(results)[12:]
    rates = [t.tuned["AdamW.learning_rate"] for t in second if t.cell.name == "a"]
    assert len(rates) == 4 and all(1e-4 <= rate < 1e-3 for rate in rates)
    assert rates == [t.tuned["AdamW.learning_rate"] for t in second if t.cell.name == "b"]
    assert len({t.name for t in (*first, *second)}) == 24
    inside = sorted(t.tuned["AdamW.learning_rate"] for t in first if t.cell.name == "a")[1]
    results = results_of(first, near(inside))
    assert {t.phase for t in plan.trials_now(results)[12:]} == {"report", "same"}


def ended(plan: Plan, results, score):
    """Results once everything that the plan calls for has run."""
    results = dict(results)
    while left := [t for t in plan.trials_now(results) if t.name not in results]:
        results |= results_of(left[:1], score)
    return results


def test_arms_and_trials_are_added_to_a_search_that_was_widened():
    """What has run keeps its values; every cell gets the pieces of the ranges that it lacks."""

    def score(trial):  # each is the better, the lower or the higher the rate
        return (1 if trial.cell.name == "a" else -1) * trial.tuned["AdamW.learning_rate"]

    one = plan_of(widen=2, controls=())
    one = dataclasses.replace(one, cells=one.cells[:1])
    alone = ended(one, {}, score)
    assert "a/tuning-low2-AdamW.learning_rate-4" in alone and len(alone) == 3 * 4 + 2
    for more in (
        dataclasses.replace(one, cells=plan_of().cells[:2]),
        dataclasses.replace(one, trials=5),
        dataclasses.replace(one, widen=1),
    ):
        assert plans.differences(more, alone) == []
        tuned = {n: row for n, row in alone.items() if row["phase"] == "tuning"}
        both = ended(more, tuned, score)
        assert {n: both[n] for n in tuned} == tuned and plans.differences(more, both) == []
        by_cell = [
            {n.split("/")[1]: r["tuned"] for n, r in both.items() if r["cell"] == cell.name}
            for cell in more.cells
        ]
        tuning = [{n: v for n, v in c.items() if n.startswith("tuning")} for c in by_cell]
        assert all(of_cell == tuning[0] for of_cell in tuning), "all are tuned alike"
        for row in both.values():
            if row["phase"] == "report":
                rows = [r for r in both.values() if r["cell"] == row["cell"]]
                best = min(
                    (r for r in rows if r["phase"] == "tuning"),
                    key=lambda r: r["validation_bits_per_byte"],
                )
                assert row["tuned"] == best["tuned"]
    fewer = dataclasses.replace(one, trials=3)
    assert "a/tuning-4: tuned a cell with more than sweep.trials=3" in plans.differences(
        fewer, alone
    )


def test_a_linear_range_is_widened_down_to_zero():
    name = "AdamW.learning_rate"
    plan = plan_of(widen=2, ranges={name: (1e-4, 1.0, "linear")}, controls=())
    results = ended(plan, {}, lambda trial: trial.tuned.get(name, 1.0))
    added = [r["tuned"][name] for n, r in results.items() if n.startswith("a/tuning-low1")]
    assert len(added) == 4 and all(0 <= value <= 1e-4 for value in added)
    assert not any("tuning-low2" in n for n in results), "nothing is left below zero"


def test_reported_runs_are_not_left_at_values_that_tuning_has_bettered():
    few, more = plan_of(trials=2, controls=()), plan_of(trials=4, controls=())
    tuning = more.trials_now({})
    known = results_of(tuning, near(tuning[-3].tuned["AdamW.learning_rate"]))
    first = [t.name for t in few.trials_now({})]
    results = {name: known[name] for name in first}
    reported = few.trials_now(results)[6:]
    results |= results_of(reported, lambda t: 1.0)
    assert len(few.trials_now(results)) == 12
    assert more.trials_now(results) == tuning, "further tuning comes first"
    results |= known
    with pytest.raises(UserError, match=r"better values since a/report-1, .* \(4 in all\): delete"):
        more.trials_now(results)


def test_a_finished_trial_is_not_changed_by_an_edit():
    plan = plan_of()
    results = results_of(plan.trials_now({}), near(0.01))
    assert plans.differences(plan, results) == []
    other = dataclasses.replace(plan.cells[0], settings={"x.y": "2"})
    edited = dataclasses.replace(plan, cells=(other, *plan.cells[1:]))
    said = plans.differences(edited, results)
    assert len(said) == 4 and said[0] == "a/tuning-1: x.y = 1 there, x.y = 2 here"
    fewer = dataclasses.replace(plan, cells=plan.cells[:2])
    assert "c/tuning-1: the sweep has no 'c' any more" in plans.differences(fewer, results)
    more = dataclasses.replace(plan, cells=(*plan.cells, dataclasses.replace(other, name="d")))
    assert plans.differences(more, results) == [], "an arm may be added"


def test_tokens_that_are_decoded_at_once_share_what_they_read():
    dense = Costs(100, 100, 1, 1, 0, 1.0, 1.0)
    assert parameters_read(dense, 4) == 25
    # 8 experts of 10 parameters, 2 of them chosen, beside 20: two tokens wake 8 (1 - 0.75^2) = 3.5.
    mixture = Costs(100, 40, 1, 1, 1, 2.0, 2.0, num_experts=8)
    assert parameters_read(mixture, 1) == 40
    assert parameters_read(mixture, 2) == pytest.approx((20 + 35) / 2)
    assert parameters_read(mixture, 10**4) == pytest.approx(100 / 10**4)


def test_points_are_spread_and_more_of_them_begin_with_the_same():
    ranges = {"a": tune.Range(1e-4, 1e-2, "log"), "b": tune.Range(0.0, 1.0, "linear")}
    points = tune.points(ranges, 64, seed=1)
    assert points[:8] == tune.points(ranges, 8, seed=1)
    assert 24 <= sum(p["a"] < 1e-3 for p in points) <= 40
    assert 24 <= sum(p["b"] < 0.5 for p in points) <= 40
    assert ranges["b"].beyond("high", 2) == tune.Range(1.5, 2.0, "linear")
    assert ranges["b"].beyond("low", 1) is None, "still not negative"
    assert tune.Range(-1.0, 1.0, "linear").beyond("low", 2) == tune.Range(-3.0, -2.0, "linear")
    low, high = (ranges["a"].beyond(side, 2) for side in ("low", "high"))
    assert (low.low, low.high) == pytest.approx((1e-6, 1e-5))
    assert (high.low, high.high) == pytest.approx((1e-1, 1.0))
    assert tune.edges({"a": 1.0}, [{"a": 1.0}, {"a": 2.0}]) == {"a": "low"}
    assert tune.edges({"a": 2.0}, [{"a": 1.0}, {"a": 2.0}, {"a": 3.0}]) == {}


def test_the_compiled_step_is_the_same_for_every_seed_rate_and_loss_weight(base):
    others = ("train.seed = 3", "AdamW.learning_rate = 0.02")
    weights = ("BalanceLoss.coefficient = 0.5", "ZLoss.coefficient = 0.25")
    texts = []
    for bindings in ((), (*others, *weights)):
        spec = config.load([base], ["train.optimizer = @AdamW()", *bindings])
        _, program = spec.build(Vocabulary(257), MeshShape(data=1).build(jax.devices()[:1]))
        batch = batch_of(program, *spec.shape)
        texts.append(program.gradients.lower(program.abstract_state, batch).as_text())
        texts.append(program.step.lower(program.abstract_state, batch).as_text())
    assert texts[:2] == texts[2:]
    values = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), batch)
    _, metrics = program.gradients(program.init(0), values)
    losses = metrics.routers.losses
    expected = 0.5 * losses["balance"] + 0.25 * losses["z"]
    np.testing.assert_allclose(metrics.routers.auxiliary_loss, expected, rtol=1e-6)


SHIPPED = [name for name in read.shipped_names() if name.startswith("sweeps/")]
QUICK = "sweeps/routing_frequency.gin"


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == QUICK else pytest.mark.thorough) for n in SHIPPED],
)
def test_a_shipped_sweep_can_be_planned(name):
    config.bind([name])
    spec = SweepSpec()
    plan = plans.make(spec, name, say=lambda line: None)
    assert len(plan.cells) == len(spec.places()) and spec.question.endswith("?")
    assert all(abs(cell.facts["residual"]) <= spec.tolerance for cell in plan.cells)
    assert not any(cell.facts["leaks"] for cell in plan.cells)
    assert all(cell.tuned == tuple(spec.tune) for cell in plan.cells)
