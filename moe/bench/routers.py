"""Times every router alone, beside an MoE layer of the same shapes.

T tokens in one group, D model width, E experts, F hidden width of an expert.
"""

from collections.abc import Callable, Iterator
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from layers.moe_layer import MoELayer
from moe.model import functional
from routing import (
    BASE,
    Balanced,
    BiasBalancer,
    Capacity,
    DSelectK,
    ExpertChoiceRouter,
    GShard,
    Hash,
    NoisyTopK,
    QuantileBalancer,
    ReMoE,
    Router,
    RouterInputs,
    Sampled,
    Sinkhorn,
    Sizes,
    StrictlyBalanced,
    Switch,
    TopK,
    UniformRandom,
    VMoE,
    initialize,
)
from routing.inputs import Tokens
from routing.records import gates_GTE

VOCABULARY = 4096
ROUTERS: dict[str, Callable[[Sizes], Router]] = {
    "TopK k=2": functools.partial(TopK, k=2),
    "TopK k=8": functools.partial(TopK, k=8),
    "TopK sigmoid, bias": functools.partial(
        TopK, k=2, gates="sigmoid", renormalise=True, balancer=BiasBalancer
    ),
    "TopK quantile": functools.partial(TopK, k=2, balancer=QuantileBalancer, losses=()),
    "Switch": Switch,
    "NoisyTopK k=4": NoisyTopK,
    "VMoE": VMoE,
    "GShard": GShard,
    "ReMoE": ReMoE,
    "DSelectK": DSelectK,
    "Sampled reinforce": Sampled,
    "Hash": Hash,
    "BASE": BASE,
    "Sinkhorn": Sinkhorn,
    "ExpertChoice": ExpertChoiceRouter,
    "StrictlyBalanced k=2": functools.partial(StrictlyBalanced, k=2),
    "UniformRandom": UniformRandom,
}
REPEATS = 7


def timed(call: Callable, *args) -> float:
    """Seconds of one call, until its result is there."""
    started = time.perf_counter()
    jax.block_until_ready(call(*args))
    return time.perf_counter() - started


def median_ms(call: Callable, *args) -> float:
    """Median milliseconds of a call, until its result is there, after two warm-up calls."""
    return 1e3 * statistics.median([timed(call, *args) for _ in range(REPEATS + 2)][2:])


def routers(tokens: int, width: int, experts: int) -> Iterator[dict]:
    """Two rows of results for the layer, then one for each router.

    The layer's are its forward and backward pass with two experts per token, and its forward pass
    with one, both round robin. A router's time is that of its forward and backward pass: scores,
    selection, losses, statistics, and the gradient of its squared gates. `fraction_of_layer` is the
    time over that of the first row.
    """
    shape = {"tokens": tokens, "width": width, "experts": experts}
    x_TD = np.random.default_rng(0).standard_normal((tokens, width)).astype(np.float32)
    layer_ms, forward_ms = layer(x_TD, experts)
    yield row("layer: two experts per token, forward and backward", layer_ms, layer_ms, shape)
    yield row("layer: one expert per token, forward", forward_ms, layer_ms, shape)
    for name, make in ROUTERS.items():
        yield row(name, median_ms(*router_gradient(make, x_TD, experts)), layer_ms, shape)


def row(name: str, milliseconds: float, layer_ms: float, shape: dict) -> dict:
    """A row of results. layer_ms: milliseconds of the layer's forward and backward pass."""
    fraction = round(milliseconds / layer_ms, 5)
    return {
        "router": name,
        "milliseconds": round(milliseconds, 3),
        "fraction_of_layer": fraction,
        **shape,
    }


def layer(x_TD: np.ndarray, experts: int) -> tuple[float, float]:
    """Milliseconds of a layer's forward and backward pass with K = 2, and forward with K = 1."""
    times = []
    x_BTD = jnp.asarray(x_TD)[None]
    for k in (2, 1):
        make = functools.partial(Balanced, k=k)
        layer = MoELayer(x_TD.shape[1], VOCABULARY, make, experts, capacity=Capacity(1.0))
        graph, params, state = functional.split(initialize(layer, 0))

        def total(params, x_BTD, graph=graph, state=state):
            return jnp.sum(graph.merge(params, state)(x_BTD, batch(x_BTD.shape[1]))[0] * x_BTD)

        run = jax.jit(jax.grad(total, (0, 1))) if k == 2 else jax.jit(total)
        times.append(median_ms(run, params, x_BTD))
    return times[0], times[1]


def batch(length: int) -> Tokens:
    """One training sequence of `length` tokens, without padding."""
    place_BT = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens.of(place_BT % VOCABULARY, train=True)


def router_gradient(make: Callable[[Sizes], Router], x_TD: np.ndarray, experts: int):
    """A router's jitted forward and backward pass on x (T, D), and its arguments."""
    tokens, width = x_TD.shape
    router = initialize(make(Sizes(width, experts, VOCABULARY)), 0)
    graph, params, state = functional.split(router)

    def total(params, x_GTD):
        output = graph.merge(params, state)(RouterInputs.of(x_GTD, batch(tokens)))
        assert output.decision is not None
        gate = getattr(output.decision, "gate_GTK", None)
        gate = getattr(output.decision, "gate_GEC", None) if gate is None else gate
        gate = gates_GTE(output.decision) if gate is None else gate
        return jnp.sum(jnp.square(gate)) + output.auxiliary_loss, output.stats

    run = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    return run, params, jnp.asarray(x_TD)[None]
