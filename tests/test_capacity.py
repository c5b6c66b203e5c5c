"""Capacity: its one definition in integers, who goes without, and what is reported."""

import dataclasses
from fractions import Fraction
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing import Capacity, RouterInputs, TokenChoice, choices_GE, slots_per_expert
from routing.capacity import slots_for_valid

E = 4


def inputs_of(valid_GT, train=True, key=0):
    groups, tokens = valid_GT.shape
    ids = jnp.zeros((groups, tokens), jnp.int32)
    return RouterInputs(
        x_GTD=jnp.zeros((groups, tokens, 2)),
        valid_GT=jnp.asarray(valid_GT),
        token_id_GT=ids,
        position_GT=ids,
        index_G=jnp.arange(groups, dtype=jnp.int32),
        key=jax.random.key(key),
        train=train,
    )


def decision_of(expert_GTK, gate_GTK=None, valid_GT=None):
    expert_GTK = jnp.asarray(expert_GTK, jnp.int32)
    gate_GTK = jnp.ones(expert_GTK.shape) if gate_GTK is None else jnp.asarray(gate_GTK)
    keep_GTK = jnp.ones(expert_GTK.shape, bool)
    if valid_GT is not None:
        keep_GTK &= jnp.asarray(valid_GT)[..., None]
    return TokenChoice(expert_GTK, gate_GTK, keep_GTK, E)


@functools.cache
def fit(policy):
    return jax.jit(policy.fit)


def one_group(policy, experts_TK, gates_TK=None, train=True, key=0):
    """What is kept of one group, as a list of (token, choice)."""
    gate_GTK = None if gates_TK is None else np.asarray(gates_TK, np.float32)[None]
    decision = decision_of([experts_TK], gate_GTK)
    valid_GT = np.ones((1, len(experts_TK)), bool)
    fitted = fit(policy)(decision, inputs_of(valid_GT, train, key))
    return [tuple(map(int, place)) for place in np.argwhere(np.asarray(fitted.keep_GTK[0]))]


# The definition.


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "slots"),
    [
        (1000, 16, 2, 1.25, 157),  # 156.25; public code gives 78, 79, 126, 156 or 157
        (1000, 16, 2, 1.0, 125),
        (1024, 16, 2, 1.0, 128),  # exact: no rounding up
        (1, 64, 1, 1.0, 1),
        (31104, 8, 1, 1.0, 3888),  # float32 code has said 3889
        (10, 3, 1, 0.3, 1),  # 0.3 is not 3/10 in binary, and 10 * 0.3 / 3 not 1
        (10, 1, 1, 1.1, 11),  # 1.1 * 10 is 11.000000000000002 in floating point
        (30_000, 8, 8, 1.3333, 39_999),  # 13333 * 8 * 30000 does not fit 32 bits
        (0, 8, 2, 1.25, 0),
    ],
)
def test_slots_are_the_ceiling_in_exact_arithmetic(tokens, experts, k, factor, slots):
    size = {"k": k, "num_experts": experts, "factor": factor}
    assert slots_per_expert(tokens, **size) == slots
    assert slots_per_expert(tokens, **size, multiple=8) == math.ceil(slots / 8) * 8
    valid_GT = jnp.ones((1, max(tokens, 1)), bool) if tokens else jnp.zeros((1, 1), bool)
    assert slots_for_valid(valid_GT, **size).tolist() == [slots]


def test_slots_against_fractions():
    random = np.random.default_rng(0)
    for _ in range(300):
        tokens, experts, k = (int(n) for n in random.integers(1, 3000, 3))
        factor = Fraction(int(random.integers(1, 400)), 100)
        expected = math.ceil(factor * k * tokens / experts)
        size = {"k": k, "num_experts": experts, "factor": float(factor)}
        assert slots_per_expert(tokens, **size) == expected


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("factor", [0.01, 1.0, 4.0, 1000.0])
@pytest.mark.parametrize("multiple", [1, 8])
def test_the_buffer_is_never_longer_than_its_tokens(tokens, factor, multiple):
    policy = Capacity(factor, multiple=multiple)
    valid_GT = np.ones((1, tokens), bool)
    fitted = policy.fit(decision_of(np.zeros((1, tokens, 1))), inputs_of(valid_GT))
    assert 1 <= fitted.capacity <= math.ceil(tokens / multiple) * multiple
    if factor >= E:
        assert np.asarray(fitted.keep_GTK).all()


# Who is served first. Two slots each: factor * K * T / E = 2 for T = 4, K = 2 and factor 1.


CROWD = [[0, 1], [0, 1], [0, 1], [1, 0]]
GATES = [[0.5, 0.3], [0.6, 0.3], [0.9, 0.05], [0.7, 0.2]]


@pytest.mark.parametrize(
    ("priority", "order", "kept"),
    [
        # tokens 0 and 1 fill both experts
        ("position", "token-major", [(0, 0), (0, 1), (1, 0), (1, 1)]),
        # first choices 0, 1 to expert 0; 3's first choice to expert 1 before 0's second
        ("position", "choice-major", [(0, 0), (0, 1), (1, 0), (3, 0)]),
        # best gates: token 2 (0.9), then 3 (0.7)
        ("gate", "token-major", [(2, 0), (2, 1), (3, 0), (3, 1)]),
        # first choices in the order 2, 3, 1, 0; then second choices: 2's to expert 1
        ("gate", "choice-major", [(1, 0), (2, 0), (2, 1), (3, 0)]),
    ],
)
def test_priority_and_order(priority, order, kept):
    policy = Capacity(1.0, priority=priority, order=order)
    assert one_group(policy, CROWD, GATES) == kept


def test_equal_gates_go_by_position():
    policy = Capacity(1.0, priority="gate")
    assert one_group(policy, CROWD) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_random_priority_is_fair_and_repeats():
    """Over many keys every token is kept as often: no sender is favoured (pitfall 18)."""
    policy, everyone = Capacity(1.0, priority="random"), np.zeros((400, 8, 1))
    valid_GT = np.ones((400, 8), bool)
    keep_GT = np.asarray(fit(policy)(decision_of(everyone), inputs_of(valid_GT)).keep_GTK)[..., 0]
    assert (keep_GT.sum(1) == 2).all()  # 1.0 * 1 * 8 / 4
    # Binomial with p = 1/4 over 400 groups: four standard deviations are 0.087.
    assert np.abs(keep_GT.mean(0) - 0.25).max() < 0.087
    again = np.asarray(fit(policy)(decision_of(everyone), inputs_of(valid_GT)).keep_GTK)[..., 0]
    other = fit(policy)(decision_of(everyone), inputs_of(valid_GT, key=1)).keep_GTK
    np.testing.assert_array_equal(keep_GT, again)
    assert (keep_GT != np.asarray(other)[..., 0]).any()


def test_random_priority_is_position_at_evaluation():
    policy = Capacity(1.0, eval_factor=1.0, priority="random")
    crowd = [[0]] * 8
    assert one_group(policy, crowd, train=False) == [(0, 0), (1, 0)]
    assert one_group(policy, crowd, train=False, key=5) == [(0, 0), (1, 0)]


# What is reported, and what never changes.


@pytest.mark.parametrize("priority", ["position", "gate", "random"])
@pytest.mark.parametrize("order", ["token-major", "choice-major"])
def test_slots_are_distinct_and_as_many_as_fit(priority, order):
    random = np.random.default_rng(0)
    expert_GTK = np.stack([random.permuted(np.arange(E)[None].repeat(11, 0), axis=1)[:, :3]] * 6)
    valid_GT = np.arange(11)[None] < np.array([[11], [7], [3], [1], [0], [11]])
    policy = Capacity(0.5, priority=priority, order=order)
    decision = decision_of(expert_GTK, random.uniform(size=expert_GTK.shape), valid_GT)
    fitted = fit(policy)(decision, inputs_of(valid_GT))
    keep_GTK, slot_GTK = np.asarray(fitted.keep_GTK), np.asarray(fitted.slot_GTK)
    assert not keep_GTK[~valid_GT].any()
    for g in range(6):
        limit = math.ceil(0.5 * 3 * valid_GT[g].sum() / E)
        for e in range(E):
            wanted = (expert_GTK[g] == e) & valid_GT[g][:, None]
            kept = wanted & keep_GTK[g]
            assert kept.sum() == min(limit, wanted.sum())
            assert sorted(slot_GTK[g][kept]) == list(range(kept.sum()))
    count_GE = np.asarray(choices_GE(fitted))
    assert count_GE.sum() == keep_GTK.sum() and count_GE.dtype == np.int32


def test_evaluation_drops_nothing_unless_asked():
    crowd = [[0]] * 8
    assert len(one_group(Capacity(0.5), crowd)) == 1
    assert len(one_group(Capacity(0.5), crowd, train=False)) == 8
    assert len(one_group(Capacity(None), crowd)) == 8


def test_a_capacity_at_evaluation_is_that_of_the_tokens_so_far():
    """All want one of four experts: a place more for every four tokens, whatever follows."""
    policy = Capacity(0.5, eval_factor=1.0)

    def kept(tokens):
        return [token for token, _ in one_group(policy, [[0]] * tokens, train=False)]

    assert kept(8) == [0, 4] and kept(16) == [0, 4, 8, 12]
    for tokens in range(1, 9):
        assert kept(tokens) == [token for token in kept(16) if token < tokens]


def test_room_that_grows_is_given_to_one_assignment_after_the_other():
    """Against a loop, with choices that repeat, padding, and groups apart."""
    random = np.random.default_rng(0)
    expert_GTK = random.integers(0, E, (3, 20, 2)) * (random.random((3, 20, 2)) < 0.6)
    valid_GT = random.random((3, 20)) < 0.8
    for factor in (0.3, 0.8, 1.5):
        policy = Capacity(eval_factor=factor)
        fitted = fit(policy)(decision_of(expert_GTK, valid_GT=valid_GT), inputs_of(valid_GT, False))
        for g in range(3):
            taken, tokens = [0] * E, 0
            for t in range(20):
                tokens += int(valid_GT[g, t])
                for k in range(2):
                    expert = int(expert_GTK[g, t, k])
                    room = slots_per_expert(tokens, k=2, num_experts=E, factor=factor)
                    keeps = bool(valid_GT[g, t]) and taken[expert] < room
                    assert bool(fitted.keep_GTK[g, t, k]) == keeps
                    if keeps:
                        assert int(fitted.slot_GTK[g, t, k]) == taken[expert]
                    taken[expert] += keeps


def test_the_gates_of_the_kept_are_untouched():
    decision = decision_of([CROWD], np.asarray([GATES], np.float32))
    fitted = Capacity(1.0).fit(decision, inputs_of(np.ones((1, 4), bool)))
    np.testing.assert_array_equal(fitted.gate_GTK, decision.gate_GTK)
    np.testing.assert_array_equal(fitted.expert_GTK, decision.expert_GTK)


def test_a_padded_token_takes_no_place():
    valid_GT = np.array([[False, True, True, True]])
    decision = decision_of(np.zeros((1, 4, 1)), None, valid_GT)
    fitted = Capacity(1.0).fit(decision, inputs_of(valid_GT))
    # ceil(1.0 * 1 * 3 / 4) = 1 slot, and it is token 1's.
    assert np.argwhere(np.asarray(fitted.keep_GTK)).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"factor": 0.0}, "Capacity.factor=0.0"),
        ({"factor": -1.0}, "Capacity.factor=-1.0"),
        ({"factor": float("nan")}, "Capacity.factor=nan"),
        ({"eval_factor": 0.0}, "Capacity.eval_factor=0.0"),
        ({"multiple": 0}, "Capacity.multiple=0"),
        ({"priority": "best"}, "position, gate or random"),
        ({"order": "major"}, "token-major or choice-major"),
    ],
)
def test_refused(options, part):
    with pytest.raises(ValueError, match=part):
        Capacity(**options)


def test_a_policy_is_a_value():
    assert Capacity(1.25) == dataclasses.replace(Capacity(2.0), factor=1.25)
    assert hash(Capacity()) == hash(Capacity())
