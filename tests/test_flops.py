"""Parameters and FLOPs against counts of their own: by hand, and by XLA."""

import functools

import jax
import jax.numpy as jnp
import pytest

from layers.attention import Attention
from layers.experts.shared import SharedExpert
from layers.experts.zero_computation import ZeroCopyConstant
from layers.moe_layer import MoELayer
from moe.machine import hardware
from moe.model.transformer import Transformer
from moe.training.abstract_model import Vocabulary, abstract_model
from moe.training.objective import MaskedToken, NextToken
from routing import (
    AllExperts,
    DSelectK,
    ExpertChoiceRouter,
    ReMoE,
    Sampled,
    SoftMoE,
    Switch,
    TopK,
)
from routing.inputs import Tokens

D, L, H, T, V, E, F = 64, 2, 2, 32, 50, 4, 96
ATTENTION = 4 * D * D  # query, key, value, out
NORMS = (2 * L + 1) * D


def built(router=None, objective=NextToken(), **settings):
    moe = None
    if router is not None:
        moe = functools.partial(MoELayer, router=router, num_experts=E, d_ff=F, **settings)
        settings = {}
    make = functools.partial(Transformer, d_model=D, num_layers=L, num_heads=H, moe=moe, **settings)
    return abstract_model(make, objective, Vocabulary(V), batch_size=2, sequence_length=T)


def by_hand(routed: float, router: int, shared: int = 0, causal: bool = True, vocab: int = V):
    """FLOPs of a training token: 6 for a weight; 12 * T * D / 2 a layer of causal attention."""
    layer = ATTENTION + router + (routed + shared) * 3 * D * F
    attention = 12 * T * D * (0.5 if causal else 1)
    return round(6 * (vocab * D + L * layer) + L * attention)


def test_a_token_choice_model_by_hand():
    costs = built(functools.partial(TopK, k=2)).costs
    expert = 3 * D * F
    assert costs.parameters_total == V * D + NORMS + L * (ATTENTION + D * E + E * expert)
    assert costs.parameters_active == V * D + NORMS + L * (ATTENTION + D * E + 2 * expert)
    assert costs.flops_per_token == by_hand(2, D * E)
    assert costs.flops_with(1.5) == by_hand(1.5, D * E)


def test_shared_experts_are_always_active():
    costs = built(functools.partial(TopK, k=2), companions=(SharedExpert,)).costs
    assert costs.parameters_active == V * D + NORMS + L * (ATTENTION + D * E + 3 * 3 * D * F)
    assert costs.flops_per_token == by_hand(2, D * E, shared=1)


def test_one_expert_per_token():
    assert built(Switch).costs.flops_per_token == by_hand(1, D * E)


def test_expert_choice_and_soft_slots_cost_what_their_slots_cost():
    masked = {"causal": False, "vocab": V + 1}
    choice = built(functools.partial(ExpertChoiceRouter, capacity_factor=1.5), MaskedToken()).costs
    assert choice.experts_per_token == 1.5
    assert choice.flops_per_token == by_hand(1.5, D * E, **masked)
    soft = built(functools.partial(SoftMoE, slots_per_expert=4), MaskedToken()).costs
    assert soft.experts_per_token == 4 * E / T
    # mixing into and out of slots is not counted: T * E * S * D twice
    assert soft.flops_per_token == by_hand(4 * E / T, D * E * 4, **masked)


@pytest.mark.parametrize(
    ("router", "experts"),
    [
        (functools.partial(ReMoE, k=2), 2),
        (functools.partial(DSelectK, k=2), 2),
        (functools.partial(Sampled, estimator="gumbel"), 1),
        (functools.partial(Sampled, estimator="straight_through", k=3), 3),
        (functools.partial(Sampled, estimator="noisy_rectifier", k=3), 3),
        (AllExperts, E),
    ],
)
def test_a_router_whose_choices_may_be_any_number_costs_those_it_aims_at(router, experts):
    """Their decisions have room for every expert, most of them with a gate of zero."""
    assert built(router).costs.experts_per_token == experts


@pytest.mark.parametrize(
    ("router", "companion", "experts"),
    [
        # MoE++: tau = 3/4, so that of 2 choices 3/4 E go to an expert for every 4 that don't.
        (functools.partial(TopK, k=2), ZeroCopyConstant, 2 * 0.75 * E / (0.75 * E + 4)),
        # Integrated Mixture-of-Depths-and-Experts: as much of nothing as of experts.
        (
            Switch,
            functools.partial(ZeroCopyConstant, zero=E, copy=0, constant=0, share=1.0),
            0.5,
        ),
    ],
    ids=["moe_plus_plus", "mode_integrated"],
)
def test_choices_of_nothing_and_of_copies_cost_no_expert(router, companion, experts):
    costs = built(router, companions=(companion,)).costs
    assert costs.experts_per_token == pytest.approx(experts)
    assert costs.flops_per_assignment == 6 * 3 * D * F
    assert costs.flops_per_token == costs.flops_with(experts)


def test_a_window_and_an_untied_head():
    windowed = built(attention=functools.partial(Attention, window=8)).costs
    full, untied = built().costs, built(tie_embeddings=False).costs
    assert full.flops_per_token - windowed.flops_per_token == L * 12 * D * (T // 2 - 8)
    assert untied.flops_per_token == full.flops_per_token
    assert untied.parameters_total == full.parameters_total + V * D


@pytest.mark.parametrize("sparse", [False, True])
def test_xla_counts_the_same_matmuls(sparse):
    """Forward pass; XLA adds norms, softmax and rotations, and computes masked attention whole.

    Without a capacity limit the experts run on T slots each, E of which K are asked for.
    """
    router = functools.partial(TopK, k=E) if sparse else None  # k = E: all slots are asked for
    model = built(router, scan=False) if not sparse else built(router)
    batch = 2
    integers = jax.ShapeDtypeStruct((batch, T), jnp.int32)

    def forward(params, state, token_BT):
        places = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (batch, T))
        rows = jnp.arange(batch, dtype=jnp.int32)
        ones = jnp.ones_like(token_BT)
        tokens = Tokens(token_BT, ones, places, rows, jax.random.key(0), train=False)
        module = model.graph.merge(params, state)
        return module.logits(module(tokens).hidden_BTD)

    compiled = jax.jit(forward).lower(*model.shapes, integers).compile()
    counted = compiled.cost_analysis()["flops"] / (batch * T)
    masked_attention = L * 12 * T * D / 2  # counted by XLA, not by us
    if sparse:
        # a loop's body is counted once
        layers = model.costs.flops_per_token + masked_attention - 6 * V * D
        expected = (layers / L + 6 * V * D) / 3
    else:
        expected = (model.costs.flops_per_token + masked_attention) / 3
    assert counted == pytest.approx(expected, rel=0.15)


def test_the_machines_figures_are_plausible():
    assert 1e8 < hardware.matmul_peak("float32", seconds=0.02) < 1e16
    assert hardware.peak_memory_bytes() > 2**20
    assert "x" in hardware.describe_device()
