"""The word for a run's routing, the numbers beside it, and the line that a person reads."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ROOT, Runs, lines

from moe.model.flops import Costs
from moe.runs.tracking.progress import Pace, line
from moe.training.metrics import (
    MOST_SCALARS,
    Routing,
    bits_per_byte,
    bounded,
    health,
    routing_scalars,
    speed_scalars,
)
from routing import RouterOutput, RouterStats

EVEN = [[80, 80, 80, 80]]


def routing(count, kept=None, tokens=160):
    """Two choices for each of 160 tokens, one layer for each row."""
    count_LE = jnp.asarray(count, jnp.int32)
    layers = len(count)
    stats = RouterStats(
        count_E=count_LE,
        kept_E=count_LE if kept is None else jnp.asarray(kept, jnp.int32),
        score_sum_E=jnp.full(count_LE.shape, tokens / count_LE.shape[1]),
        entropy_sum=jnp.full(layers, 1.5 * tokens),
        logit_square_sum=jnp.full(layers, 4.0 * tokens),
        token_count=jnp.full(layers, tokens, jnp.int32),
    )
    losses = {"balance": jnp.arange(1.0, layers + 1), "z": jnp.full(layers, 3.0)}
    return Routing.of(RouterOutput(None, losses, jnp.zeros(layers), stats))


WORDS = {
    "balanced": routing(EVEN),
    "skewed": routing([[200, 40, 40, 40]]),  # 200 / 80 = 2.5 times the mean
    "dropping": routing(EVEN, kept=[[80, 80, 80, 40]]),  # 40 of 320 dropped
    "dead": routing([[160, 160, 0, 0]], kept=[[80, 80, 0, 0]]),
    "idle": routing([[0, 0, 0, 0], [80, 80, 80, 80]]),
    "dense": None,
}


@pytest.mark.parametrize("word", WORDS)
def test_the_word_is_the_worst_that_can_be_said(word):
    assert health(WORDS[word]) == word


def test_every_word_is_defined_where_users_look():
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for word in {*WORDS, "neurons", "soft", "merged"}:
        assert f"`{word}`" in documented


def test_one_bad_layer_among_good_ones_is_told():
    assert health(routing([*EVEN, *EVEN, [200, 40, 40, 40]])) == "skewed"
    assert health(routing([*EVEN, [310, 10, 0, 0]])) == "dead"
    assert health(routing(EVEN * 2, kept=[*EVEN, [80, 80, 80, 40]])) == "dropping"
    # on the border: twice the mean, a tenth dropped, are still fine
    assert health(routing([[160, 80, 40, 40]])) == "balanced"
    assert health(routing([[100] * 4], kept=[[90] * 4])) == "balanced"


def test_chance_is_not_taken_for_a_dead_or_a_crowded_expert():
    """Poisson counts with a mean of 2: a seventh of them is zero, the largest is four means."""
    count_E = np.random.default_rng(0).poisson(2.0, 1024)
    assert (count_E == 0).sum() > 100 and count_E.max() > 4 * count_E.mean()
    chance = routing([count_E.tolist()])
    assert chance.dead == 0
    assert health(routing([[3, 1, 0, 0]], tokens=2)) == "balanced"


@pytest.mark.parametrize("kind", ["neurons", "soft", "merged"])
def test_what_has_no_loads_to_judge_is_told_by_its_kind(kind):
    assert health(WORDS["dead"], kind) == kind


def test_a_layer_without_choices_drops_nothing():
    found = routing([[0, 0, 0, 0], [200, 40, 40, 40]])
    np.testing.assert_array_equal(found.dropped_L, [0, 0])
    np.testing.assert_allclose(found.load_L, [0, 2.5])
    told = routing_scalars(found, {"balance": 0.0, "z": 0.0})
    assert told["load/max_over_mean"] == told["load/max_over_mean_worst"] == 2.5
    nothing = routing_scalars(routing([[0] * 4]), {"balance": 0.0, "z": 0.0})
    assert "load/max_over_mean" not in nothing and "load/dropped" not in nothing


@pytest.mark.parametrize("kind", ["neurons", "soft", "merged"])
def test_only_experts_that_are_chosen_can_be_dead(kind):
    coefficients = {"balance": 0.0, "z": 0.0}
    assert routing_scalars(WORDS["dead"], coefficients)["load/dead_experts"] == 2
    assert "load/dead_experts" not in routing_scalars(WORDS["dead"], coefficients, kind)


def test_losses_are_told_scaled_and_unscaled():
    found = routing_scalars(routing(EVEN * 2), {"balance": 0.01, "z": 0.001})
    assert found["router_loss/balance"] == 1.5  # the mean of 1 and 2
    assert found["router_loss/balance_worst"] == 2
    assert found["router_loss_scaled/balance"] == pytest.approx(0.03)  # what is added to the loss
    assert found["router_loss_scaled/z"] == pytest.approx(0.006)
    assert found["load/max_over_mean"] == 1 and found["load/dropped"] == 0
    assert found["router/entropy"] == 1.5 and found["router/logit_size"] == 2.0


def test_shares_are_of_what_the_router_chose():
    found = routing([[20, 4, 4, 4], [8] * 4], kept=[[10, 4, 4, 4], [8] * 4], tokens=16)
    np.testing.assert_allclose(found.load_L, [2.5, 1])
    np.testing.assert_allclose(found.dropped_L, [10 / 32, 0])
    assert found.kept_per_token() == (22 + 32) / 32
    assert found.dead == 0
    scalars = routing_scalars(found, {"balance": 1, "z": 1})
    assert scalars["load/dropped_worst"] == pytest.approx(10 / 32)
    assert scalars["load/dropped"] == pytest.approx(5 / 32)


def test_many_losses_leave_forty_numbers_and_the_means_stay_longest():
    names = [f"loss_{i}" for i in range(12)]
    kinds = ("router_loss/{}", "router_loss/{}_worst", "router_loss_scaled/{}")
    losses = {kind.format(name): 1.0 for name in names for kind in kinds}
    scalars = {f"other_{i}": 0.0 for i in range(20)} | losses
    found = bounded(scalars)
    assert len(found) == MOST_SCALARS == 40
    assert all(f"other_{i}" in found for i in range(20))
    assert all(f"router_loss/{name}" in found for name in names)
    worst = [name for name in found if name.endswith("_worst")]
    assert worst == [f"router_loss/loss_{i}_worst" for i in range(8)]
    assert bounded(dict(list(scalars.items())[:40])) == dict(list(scalars.items())[:40])


def test_bits_per_byte():
    # A uniform guess over 256 bytes costs 8 bits; over tokens of 4 bytes, 2.
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)
    assert bits_per_byte(10 * math.log(256), 40) == pytest.approx(2)


def test_utilisation_counts_chosen_and_effective_utilisation_kept_work():
    costs = Costs(100, 60, 600, 100, sparse_layers=2, experts_per_token=2.0, rows_per_token=2.0)
    found = speed_scalars(1000, 0.5, costs, kept_per_token=1.0, peak=1e7)
    assert found["speed/tokens_per_second"] == 2000
    assert found["speed/utilisation"] == pytest.approx(2000 * (600 + 2 * 2 * 100) / 1e7)
    assert found["speed/effective_utilisation"] == pytest.approx(2000 * (600 + 2 * 100) / 1e7)
    dense = speed_scalars(1000, 0.5, costs, kept_per_token=None, peak=1e7)
    assert dense["speed/utilisation"] == dense["speed/effective_utilisation"]


def test_a_step_ten_times_slower_is_told():
    pace = Pace()
    assert [pace.slow(0.1) for _ in range(10)] == [None] * 10
    assert pace.slow(0.9) is None
    assert pace.slow(1.5) == "took 1.50 s, 15 times the usual 0.10 s"
    assert pace.slow(0.1) is None
    early = Pace()
    assert [early.slow(s) for s in (9.0, 0.1, 0.1, 5.0)] == [None] * 4


def test_the_line_holds_what_is_worth_knowing():
    scalars = {
        "loss": 3.2051,
        "bits_per_byte": 1.9349,
        "speed/tokens_per_second": 12345.4,
        "load/max_over_mean_worst": 1.214,
        "load/dropped": 0.001,
        "load/dropped_worst": 0.003,
    }
    expected = "loss 3.205 bpb 1.935 12,345 tok/s load 1.21 drop 0.3% balanced"
    assert line(scalars, "balanced") == expected
    assert line(scalars, "soft", loads=False) == "loss 3.205 bpb 1.935 12,345 tok/s soft"
    silent = {name: value for name, value in scalars.items() if name != "bits_per_byte"}
    assert "bpb" not in line(silent, "balanced")  # a step that scored no text
    dense = {name: value for name, value in scalars.items() if not name.startswith("load")}
    assert line(dense, "dense") == "loss 3.205 bpb 1.935 12,345 tok/s dense"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("metrics"))


REAL = {
    "dropping": ("MoELayer.capacity = @Capacity()", "Capacity.factor = 0.3"),
    "balanced": ("MoELayer.router = @Balanced",),
}


@pytest.mark.thorough
@pytest.mark.parametrize("word", REAL)
def test_the_word_of_a_real_run(word, runs, capsys):
    config = runs.folder / f"{word}.gin"
    config.write_text("\n".join(["include 'tiny.gin'", *REAL[word]]) + "\n")
    run = runs.done(f"run {word}", "train.steps = 2", config=config)
    out = capsys.readouterr().out
    assert f"% {word}" in out
    last = lines(run / "metrics.jsonl")[-1]
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for name in set(last) - {"step"}:
        general = re.sub("^(router_loss|router_loss_scaled)/[a-z]+", r"\1/NAME", name)
        assert f"`{general}`" in documented, name
    if word == "dropping":
        # ceil(0.3 * 2 * 32 / 4) = 5 slots for each expert: at most 20 of 64 choices find one
        assert last["load/dropped"] >= 1 - 20 / 64
        assert last["speed/effective_utilisation"] < last["speed/utilisation"]
    else:
        assert last["load/dropped"] == 0 and last["load/max_over_mean_worst"] == 1
