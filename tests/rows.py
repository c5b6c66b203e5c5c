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

from layers.dispatch import OneHotEinsum, SlotGather, Sorted, as_soft_slots
from layers.experts.default_vectors import DefaultVectors
from layers.experts.neurons import NeuronExperts
from layers.experts.segmented import SegmentedExperts
from layers.experts.zero_computation import ZeroCopyConstant
from layers.moe_layer import MoELayer
from layers.stack import rematerialised
from moe.conformance.properties import run_layer
from moe.model import functional
from routing import (
    BASE,
    SMEAR,
    AllExperts,
    Balanced,
    BalanceLoss,
    BiasBalancer,
    Capacity,
    DSelectK,
    EntropyLoss,
    ExpertChoiceRouter,
    ExpertMerge,
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
    TokenChoice,
    TopK,
    TrainingText,
    UniformRandom,
    VMoE,
    Zipf,
    ZLoss,
    initialize,
)
from routing.inputs import Tokens
from routing.solvers.hash_tables import BalancedTable

B, T, D, E, F, V = 24, 11, 8, 4, 8, 13
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
DISPATCHERS = (OneHotEinsum(), SlotGather(), Sorted())
every_router = pytest.mark.parametrize("name", ROUTERS)


def thorough(name):
    """A row that stands for its kind, or one that `make test-thorough` runs alone."""
    return pytest.param(name, marks=() if name in KINDS else pytest.mark.thorough)


every_kind = pytest.mark.parametrize("name", [thorough(name) for name in ROUTERS])
every_dispatcher = pytest.mark.parametrize(
    "dispatcher", DISPATCHERS, ids=lambda value: type(value).__name__
)


# One layer, compiled once for each router, dispatcher and shape, and shared by the tests.


@functools.cache
def values_of(name):
    """First parameters and router state, whatever moves the tokens; a bias that selects."""
    row = ROUTERS[name]
    layer = initialize(MoELayer(D, V, row.make, E, F, **row.layer), 3)
    if getattr(layer.router, "balancer", None) is not None:
        layer.router.balancer.bias_E.set_value(jnp.linspace(-0.1, 0.1, E))
    if DefaultVectors.name in layer.companion_names:
        layer.default_vectors.mean_ED.set_value(jnp.asarray(draw(4, E, D)))
    return functional.split(layer)[1:]


@functools.cache
def layer_of(name, dispatcher=SlotGather(), capacity=Capacity()):
    row = ROUTERS[name]
    settings = {"capacity": capacity, "dispatcher": dispatcher, **row.layer}
    layer = MoELayer(D, V, row.make, E, F, **settings)
    return functional.split(layer)[0], *values_of(name)


@functools.cache
def compiled(name, dispatcher=SlotGather(), capacity=Capacity(), remat="none"):
    """Gradients of sum(y * weight) + penalty to (parameters, x); the output; the router's."""
    graph, _, state = layer_of(name, dispatcher, capacity)

    def forward(params, x_BTD, tokens):
        return run_layer(graph.merge(params, state), x_BTD, tokens)

    def loss(both, tokens, weight_BTD, penalty):
        y_BTD, output = rematerialised(forward, remat)(*both, tokens)
        total = jnp.sum(y_BTD * weight_BTD) + penalty * output.auxiliary_loss
        return total, (y_BTD, output)

    @jax.jit
    def run(params, x_BTD, tokens, weight_BTD, penalty=1.0):
        grad = jax.grad(loss, has_aux=True)
        grads, (y_BTD, output) = grad((params, x_BTD), tokens, weight_BTD, penalty)
        return *grads, y_BTD, output

    return run


@functools.cache
def evaluated(name, capacity=Capacity()):
    graph, params, state = layer_of(name, SlotGather(), capacity)
    return jax.jit(lambda x_BTD, tokens: run_layer(graph.merge(params, state), x_BTD, tokens))


def router_of(name):
    graph, params, state = layer_of(name)
    return graph.merge(params, state).router


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens(batch=B, length=T, *, train=True, seed=0, valid_BT=None, key=0):
    random = np.random.default_rng(seed)
    valid_BT = np.ones((batch, length), bool) if valid_BT is None else valid_BT
    return Tokens(
        token_BT=jnp.asarray(random.integers(0, V, (batch, length)), jnp.int32),
        segment_BT=jnp.asarray(valid_BT, jnp.int32),
        position_BT=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)),
        index_B=jnp.arange(batch, dtype=jnp.int32),
        key=jax.random.key(key),
        train=train,
    )


def per_token(decision) -> list[np.ndarray]:
    """The decision as arrays (G, T, ...): what each token got."""
    if isinstance(decision, ExpertMerge):
        return [np.asarray(decision.weight_GTE)]
    if isinstance(decision, TokenChoice):
        gate_GTK = np.where(decision.keep_GTK, decision.gate_GTK, 0)
        return [np.asarray(decision.expert_GTK), gate_GTK, np.asarray(decision.keep_GTK)]
    return [np.asarray(as_soft_slots(decision).combine_GTES.sum(-1))]


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


ragged_BT = np.arange(T)[None] < np.random.default_rng(1).integers(2, T + 1, B)[:, None]
