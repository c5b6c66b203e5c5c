"""One small layer around a router, and what is run on it: compiled once for each shape.

B sequences (each a group), T tokens, D model width, F hidden width, E experts, V token ids.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from layers.dispatch import Dispatcher, SlotGather, as_soft_slots
from layers.experts.neurons import NeuronExperts
from layers.moe_layer import MoELayer
from layers.remat import rematerialised
from moe.model import functional
from routing import (
    Capacity,
    ExpertMerge,
    Router,
    RouterInputs,
    Sizes,
    TokenChoice,
    TrainingText,
    initialize,
)
from routing.inputs import Tokens

B, T, D, F, V = 24, 11, 8, 8, 13
RTOL, ATOL = 2e-5, 2e-6


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was looked at, whether it holds (None: there is nothing to hold), and what was seen."""

    property: str
    holds: bool | None
    seen: str


class Bench:
    """One small layer around a router; each of its programs is compiled when it is first asked for.

    Args:
        make: makes the router from `Sizes`.
        num_experts: E.
        settings: further settings of the MoE layer; None for those that the router cannot do
            without.
    """

    def __init__(
        self, make: Callable[[Sizes], Router], num_experts: int, settings: dict | None = None
    ):
        self.num_experts = num_experts
        self.text = TrainingText(np.random.default_rng(0).integers(0, V, 2000), V)
        made = make(Sizes(D, num_experts, V, self.text))
        if not isinstance(made, Router):
            raise TypeError(f"it makes a {type(made).__name__}, expected a Router")
        if settings is None:
            repeats = made.repeats_experts
            settings = {"experts": NeuronExperts} if repeats else {}
        self.capacity: Capacity = settings.get("capacity", Capacity())
        self.make_layer = functools.partial(
            MoELayer, router=make, num_experts=num_experts, d_ff=F, **settings
        )
        layer: MoELayer = initialize(self.make_layer(D, V, text=self.text), 3)  # pyright: ignore
        _, self.params, self.state = functional.split(layer)
        for name in self.state:
            if name.endswith("balancer.bias_E"):  # a bias that selects
                self.state[name] = jnp.linspace(-0.1, 0.1, self.state[name].shape[0])
        self._train = functools.cache(self._compile_training)
        self._evaluate = functools.cache(self._compile_evaluation)

    def graph(
        self, dispatcher: Dispatcher = SlotGather(), capacity: Capacity | None = None
    ) -> functional.Graph:
        """The layer without its values; with the capacity of its settings where None."""
        how = {"dispatcher": dispatcher, "capacity": capacity or self.capacity}
        return functional.split(self.make_layer(D, V, text=self.text, **how))[0]

    @functools.cached_property
    def layer(self) -> MoELayer:
        """The layer with its first values."""
        return self.graph().merge(self.params, self.state)

    @property
    def router(self) -> Router:
        """The router with its first values."""
        return self.layer.router

    @property
    def router_params(self) -> dict[str, jax.Array]:
        """The router's parameters, by their names in the layer."""
        return {name: a for name, a in self.params.items() if name.startswith("router.")}

    def train(
        self,
        dispatcher: Dispatcher = SlotGather(),
        capacity: Capacity | None = None,
        remat: str = "none",
    ):
        """(parameters, x, tokens, weight, penalty) -> gradients to (parameters, x), y, output.

        Of sum(y * weight) + penalty * the router's losses; the penalty is 1 where left out.
        """
        return self._train(dispatcher, capacity or self.capacity, remat)

    def evaluate(self, capacity: Capacity | None = None):
        """(x, tokens) -> y, output."""
        return self._evaluate(capacity or self.capacity)

    def run(self, train: bool, capacity: Capacity | None = None):
        """(x, tokens) -> y, output, in training or at evaluation."""
        if not train:
            return self.evaluate(capacity)
        program = self.train(capacity=capacity)
        return lambda x_BTD, tokens: program(self.params, x_BTD, tokens, np.ones_like(x_BTD))[2:]

    def _compile_training(self, dispatcher: Dispatcher, capacity: Capacity, remat: str):
        graph = self.graph(dispatcher, capacity)

        def forward(params, x_BTD, tokens):
            return run_layer(graph.merge(params, self.state), x_BTD, tokens)

        def loss(both, tokens, weight_BTD, penalty):
            y_BTD, output = rematerialised(forward, remat)(*both, tokens)
            total = jnp.sum(y_BTD * weight_BTD) + penalty * output.auxiliary_loss
            return total, (y_BTD, output)

        @jax.jit
        def run(params, x_BTD, tokens, weight_BTD, penalty):
            grad = jax.grad(loss, has_aux=True)
            grads, (y_BTD, output) = grad((params, x_BTD), tokens, weight_BTD, penalty)
            return *grads, y_BTD, output

        # The penalty is always given, so that its default compiles nothing anew.
        return lambda *args, penalty=1.0: run(*args, penalty)

    def _compile_evaluation(self, capacity: Capacity):
        graph = self.graph(SlotGather(), capacity)
        layer = functools.partial(graph.merge, self.params, self.state)
        return jax.jit(lambda x_BTD, tokens: run_layer(layer(), x_BTD, tokens))


def run_layer(layer: MoELayer, x_BTD: jax.Array, tokens: Tokens):
    """The layer, with logits of a layer before it that each token's own x makes up."""
    return layer(x_BTD, with_previous_logits(layer, x_BTD, tokens))


def inputs_of(layer: MoELayer, x_BTD: jax.Array, tokens: Tokens) -> RouterInputs:
    """What the layer gives its router."""
    tokens = with_previous_logits(layer, x_BTD, tokens)
    return RouterInputs.of(x_BTD, tokens, layer.sequences_per_group)


def with_previous_logits(layer: MoELayer, x_BTD: jax.Array, tokens: Tokens) -> Tokens:
    """The tokens with logits of a layer before, where the router reads them."""
    if not layer.router.reads_previous_logits:
        return tokens
    to_DE = draw(11, x_BTD.shape[-1], layer.router.num_experts)
    with jax.default_matmul_precision("highest"):  # as the router itself
        return tokens.with_previous_logits(x_BTD.astype(jnp.float32) @ to_DE)


def draw(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers, the same ones every time."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens(
    batch: int = B, length: int = T, *, train: bool = True, seed: int = 0, valid_BT=None, key=0
) -> Tokens:
    """Random token ids, each sequence one document with padding where `valid_BT` is False."""
    shape = (batch, length)
    valid_BT = np.ones(shape, bool) if valid_BT is None else valid_BT
    token_BT = np.random.default_rng(seed).integers(0, V, shape)
    made = Tokens.of(token_BT, train, seed=key)
    return dataclasses.replace(made, segment_BT=jnp.asarray(valid_BT, jnp.int32))


def ragged() -> np.ndarray:
    """Sequences of 2 to T tokens: (B, T), True for a token."""
    return np.arange(T)[None] < np.random.default_rng(1).integers(2, T + 1, B)[:, None]


def per_token(decision) -> list[np.ndarray]:
    """The decision as arrays (G, T, ...): what each token got."""
    if isinstance(decision, ExpertMerge):
        return [np.asarray(decision.weight_GTE)]
    if isinstance(decision, TokenChoice):
        gate_GTK = np.where(decision.keep_GTK, decision.gate_GTK, 0)
        return [np.asarray(decision.expert_GTK), gate_GTK, np.asarray(decision.keep_GTK)]
    return [np.asarray(as_soft_slots(decision).combine_GTES.sum(-1))]


def each_tokens(result) -> list[np.ndarray]:
    """Everything that a layer's tokens got, of its (y, output): arrays (B, T, ...)."""
    y_BTD, output = result
    return [np.asarray(y_BTD), *per_token(output.decision)]


def told(output) -> dict:
    """What a router says beside its decision."""
    losses = {"losses": output.losses, "their sum": output.auxiliary_loss}
    return {**losses, "statistics": output.stats}


def router_matmuls(bench: Bench) -> list:
    """Every dot_general of the router as it is traced, forward and backward."""
    graph, batch = bench.graph(), tokens()

    def total(params, x_BTD):
        layer = graph.merge(params, bench.state)
        output = layer.router(inputs_of(layer, x_BTD, batch))
        gates = [a for a in jax.tree.leaves(output.decision) if a.dtype == jnp.float32]
        return sum((gate.sum() for gate in gates), output.auxiliary_loss)

    traced = jax.make_jaxpr(jax.grad(total, (0, 1)))(bench.params, jnp.asarray(draw(0, B, T, D)))
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


def differences(found, expected, rtol: float = RTOL, atol: float = ATOL) -> str:
    """Where two trees differ, in a few words; empty where they don't.

    Integers must be equal, floats to rounding of their own size and of the array's largest.
    """
    wrong = []
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, b), a in pairs:
        a, b = np.asarray(a), np.asarray(b)
        size = np.abs(b).max(initial=0) if b.dtype.kind == "f" else 0
        if b.dtype.kind == "f":
            same = np.allclose(a, b, rtol, atol + rtol * size)
        else:
            same = np.array_equal(a, b)
        if not same:
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "output"
            apart = np.abs(a.astype(np.float64) - b).max()
            wrong.append(f"{name} by {apart:.2g} of {size:.2g}" if size else name)
    more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
    return ", ".join(wrong[:2]) + more
