"""What routing costs: every router's own time beside that of an MoE layer at the same shapes.

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
    """Seconds of one call whose result is waited for."""
    started = time.perf_counter()
    jax.block_until_ready(call(*args))
    return time.perf_counter() - started


def median_ms(call: Callable, *args) -> float:
    """Median time of a call whose result is waited for, after two that are not counted."""
    return 1e3 * statistics.median([timed(call, *args) for _ in range(REPEATS + 2)][2:])


def routers(tokens: int, width: int, experts: int) -> Iterator[dict]:
    """A row for the layer, one for one expert's forward pass, then one for every router.

    A router's time is that of its forward and backward pass: scores, selection, losses and
    statistics, and the gradient of a weighted sum of its gates. `fraction_of_layer` is of the step
    (forward and backward) of a layer with two experts per token, round robin.
    """
    shape = {"tokens": tokens, "width": width, "experts": experts}
    x_TD = np.random.default_rng(0).standard_normal((tokens, width)).astype(np.float32)
    layer_ms, forward_ms = layer(x_TD, experts)
    yield row("layer: two experts per token, forward and backward", layer_ms, layer_ms, shape)
    yield row("layer: one expert per token, forward", forward_ms, layer_ms, shape)
    for name, make in ROUTERS.items():
        yield row(name, median_ms(*router_step(make, x_TD, experts)), layer_ms, shape)


def row(name: str, milliseconds: float, layer_ms: float, shape: dict) -> dict:
    fraction = round(milliseconds / layer_ms, 5)
    return {
        "router": name,
        "milliseconds": round(milliseconds, 3),
        "fraction_of_layer": fraction,
        **shape,
    }


def layer(x_TD: np.ndarray, experts: int) -> tuple[float, float]:
    """Milliseconds of a layer's step with K = 2, and of its forward pass with K = 1."""
    times = []
    x_BTD = jnp.asarray(x_TD)[None]
    for k in (2, 1):
        make = functools.partial(Balanced, k=k)
        built = initialize(
            MoELayer(x_TD.shape[1], VOCABULARY, make, experts, capacity=Capacity(1.0)), 0
        )
        graph, params, state = functional.split(built)

        def total(params, x_BTD, graph=graph, state=state):
            return jnp.sum(graph.merge(params, state)(x_BTD, batch(x_BTD.shape[1]))[0] * x_BTD)

        run = jax.jit(jax.grad(total, (0, 1))) if k == 2 else jax.jit(total)
        times.append(median_ms(run, params, x_BTD))
    return times[0], times[1]


def batch(length: int) -> Tokens:
    place_BT = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens.of(place_BT % VOCABULARY, train=True)


def router_step(make: Callable[[Sizes], Router], x_TD: np.ndarray, experts: int):
    """A jitted function of a router's forward and backward pass, and its arguments."""
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
