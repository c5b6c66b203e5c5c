"""One small layer around a router, and what is run on it, for `moe check`.

B sequences (each a group), T tokens, D model width, E experts, V vocabulary.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from layers.dispatch import Dispatcher, SlotGather
from layers.experts.neurons import NeuronExperts
from layers.moe_layer import MoELayer
from layers.stack import rematerialised
from moe.model import functional
from routing import Router, Sizes, TrainingText, gates_GTE, initialize
from routing.inputs import RouterInputs, Tokens

B, T, D, V, F = 16, 12, 16, 29, 16
RTOL, ATOL = 5e-5, 5e-6


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was looked at, whether it holds (None: there is nothing to hold), and what was seen."""

    property: str
    holds: bool | None
    seen: str


class Bench:
    """One small layer around the router, and what is run on it."""

    def __init__(self, make: Callable[[Sizes], Router], num_experts: int):
        text = TrainingText(np.random.default_rng(0).integers(0, V, 2000), V)
        more = {}
        if make(Sizes(D, num_experts, V, text)).repeats_experts:
            more["experts"] = NeuronExperts
        self.make_layer = functools.partial(
            MoELayer, router=make, num_experts=num_experts, d_ff=F, **more
        )
        self.layer: MoELayer = initialize(self.make_layer(D, V, text=text), 1)  # pyright: ignore
        self.router = self.layer.router
        _, self.params, self.state = functional.split(self.layer)
        self.text = text

    def graph(self, dispatcher: Dispatcher) -> functional.Graph:
        return functional.split(self.make_layer(D, V, text=self.text, dispatcher=dispatcher))[0]

    def train(self, dispatcher: Dispatcher = SlotGather(), remat: str = "none"):
        """(parameters, x, tokens, weight) -> gradients of sum(y * weight) + losses; y; output."""
        graph = self.graph(dispatcher)

        def forward(params, x_BTD, tokens):
            return run_layer(graph.merge(params, self.state), x_BTD, tokens)

        def loss(both, tokens, weight_BTD):
            y_BTD, output = rematerialised(forward, remat)(*both, tokens)
            return jnp.sum(y_BTD * weight_BTD) + output.auxiliary_loss, (y_BTD, output)

        @jax.jit
        def run(params, x_BTD, tokens, weight_BTD):
            grad = jax.grad(loss, has_aux=True)
            grads, rest = grad((params, x_BTD), tokens, weight_BTD)
            return *grads, *rest

        return run

    @functools.cached_property
    def evaluate(self):
        graph = self.graph(SlotGather())
        layer = functools.partial(graph.merge, self.params, self.state)
        return jax.jit(lambda x_BTD, tokens: run_layer(layer(), x_BTD, tokens))

    @functools.cached_property
    def plain(self):
        return self.train()


def run_layer(layer: MoELayer, x_BTD: jax.Array, tokens: Tokens):
    """The layer, with logits of a layer before it that each token's own x makes up."""
    if layer.router.reads_previous_logits:
        to_DE = draw(11, x_BTD.shape[-1], layer.router.num_experts)
        tokens = tokens.with_previous_logits(x_BTD.astype(jnp.float32) @ to_DE)
    return layer(x_BTD, tokens)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens(train: bool, seed: int = 0, valid_BT=None, key: int = 0, shape=(B, T)) -> Tokens:
    valid_BT = np.ones(shape, bool) if valid_BT is None else valid_BT
    token_BT = np.random.default_rng(seed).integers(0, V, shape)
    place_T = jnp.arange(shape[1], dtype=jnp.int32)
    return Tokens(
        token_BT=jnp.asarray(token_BT, jnp.int32),
        segment_BT=jnp.asarray(valid_BT, jnp.int32),
        position_BT=jnp.broadcast_to(place_T, shape),
        index_B=jnp.arange(shape[0], dtype=jnp.int32),
        key=jax.random.key(key),
        train=train,
    )


def decided(output) -> np.ndarray:
    return np.asarray(gates_GTE(output.decision))


def router_matmuls(graph: functional.Graph, params, state, x_BTD, tokens: Tokens) -> list:
    """Every dot_general of a layer's router as it is traced, forward and backward."""

    def total(params, x_BTD, tokens):
        layer = graph.merge(params, state)
        if layer.router.reads_previous_logits:
            logits_BTE = jnp.zeros((*tokens.token_BT.shape, layer.router.num_experts))
            tokens = tokens.with_previous_logits(logits_BTE)
        output = layer.router(RouterInputs.of(x_BTD, tokens, layer.sequences_per_group))
        gates = [a for a in jax.tree.leaves(output.decision) if a.dtype == jnp.float32]
        return sum((gate.sum() for gate in gates), output.auxiliary_loss)

    traced = jax.make_jaxpr(jax.grad(total, (0, 1)))(params, x_BTD, tokens)
    return list(matmuls(traced.jaxpr))


def matmuls(jaxpr) -> Iterator:
    """Every dot_general of a program and of those inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from matmuls(inner)


def differences(found, expected) -> str:
    """Where two trees differ, in a few words; empty where they don't."""
    wrong = []
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, b), a in pairs:
        a, b = np.asarray(a), np.asarray(b)
        size = np.abs(b).max(initial=0) if b.dtype.kind == "f" else 0
        if b.dtype.kind == "f":
            same = np.allclose(a, b, RTOL, ATOL + RTOL * size)
        else:
            same = np.array_equal(a, b)
        if not same:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            apart = np.abs(a.astype(np.float64) - b).max()
            wrong.append(f"{name or 'output'} by {apart:.2g} of {size:.2g}" if size else name)
    more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
    return ", ".join(wrong[:2]) + more
