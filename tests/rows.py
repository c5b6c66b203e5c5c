"""The routers under test, one row each, and small layers of them that are compiled once.

B sequences (each a group), T tokens, D model width, F hidden width, E experts, V token ids.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.dispatch import OneHotEinsum, SlotGather, Sorted
from layers.experts.default_vectors import DefaultVectors
from layers.experts.neurons import NeuronExperts
from layers.experts.segmented import SegmentedExperts
from layers.experts.zero_computation import ZeroCopyConstant
from moe.conformance.harness import B, Bench, D, T, V, draw, ragged, tokens  # noqa: F401
from routing import (
    BASE,
    SMEAR,
    AllExperts,
    Balanced,
    BalanceLoss,
    BiasBalancer,
    DSelectK,
    EntropyLoss,
    ExpertChoiceRouter,
    FrozenTopK,
    GShard,
    Hash,
    Hierarchical,
    Lory,
    MultiHash,
    NoisyTopK,
    ProductKeys,
    QuantileBalancer,
    ReMoE,
    Router,
    Sampled,
    Sinkhorn,
    Sizes,
    SoftChoice,
    SoftMoE,
    StrictlyBalanced,
    Switch,
    TopK,
    TrainingText,
    UniformRandom,
    VMoE,
    Zipf,
    ZLoss,
)
from routing.solvers.hash_tables import BalancedTable

E = 4
LOSSES = (
    BalanceLoss(),
    ZLoss(),
    EntropyLoss(over_layers="mean"),
    BalanceLoss(scope="sequence", name="sequence"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A router and what must hold of it beyond what its class declares."""

    make: Callable[[Sizes], Router]
    learned: tuple[str, ...] = ("weight_DE",)
    state: tuple[str, ...] = ()
    by_loss: tuple[str, ...] = ()  # parameters that learn from the router's own losses alone
    layer: dict = dataclasses.field(default_factory=dict)  # further settings of the MoE layer


TEXT = TrainingText(np.random.default_rng(0).integers(0, V, 500), V)


def row(make, learned=("weight_DE",), state=(), by_loss=(), layer=None, **options):
    def of(sizes):
        return make(dataclasses.replace(sizes, text=TEXT), **options)

    return Row(of, learned, state, by_loss, layer or {})


ROUTERS = {
    "top2": row(TopK, k=2, losses=LOSSES),
    "top1": row(TopK, k=1, losses=LOSSES),
    "top2_of_selected": row(TopK, k=2, gates="softmax_of_selected"),
    "sigmoid": row(TopK, k=2, gates="sigmoid", renormalise=True, losses=LOSSES),
    "sigmoid_bias": row(
        TopK,
        k=3,
        gates="sigmoid",
        renormalise=True,
        scale=2.5,
        balancer=BiasBalancer,
        losses=LOSSES,
        state=("balancer.bias_E",),
    ),
    "switch": row(Switch, jitter=0.1, losses=LOSSES),
    "quantile": row(
        TopK, k=2, balancer=QuantileBalancer, losses=LOSSES, state=("balancer.bias_E",)
    ),
    "moe_plus_plus": row(
        TopK,
        k=2,
        residual=True,
        losses=(BalanceLoss(zero_computation=4), *LOSSES[1:]),
        learned=("weight_DE", "residual_EE"),
        layer={"companions": (ZeroCopyConstant,)},
    ),
    "default_moe": row(
        TopK,
        k=2,
        keep_rest=True,
        losses=LOSSES,
        state=("default_vectors.mean_ED",),
        layer={"companions": (DefaultVectors,)},
    ),
    "peer": row(
        ProductKeys,
        heads=2,
        k=2,
        learned=("query_DHXQ", "key_QXN"),
        layer={"experts": NeuronExperts},
    ),
    "multi_hash": row(
        MultiHash,
        learned=(),
        state=("table_NV",),
        layer={"experts": SegmentedExperts, "activation": "relu"},
    ),
    "groups": row(TopK, k=2, expert_groups=2, groups_per_token=1, orthogonal=True, losses=LOSSES),
    "noisy": row(NoisyTopK, k=2, learned=("weight_DE", "noise_DE")),
    "strictly_balanced": row(StrictlyBalanced, k=2, by_loss=("threshold_E",)),
    "hierarchical": row(
        Hierarchical,
        branches=2,
        learned=("weight_DE", "noise_DE", "primary_DA", "primary_noise_DA"),
    ),
    "v_moe": row(VMoE, k=2),
    "gshard": row(GShard),
    "hash": row(Hash, learned=(), state=("table_V",)),
    "hash_previous": row(
        Hash, key="previous", table=BalancedTable(), learned=(), state=("table_V",)
    ),
    "hash_bigram": row(Hash, key="bigram", learned=(), state=("salt",)),
    "hash_position": row(Hash, key="position", learned=()),
    "hash_predicted": row(Hash, key="predicted", learned=(), state=("table_V", "next_V")),
    "hash_future": row(Hash, key="future", learned=(), state=("table_V",)),
    "base": row(BASE),
    "sinkhorn": row(Sinkhorn),
    "dselect_k": row(
        DSelectK, ramp_steps=3, learned=("code_DKM", "mix_DK"), state=("ramp.weight",)
    ),
    "remoe": row(ReMoE, start=1.0, state=("penalty.weight",)),
    "expert_choice": row(ExpertChoiceRouter, evaluation="tokens", losses=LOSSES),
    "expert_choice_capped": row(
        ExpertChoiceRouter, most_experts=3, losses=LOSSES, state=("thresholds.threshold_E",)
    ),
    "soft_moe": row(SoftMoE, slots_per_expert=2, learned=("phi_DES", "scale"), losses=LOSSES),
    "soft_moe_raw": row(SoftMoE, normalise=False, learned=("phi_DES",), losses=LOSSES),
    "soft_moe_causal": row(SoftMoE, segment=3, learned=("phi_DES", "scale"), losses=LOSSES),
    "smear": row(SMEAR, losses=LOSSES),
    "lory": row(Lory, segment=4, losses=LOSSES),
    "soft_choice": row(
        SoftChoice, learned=("phi_DES", "scale"), state=("cooling.heat_2",), losses=LOSSES
    ),
    "soft_choice_causal": row(
        SoftChoice,
        segment=3,
        slots_per_expert=2,
        learned=("phi_DES", "scale"),
        state=("cooling.heat_2",),
    ),
    "reinforce": row(Sampled, learned=(), by_loss=("weight_DE", "value_DH", "value_H")),
    "gumbel": row(Sampled, estimator="gumbel", losses=LOSSES),
    "straight_through": row(Sampled, estimator="straight_through"),
    "stochastic_times_smooth": row(Sampled, estimator="stochastic_times_smooth"),
    "noisy_rectifier": row(Sampled, estimator="noisy_rectifier"),
    "uniform": row(UniformRandom, learned=()),
    "balanced": row(Balanced, learned=()),
    "zipf": row(Zipf, learned=()),
    "all_experts": row(AllExperts, losses=LOSSES),
    "frozen": row(FrozenTopK, learned=(), state=("weight_DE",)),
}
# One of each kind. What compiles anew for each router runs for these, and for the others only with
# `make test-thorough`.
KINDS = (
    *("switch", "top2", "sigmoid_bias", "noisy", "hash", "base", "sinkhorn", "remoe"),
    *("expert_choice", "soft_moe_causal", "lory", "reinforce", "peer", "moe_plus_plus"),
)
WITHOUT_SCORES = ("peer", "hierarchical", "dselect_k")  # or without logits that could shrink
# Those whose steps of whole models run, and those that compile for a mesh or another precision.
WHOLE_MODELS = ("switch", "sigmoid_bias", "expert_choice", "reinforce")
DISPATCHERS = (OneHotEinsum(), SlotGather(), Sorted())
every_router = pytest.mark.parametrize("name", ROUTERS)


def thorough_but(names):
    """Rows that stand for their kind, and those that `make test-thorough` runs alone."""
    marks = [() if name in names else pytest.mark.thorough for name in ROUTERS]
    rows = [pytest.param(name, marks=mark) for name, mark in zip(ROUTERS, marks, strict=True)]
    return pytest.mark.parametrize("name", rows)


every_kind, every_model = thorough_but(KINDS), thorough_but(WHOLE_MODELS)
every_dispatcher = pytest.mark.parametrize(
    "dispatcher", DISPATCHERS, ids=lambda value: type(value).__name__
)


# One layer, compiled once for each router, dispatcher and shape, and shared by the tests.


@functools.cache
def bench_of(name, experts=E):
    """The row's layer and its programs; default vectors are not zero."""
    row = ROUTERS[name]
    bench = Bench(row.make, experts, row.layer)
    if "default_vectors.mean_ED" in bench.state:
        bench.state["default_vectors.mean_ED"] = jnp.asarray(draw(4, experts, D))
    return bench


def values_of(name):
    """First parameters and router state, whatever moves the tokens."""
    return bench_of(name).params, bench_of(name).state


def layer_of(name, dispatcher=SlotGather(), capacity=None):
    return bench_of(name).graph(dispatcher, capacity), *values_of(name)


def compiled(name, dispatcher=SlotGather(), capacity=None, remat="none"):
    """Gradients of sum(y * weight) + penalty to (parameters, x); the output; the router's."""
    return bench_of(name).train(dispatcher, capacity, remat)


def evaluated(name, capacity=None):
    return bench_of(name).evaluate(capacity)


def router_of(name):
    return bench_of(name).router


def assert_keeps(name, look):
    """Every verdict of a property holds, or has nothing to hold where that is known of the row."""
    row, bench = ROUTERS[name], bench_of(name)
    learns = bool(bench.router_params)
    nothing = {
        "gradient": not learns,
        "coefficients of its losses": not (learns and bench.router.losses) or name == "dselect_k",
        "scale of scores": not learns or name in WITHOUT_SCORES,
        "router state": not row.state,
        "load": not bench.router.balanced,
    }
    verdicts = list(look(bench))
    assert verdicts
    for verdict in verdicts:
        assert verdict.holds or (verdict.holds is None and nothing.get(verdict.property)), verdict


def same_tree(one, other, rtol=2e-5, atol=2e-6):
    """Equal structure; integers equal, floats to rounding."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        where = jax.tree_util.keystr(path)
        if np.issubdtype(a.dtype, np.floating):
            size = np.abs(b).max(initial=0)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol + rtol * size, err_msg=where)
        else:
            np.testing.assert_array_equal(a, b, err_msg=where)


def finite(tree):
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


ragged_BT = ragged()
