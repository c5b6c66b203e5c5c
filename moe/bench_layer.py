"""What an MoE layer costs beside the dense feed-forward of the same active FLOPs.

T tokens in one group, D model width, F hidden width of an expert, E experts, K experts per token.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import importlib.util
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.dispatch import Dispatcher, SlotGather, Sorted
from layers.feed_forward import FeedForward
from layers.moe_layer import MoELayer
from moe import functional, hardware
from moe.bench_routers import VOCABULARY, batch, median_ms, timed
from routing import Balanced, Capacity, Router, Sizes, Zipf, initialize

ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer's sizes; the experts are SwiGLU."""

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int

    @classmethod
    def read(cls, text: str) -> "Case":
        """From "T,D,F,E,K"; ValueError for anything else."""
        parts = text.split(",")
        if len(parts) != 5 or not all(part.strip().isdigit() and int(part) for part in parts):
            raise ValueError(f"--case={text}: five numbers T,D,F,E,K, such as 4096,256,1024,16,2")
        case = cls(*map(int, parts))
        if case.k > case.experts:
            raise ValueError(f"--case={text}: K={case.k} of E={case.experts} experts")
        return case

    def __str__(self) -> str:
        return f"T={self.tokens} D={self.width} F={self.hidden} E={self.experts} K={self.k}"

    def least_seconds(self, peak: float, bandwidth: float, size: int, *, step: bool) -> float:
        """The roofline: products at the matmul peak, or every byte moved once, what takes longer.

        A step reads the weights twice and writes their gradients; three times a forward's FLOPs.
        size: bytes of a number.
        """
        rows, weights = self.tokens * self.k, 3 * self.experts * self.width * self.hidden
        flops = 2 * rows * 3 * self.width * self.hidden
        bytes_moved = size * (weights + 2 * rows * self.width)
        times = 3 if step else 1
        return times * max(flops / peak, bytes_moved / bandwidth)


class Calls(NamedTuple):
    """What is timed, without arguments, and the bytes that a step holds at its fullest."""

    forward: Callable
    step: Callable
    bytes: int | None = None


CASES = (
    Case(4096, 256, 1024, 16, 2),
    Case(4096, 256, 512, 64, 4),
    Case(8192, 512, 2048, 8, 2),
    Case(8192, 512, 1024, 128, 1),
)
# Nothing is dropped: as many slots as round robin fills, or rows without slots.
WAYS: dict[str, tuple[tuple[str, Dispatcher, Capacity], ...]] = {
    "balanced": (
        ("SlotGather", SlotGather(), Capacity(1.0)),
        ("Sorted", Sorted(), Capacity(None)),
    ),
    "zipf": (("Sorted", Sorted(), Capacity(None)),),
}


def ways(routing: str) -> tuple[tuple[str, Dispatcher, Capacity], ...]:
    """What is timed with a routing; on an accelerator with tokamax, its kernels too."""
    if jax.default_backend() == "cpu" or not importlib.util.find_spec("tokamax"):
        return WAYS[routing]
    return *WAYS[routing], ("Sorted tokamax", Sorted("tokamax"), Capacity(None))


ROUTERS: dict[str, Callable[..., Router]] = {"balanced": Balanced, "zipf": Zipf}


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 256 MiB: the median of repeated runs."""
    copy = jax.jit(lambda x: x + 1)
    x = jnp.zeros(64 * 2**20, jnp.float32)
    return 2 * x.nbytes / (1e-3 * median_ms(copy, x))


def layers(cases: tuple[Case, ...], dtype: str = "float32") -> Iterator[dict]:
    """A row for each case, routing and dispatcher.

    Every round times the dense layer on K*T tokens and all ways in turn, each after a call that
    is not counted; ratios are medians over the rounds' own, so that a slow moment of the machine
    counts for both. memory_ratio: what a step holds at its fullest, by the compiler, over what the
    dense one does beside its weights plus the experts' weights and their gradients.
    """
    peak, bandwidth = hardware.matmul_peak(dtype), copy_bandwidth()
    for case in cases:
        with contextlib.ExitStack() as others:
            yield from _rows(case, peak, bandwidth, dtype, others)


def _rows(
    case: Case, peak: float, bandwidth: float, dtype: str, others: contextlib.ExitStack
) -> Iterator[dict]:
    random = np.random.default_rng(0)
    x_TD = random.standard_normal((case.tokens, case.width)).astype(dtype)
    programs = {("dense", "dense"): _dense(case, x_TD)}
    for routing in WAYS:
        make = functools.partial(ROUTERS[routing], k=case.k)
        for name, dispatcher, capacity in ways(routing):
            programs[routing, name] = _sparse(case, x_TD, make, dispatcher, capacity)
    has_torch = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    on_cpu = dtype == "float32" and jax.default_backend() == "cpu"
    if has_torch and on_cpu and case.experts <= 64:  # of more experts its backward pass takes 16 s
        from moe import bench_torch

        for name in bench_torch.WAYS:
            calls = others.enter_context(bench_torch.mixtral(case, x_TD, name))
            programs["balanced", name] = Calls(*calls)
    # The dense layer holds its weights and their gradients once, the sparse one E times.
    weights = 2 * 3 * case.width * case.hidden * x_TD.dtype.itemsize
    room = (programs["dense", "dense"].bytes or 0) + (case.experts - 1) * weights
    seconds = {key: [] for key in programs}
    for _ in range(ROUNDS):
        for key, calls in programs.items():
            # The first call of each takes the memory that the one before it left behind.
            seconds[key].append([(timed(call), timed(call))[1] for call in calls[:2]])
    dense = np.asarray(seconds.pop(("dense", "dense")))
    for (routing, dispatcher), found in seconds.items():
        times = np.asarray(found)
        ratios = np.median(times / dense, axis=0)
        forward, step = np.median(times, axis=0)
        least = case.least_seconds(peak, bandwidth, x_TD.dtype.itemsize, step=True)
        held = programs[routing, dispatcher].bytes
        yield {
            "case": str(case),
            "routing": routing,
            "dispatcher": dispatcher,
            "milliseconds_forward": round(1e3 * forward, 3),
            "milliseconds_step": round(1e3 * step, 3),
            "ratio_to_dense_forward": round(float(ratios[0]), 4),
            "ratio_to_dense_step": round(float(ratios[1]), 4),
            "roofline_fraction": round(least / step, 4),
        } | ({} if held is None else {"memory_ratio": round(held / room, 4)})


def _dense(case: Case, x_TD: np.ndarray) -> Calls:
    """Forward pass and step of one feed-forward on K * T tokens."""
    graph, params, state = functional.split(initialize(FeedForward(case.width, case.hidden), 0))
    x_ND = jnp.asarray(np.tile(x_TD, (case.k, 1)))

    def total(params, x_ND):
        return jnp.sum(graph.join(params, state)(x_ND) * x_ND)

    return _calls(total, params, x_ND)


def _sparse(case: Case, x_TD, make: Callable[[Sizes], Router], dispatcher, capacity) -> Calls:
    """The same of an MoE layer."""
    settings = {"capacity": capacity, "dispatcher": dispatcher}
    layer = MoELayer(case.width, VOCABULARY, make, case.experts, case.hidden, **settings)
    graph, params, state = functional.split(initialize(layer, 0))
    tokens = batch(case.tokens)

    def total(params, x_BTD):
        return jnp.sum(graph.join(params, state)(x_BTD, tokens)[0] * x_BTD)

    return _calls(total, params, jnp.asarray(x_TD)[None])


def _calls(total, *args) -> Calls:
    functions = (total, jax.grad(total, (0, 1)))
    forward, step = (jax.jit(function).lower(*args).compile() for function in functions)
    memory = step.memory_analysis()
    if memory is None:  # not every platform's compiler tells
        held = None
    else:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        held += memory.temp_size_in_bytes
    return Calls(functools.partial(forward, *args), functools.partial(step, *args), held)


def summary(rows: list[dict]) -> dict[str, float]:
    """Geometric means of the ratios over the cases, of the fastest of our dispatchers in each."""
    found = {}
    ours = [row for row in rows if not row["dispatcher"].startswith("transformers")]
    for routing in dict.fromkeys(row["routing"] for row in ours):
        for what in ("forward", "step"):
            name = f"ratio_to_dense_{what}"
            best: dict[str, float] = {}
            for row in ours:
                if row["routing"] == routing:
                    best[row["case"]] = min(row[name], best.get(row["case"], np.inf))
            found[f"{routing}, {what}"] = statistics.geometric_mean(best.values())
    return found
