"""Times an MoE layer beside the dense feed-forward of the same active FLOPs.

"step" in the rows' keys stands for a forward and backward pass of the layer; a whole training step
is timed by benchmarks/step_utilisation.py.

T tokens in one group, D model width, F hidden width of an expert, E experts, K experts per token.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
import dataclasses
import functools
import importlib.util
import resource
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.dispatch import Dispatcher, SlotGather, Sorted
from layers.experts.feed_forward import FeedForward
from layers.moe_layer import MoELayer
from moe.bench.routers import VOCABULARY, batch, median_ms, timed
from moe.errors import first_line
from moe.machine import hardware
from moe.model import functional
from routing import Balanced, Capacity, Router, Sizes, Zipf, initialize

ROUNDS, MOST_CALLS = 7, 8
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes T, D, F, E and K of a layer whose experts are SwiGLU."""

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int

    @classmethod
    def read(cls, text: str) -> "Case":
        """Parse "T,D,F,E,K"; ValueError for anything else."""
        numbers = text.split(",")
        if len(numbers) != 5 or not all(n.strip().isdigit() and int(n) for n in numbers):
            raise ValueError(f"--case={text}: five numbers T,D,F,E,K, such as 4096,256,1024,16,2")
        case = cls(*map(int, numbers))
        if case.k > case.experts:
            raise ValueError(f"--case={text}: K={case.k} of E={case.experts} experts")
        return case

    def __str__(self) -> str:
        return f"T={self.tokens} D={self.width} F={self.hidden} E={self.experts} K={self.k}"

    def least_seconds(self, peak: float, bandwidth: float, size: int) -> float:
        """The roofline of a forward and backward pass, in seconds.

        The larger one of two times: for all matmuls at the peak, and for moving every byte once.
        A backward pass counts twice the forward pass: it reads the weights again and writes their
        gradients.

        Args:
            peak: FLOP/s of a matmul.
            bandwidth: bytes per second of a copy.
            size: bytes of a number.
        """
        rows, weights = self.tokens * self.k, 3 * self.experts * self.width * self.hidden
        flops = 2 * rows * 3 * self.width * self.hidden
        bytes_moved = size * (weights + 2 * rows * self.width)
        return 3 * max(flops / peak, bytes_moved / bandwidth)


class Calls(NamedTuple):
    """Functions without arguments that are timed, and the peak bytes of the second.

    bytes: None where they are unknown.
    """

    forward: Callable
    forward_backward: Callable
    bytes: int | None = None


class Timing(NamedTuple):
    """The time of a pair's second call, alone and over that of the first.

    Attributes:
        seconds: median over the rounds.
        ratio: the second's time over the first's, median over the rounds.
        fastest: the same ratio of the fastest calls of each.
    """

    seconds: float
    ratio: float
    fastest: float


CASES = (
    Case(4096, 256, 1024, 16, 2),
    Case(4096, 256, 512, 64, 4),
    Case(8192, 512, 2048, 8, 2),
    Case(8192, 512, 1024, 128, 1),
)
# Nothing is dropped: slots as round robin fills them, or rows without slots.
VARIANTS: dict[str, tuple[tuple[str, Dispatcher, Capacity], ...]] = {
    "balanced": (
        ("SlotGather", SlotGather(), Capacity(1.0)),
        ("Sorted", Sorted(), Capacity(None)),
    ),
    "zipf": (("Sorted", Sorted(), Capacity(None)),),
}


def variants(routing: str) -> tuple[tuple[str, Dispatcher, Capacity], ...]:
    """Name, dispatcher and capacity of each variant of the layer that is timed with a routing.

    On an accelerator with tokamax, its kernels are one of them.
    """
    if jax.default_backend() == "cpu" or not importlib.util.find_spec("tokamax"):
        return VARIANTS[routing]
    return *VARIANTS[routing], ("Sorted tokamax", Sorted("tokamax"), Capacity(None))


ROUTERS: dict[str, Callable[..., Router]] = {"balanced": Balanced, "zipf": Zipf}


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 256 MiB: the median of repeated runs."""
    copy = jax.jit(lambda x: x + 1)
    x = jnp.zeros(64 * 2**20, jnp.float32)
    return 2 * x.nbytes / (1e-3 * median_ms(copy, x))


def layers(
    cases: tuple[Case, ...], dtype: str = "float32", say: Say = lambda line: None
) -> Iterator[dict]:
    """A row of results for each case, routing and dispatcher; one with "error" where it fails.

    Each variant takes turns with the dense layer on K*T tokens. memory_ratio in a row: peak bytes
    of forward and backward, by the compiler, over those of the dense layer with E times its
    weights and their gradients.

    Args:
        cases: sizes of the layers.
        dtype: of inputs and weights.
        say: prints what is under way.
    """
    say("measuring the peaks of matmul and copy")
    # The best of several, since a slow moment of the machine hides its peak.
    peak = max(hardware.matmul_peak(dtype) for _ in range(5))
    bandwidth = max(copy_bandwidth() for _ in range(5))
    for number, case in enumerate(cases, start=1):

        def of_case(what, where=f"case {number} of {len(cases)} ({case})"):
            say(f"{where}: {what}")

        yield from _rows(case, peak, bandwidth, dtype, of_case)


def _rows(case: Case, peak: float, bandwidth: float, dtype: str, say: Say) -> Iterator[dict]:
    say("compiling")
    random = np.random.default_rng(0)
    x_TD = random.standard_normal((case.tokens, case.width)).astype(dtype)
    dense = _dense(case, x_TD)
    # The dense layer holds its weights and their gradients once, the sparse one E times.
    weights = 2 * 3 * case.width * case.hidden * x_TD.dtype.itemsize
    room = (dense.bytes or 0) + (case.experts - 1) * weights
    least = case.least_seconds(peak, bandwidth, x_TD.dtype.itemsize)
    with ExitStack() as stack:
        programs = []
        for routing, name, make in _programs(case, x_TD):
            row = {"case": str(case), "routing": routing, "dispatcher": name}
            try:
                calls = stack.enter_context(make())
                settle(calls[:2])
            except Exception as error:  # the others are measured all the same
                yield row | {"error": f"{type(error).__name__}: {first_line(error)}"[:300]}
            else:
                programs.append((row, calls))
        pairs = [pair for _, calls in programs for pair in zip(dense[:2], calls[:2], strict=True)]
        timings = iter(paired(pairs, say) if pairs else ())
    for row, calls in programs:
        forward, both = next(timings), next(timings)
        yield (
            row
            | {
                "milliseconds_forward": round(1e3 * forward.seconds, 3),
                "milliseconds_step": round(1e3 * both.seconds, 3),
                "ratio_to_dense_forward": round(forward.ratio, 4),
                "ratio_to_dense_step": round(both.ratio, 4),
                "fastest_to_dense_forward": round(forward.fastest, 4),
                "fastest_to_dense_step": round(both.fastest, 4),
                "roofline_fraction": round(least / both.seconds, 4),
            }
            | ({} if calls.bytes is None else {"memory_ratio": round(calls.bytes / room, 4)})
        )


def _programs(
    case: Case, x_TD: np.ndarray
) -> Iterator[tuple[str, str, Callable[[], AbstractContextManager]]]:
    """Routing and name of each variant, with what makes a context manager of its `Calls`."""
    for routing in VARIANTS:
        make = functools.partial(ROUTERS[routing], k=case.k)
        for name, dispatcher, capacity in variants(routing):
            arguments = (case, x_TD, make, dispatcher, capacity)
            yield routing, name, functools.partial(_as_context, *arguments)
    has_torch = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    on_cpu = x_TD.dtype == np.float32 and jax.default_backend() == "cpu"
    if has_torch and on_cpu and case.experts <= 64:  # with more experts it takes 16 s
        from moe.bench import torch_block

        for name in torch_block.VARIANTS:
            yield "balanced", name, functools.partial(torch_block.mixtral, case, x_TD, name)


def _as_context(*arguments) -> AbstractContextManager:
    """A context manager of `_sparse(*arguments)`, which needs no closing."""
    return nullcontext(_sparse(*arguments))


def paired(pairs: list[tuple[Callable, Callable]], say: Say = lambda line: None) -> list[Timing]:
    """The time of each pair's second call beside its first, over several rounds.

    In each round a pair's calls alternate twice, and only the second time counts: in the first,
    they allocate the memory that they then keep. A slow moment of the machine slows both calls of a
    pair, and a slow minute few rounds of all pairs.
    """
    for pair in pairs:
        settle(pair)
    turns = []
    for number in range(1, ROUNDS + 1):
        say(f"timing {len(pairs)} pairs, round {number} of {ROUNDS}")
        turns.append([[timed(call) for call in 2 * pair][2:] for pair in pairs])
    times = np.array(turns)  # rounds, pairs, 2
    ratios = np.median(times[:, :, 1] / times[:, :, 0], axis=0)
    fastest = times.min(axis=0)
    columns = (np.median(times[:, :, 1], axis=0), ratios, fastest[:, 1] / fastest[:, 0])
    return [Timing(*row) for row in np.stack(columns, axis=1).tolist()]


def settle(calls: Iterable[Callable]) -> None:
    """Make the calls until they need no new memory pages, `MOST_CALLS` times at most."""
    for _ in range(MOST_CALLS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for call in calls:
            timed(call)
        if resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1_000:  # pages
            return


def _dense(case: Case, x_TD: np.ndarray) -> Calls:
    """The calls of one feed-forward on K * T tokens."""
    graph, params, state = functional.split(initialize(FeedForward(case.width, case.hidden), 0))
    x_ND = jnp.asarray(np.tile(x_TD, (case.k, 1)))

    def total(params, x_ND):
        return jnp.sum(graph.merge(params, state)(x_ND) * x_ND)

    return _calls(total, params, x_ND)


def _sparse(case: Case, x_TD, make: Callable[[Sizes], Router], dispatcher, capacity) -> Calls:
    """The calls of an MoE layer on T tokens."""
    settings = {"capacity": capacity, "dispatcher": dispatcher}
    layer = MoELayer(case.width, VOCABULARY, make, case.experts, case.hidden, **settings)
    graph, params, state = functional.split(initialize(layer, 0))
    tokens = batch(case.tokens)

    def total(params, x_BTD):
        return jnp.sum(graph.merge(params, state)(x_BTD, tokens)[0] * x_BTD)

    return _calls(total, params, jnp.asarray(x_TD)[None])


def _calls(total, *args) -> Calls:
    """The compiled calls of a scalar function, and of its gradients by its first two arguments."""
    functions = (total, jax.grad(total, (0, 1)))
    forward, both = (jax.jit(function).lower(*args).compile() for function in functions)
    memory = both.memory_analysis()
    if memory is None:  # unknown on some platforms
        held = None
    else:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        held += memory.temp_size_in_bytes
    return Calls(functools.partial(forward, *args), functools.partial(both, *args), held)


def summary(rows: list[dict]) -> dict[str, float]:
    """Geometric means over the cases, by medians and by the fastest calls.

    One kind is the time of our fastest dispatcher over the dense layer's. The other, where
    transformers' block was timed, is the time of its fastest variant over that of ours.
    """
    rows = [row for row in rows if "error" not in row]
    theirs = [row for row in rows if row["dispatcher"].startswith("transformers")]
    kept = [row for row in theirs if row["dispatcher"].endswith("kept")]
    others = {
        "transformers": [row for row in theirs if row not in kept],
        "transformers with memory kept": kept,
    }
    ours: dict[str, list[dict]] = {}
    for row in rows:
        if row not in theirs:
            ours.setdefault(row["routing"], []).append(row)
    found = {}
    for kind, note in (("ratio", ""), ("fastest", ", fastest calls")):
        for what in ("forward", "step"):
            name = f"{kind}_to_dense_{what}"
            best = {routing: _best(own, name) for routing, own in ours.items()}
            for routing, cases in best.items():
                mean = statistics.geometric_mean(cases.values())
                found[f"best dispatcher, {routing}, {what}, times dense{note}"] = mean
            for who, other in others.items():
                own = best.get("balanced", {})
                times = [v / own[case] for case, v in _best(other, name).items() if case in own]
                if times:
                    mean = statistics.geometric_mean(times)
                    found[f"{who}, {what}, times ours{note}"] = mean
    return found


def _best(rows: list[dict], name: str) -> dict[str, float]:
    """The smallest value of that name in the rows of each case."""
    return {
        case: min(row[name] for row in rows if row["case"] == case)
        for case in dict.fromkeys(row["case"] for row in rows)
    }
