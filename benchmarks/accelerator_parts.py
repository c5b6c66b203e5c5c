"""The parts of benchmarks/accelerator.py; each is run as a program of its own.

    python benchmarks/accelerator_parts.py PART PATH [--small]

N rows, E experts, D width, F hidden width. Rows are appended to PATH as JSON lines.
"""

from collections import Counter
from collections.abc import Callable, Iterator
import dataclasses
import functools
import glob
import importlib.util
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time

PACKAGES = ("flax", "optax", "gin", "grain", "tensorboardX", "torch", "transformers", "tokamax")
SHAPES = {"olmoe": (65536, 64, 2048, 1024), "mixtral": (16384, 8, 4096, 14336)}
LAYERS = {"olmoe": "8192,2048,1024,64,8", "mixtral": "8192,4096,14336,8,2"}
STEPS = 8
# As in the rows of torch.
PRECISIONS = {"float32": "float32 parameters, bfloat16 matmuls", "bfloat16": "bfloat16"}


def machine(small: bool) -> Iterator[dict]:
    """The device, versions, packages that are missing, and the peak of a matmul."""
    import jax

    from moe.machine import hardware

    kind = jax.devices()[0].device_kind
    yield {
        "device": hardware.describe_device(),
        "kind": kind,
        "jax": jax.__version__,
        "missing": [name for name in PACKAGES if importlib.util.find_spec(name) is None],
        "matmul_peak_flops": hardware.matmul_peak(precision(small)),
    }


def precision(small: bool) -> str:
    """What matmuls are timed in: many CPUs are slow in bfloat16."""
    return "float32" if small else "bfloat16"


def tests(small: bool) -> Iterator[dict]:
    """The accelerator part of the suite; its references are computed on the CPU."""
    if small:  # it would skip all of them
        return
    import jax

    platform = jax.devices()[0].platform
    chosen = "cuda" if platform == "gpu" else platform
    words = [sys.executable, "-m", "pytest", "-m", "accelerator", "tests/test_accelerator.py"]
    done = subprocess.run(
        words,
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        # The suite's own flags are for CPUs; the device's memory is this process's too.
        env=os.environ
        | {"XLA_FLAGS": " ", "JAX_PLATFORMS": f"{chosen},cpu"}
        | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    lines = done.stdout.strip().splitlines()
    yield {"status": done.returncode, "summary": lines[-1] if lines else done.stderr[-300:]}
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield {"what": line[:300]}


def matmuls(small: bool, shape: str) -> Iterator[dict]:
    """A feed-forward of experts by each way of multiplying: TFLOP/s of useful work."""
    import jax
    import jax.numpy as jnp

    from layers.kernels import grouped_matmul

    N, E, D, F = (256, 4, 32, 64) if small else SHAPES[shape]
    keys = jax.random.split(jax.random.key(0), 4)
    x_ND, *weights = (
        jax.random.normal(key, size, jnp.bfloat16) * size[-2] ** -0.5
        for key, size in zip(keys, ((N, D), (E, D, F), (E, D, F), (E, F, D)), strict=True)
    )
    flops = 6 * N * D * F

    def gated(up, gate):
        return up * jax.nn.silu(gate)

    def dense(x_ND, up_EDF, gate_EDF, down_EFD, count_E):
        return gated(x_ND @ up_EDF[0], x_ND @ gate_EDF[0]) @ down_EFD[0]

    def batched(x_ND, up_EDF, gate_EDF, down_EFD, count_E):
        x_ESD = x_ND.reshape(E, N // E, D)
        hidden_ESF = gated(*(jnp.einsum("esd,edf->esf", x_ESD, w) for w in (up_EDF, gate_EDF)))
        return jnp.einsum("esf,efd->esd", hidden_ESF, down_EFD).reshape(N, D)

    def grouped(x_ND, up_EDF, gate_EDF, down_EFD, count_E, kernel):
        arguments = (jnp.ones(len(x_ND)), (up_EDF, gate_EDF), down_EFD, count_E, gated, kernel)
        return grouped_matmul.grouped_feed_forward(x_ND, *arguments)

    ways: dict[str, Callable] = {"dense": dense, "batched": batched}
    has_tokamax = importlib.util.find_spec("tokamax")
    for kernel in grouped_matmul.KERNELS:
        # Loops are for CPUs.
        if kernel not in ("auto", "loop") and (kernel != "tokamax" or has_tokamax):
            ways[kernel] = functools.partial(grouped, kernel=kernel)
    loads = {"balanced": even(N, E), "zipf": zipf(N, E)}
    for name, way in ways.items():
        for load, count_E in loads.items():
            if load == "zipf" and name in ("dense", "batched"):
                continue

            def total(x_ND, weights, count_E, way=way):
                return jnp.sum(way(x_ND, *weights, count_E).astype(jnp.float32) ** 2)

            def one(way=way, count_E=count_E, total=total):
                forward, step = way, jax.grad(total, (0, 1))
                seconds = timed(forward, x_ND, *weights, count_E)
                both = timed(step, x_ND, tuple(weights), count_E)
                return {
                    "tflops_forward": flops / seconds / 1e12,
                    "tflops_step": 3 * flops / both / 1e12,
                }

            yield attempt({"case": shape, "what": name, "load": load}, one)


def even(rows: int, experts: int):
    import jax.numpy as jnp

    return jnp.full(experts, rows // experts, jnp.int32)


def zipf(rows: int, experts: int):
    """Rows of each expert, in proportion to 1, 1/2, 1/3, ..."""
    import numpy as np

    share = 1 / np.arange(1, experts + 1)
    count = np.floor(rows * share / share.sum()).astype(np.int32)
    count[0] += rows - count.sum()
    return count


def layers(small: bool, shape: str) -> Iterator[dict]:
    """`moe bench layer` in bfloat16: each dispatcher, balanced and with Zipf's load."""
    from moe.bench import layer

    case = layer.Case.read("256,32,64,4,2" if small else LAYERS[shape])
    yield from layer.layers((case,), precision(small))


def attention(small: bool) -> Iterator[dict]:
    """Forward and backward of each kernel that runs here, in sequences of two lengths."""
    import jax
    import jax.numpy as jnp

    from layers.kernels.attention import KERNELS, Pattern, attend, choose

    heads, width = (2, 16) if small else (16, 128)
    for batch, length in ((2, 128), (1, 256)) if small else ((8, 2048), (1, 16384)):
        shape = jax.ShapeDtypeStruct((batch, length, heads, width), jnp.bfloat16)
        x_BTHK = jax.random.normal(jax.random.key(0), shape.shape, shape.dtype)
        place_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
        segment_BT = 1 + place_BT // (length // 3)
        auto = choose("auto", Pattern(), shape)
        for kernel in KERNELS[1:]:

            def one(kernel=kernel, x_BTHK=x_BTHK, place_BT=place_BT, segment_BT=segment_BT):
                choose(kernel, Pattern(), x_BTHK)

                def total(query, key, value):
                    y = attend(query, key, value, place_BT, segment_BT, Pattern(), kernel, 1024)
                    return jnp.sum(y.astype(jnp.float32) ** 2)

                step = jax.jit(jax.grad(total, (0, 1, 2))).lower(*3 * [x_BTHK]).compile()
                memory = step.memory_analysis()
                seconds = timed(step, *3 * [x_BTHK], jitted=True)
                return {"milliseconds": 1e3 * seconds, "temporaries": memory.temp_size_in_bytes}

            row = {"batch": batch, "length": length, "kernel": kernel}
            yield attempt(row | {"chosen": kernel == auto.kernel, "reason": auto.reason}, one)


def olmoe_spec(dispatcher: str, small: bool):
    """A run of OLMoE's shape with few layers, without text; and V."""
    from layers.dispatch import SlotGather, Sorted
    from layers.moe_layer import MoELayer
    from moe.model.transformer import Transformer
    from moe.training.run_spec import RunSpec
    from routing import Capacity, TopK

    width, depth, experts, hidden = (64, 2, 8, 64) if small else (2048, 4, 64, 1024)
    vocab, batch, length = (256, 4, 64) if small else (50304, 8, 2048)
    chosen = {"Sorted": (Sorted(), None), "SlotGather": (SlotGather(), 1.25)}[dispatcher]
    moe = functools.partial(
        MoELayer,
        router=functools.partial(TopK, k=2 if small else 8),
        num_experts=experts,
        d_ff=hidden,
        capacity=Capacity(chosen[1]),
        dispatcher=chosen[0],
    )
    make = functools.partial(
        Transformer,
        d_model=width,
        num_layers=depth,
        moe=moe,
        compute_dtype="bfloat16",
        tie_embeddings=False,
    )
    return RunSpec(None, make, steps=100, batch_size=batch, sequence_length=length), vocab


def compiled_step(dispatcher: str, small: bool, half: bool = False):
    """A training step of OLMoE's shape: a function, its state, batch, and facts.

    half: parameters and moments in bfloat16.
    """
    import jax
    import numpy as np

    from moe.data.batches import train_batch
    from moe.training.abstract_model import Vocabulary
    from moe.training.precision import Precision
    from moe.training.train_step import to_devices

    spec, vocab = olmoe_spec(dispatcher, small)
    if half:
        spec = dataclasses.replace(spec, precision=Precision("bfloat16", "bfloat16"))
    batch, length = spec.shape
    model, program = spec.build(Vocabulary(vocab), spec.build_mesh(jax.devices()[:1]))
    window_BW = np.random.default_rng(0).integers(0, vocab, (batch, length + 1), np.int32)
    rows = train_batch(window_BW, np.arange(batch, dtype=np.int32))
    rows = to_devices(rows, program.batch_sharding, batch)
    started = time.perf_counter()
    executable = program.step.lower(program.abstract_state, rows).compile()
    compiling = time.perf_counter() - started
    given = program.step.given
    state = program.init(0)
    flops = model.costs.flops_per_token * batch * length
    facts = {
        "flops": flops,
        "tokens": batch * length,
        "parameters": model.costs.parameters_total,
        "temporaries": executable.memory_analysis().temp_size_in_bytes,
        "compile_seconds": compiling,
    }
    return functools.partial(executable, given), state, rows, facts


def step(small: bool, dispatcher: str, kept: str = "float32") -> Iterator[dict]:
    """Seconds of whole steps with AdamW, and the peak of memory.

    kept: the type of parameters and moments, "float32" or "bfloat16".
    """
    import jax

    from moe.machine import hardware

    run, state, rows, facts = compiled_step(dispatcher, small, kept == "bfloat16")
    seconds = []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        state, measured = run(state, rows)
        jax.block_until_ready((state.params, measured.loss))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    yield (
        {"what": dispatcher}
        | {"precision": PRECISIONS[kept]}
        | facts
        | {
            "milliseconds": 1e3 * median,
            "tflops": facts["flops"] / median / 1e12,
            "tokens_per_second": facts["tokens"] / median,
            "peak_bytes": hardware.peak_memory_bytes(),
        }
    )


def profile(small: bool) -> Iterator[dict]:
    """The twenty kernels that take the most device time in a step with Sorted."""
    import jax

    run, state, rows, _ = compiled_step("Sorted", small)
    state, measured = run(state, rows)
    jax.block_until_ready(measured.loss)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                state, measured = run(state, rows)
            jax.block_until_ready((state.params, measured.loss))
        total, kernels = by_kernel(folder)
    for name, nanoseconds in kernels.most_common(20):
        share = nanoseconds / max(total, 1)
        yield {"kernel": name, "milliseconds": nanoseconds / 3e6, "share": round(share, 4)}


def by_kernel(folder: str) -> tuple[float, Counter]:
    """Nanoseconds of all kernels in a trace, and of each by name."""
    from jax.profiler import ProfileData

    found: Counter = Counter()
    for path in glob.glob(folder + "/**/*.xplane.pb", recursive=True):
        planes = list(ProfileData.from_file(path).planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        for plane in devices or planes:
            for line in plane.lines:
                # A device has lines of whole steps and modules, too; a CPU's are those of threads.
                wanted = (
                    ("Stream" in line.name or line.name == "XLA Ops")
                    if devices
                    else (line.name.startswith("tf_XLA"))
                )
                for event in line.events if wanted else ():
                    if devices or ":" not in event.name:  # not of the thread pool
                        found[event.name[:80]] += event.duration_ns
    return sum(found.values()), found


def torch(small: bool, mode: str) -> Iterator[dict]:
    """transformers' OLMoE, in our precision and with all of it in bfloat16."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        yield {"what": mode, "skipped": f"{' and '.join(missing)} not installed"}
        return
    import torch_step

    for dtypes in PRECISIONS.values():
        row = {"what": f"transformers {mode}", "precision": dtypes}
        yield attempt(row, functools.partial(torch_step.measure, mode, dtypes, STEPS, small))


def attempt(row: dict, measure: Callable[[], dict]) -> dict:
    """The row with what was measured, or with the error that ended it."""
    try:
        return row | measure()
    except Exception as error:  # one way's failure is its own row
        first = (str(error).strip().splitlines() or [""])[0]
        return row | {"error": f"{type(error).__name__}: {first}"[:300]}


def timed(function: Callable, *arguments, jitted: bool = False, calls: int = 7) -> float:
    """Median seconds of a call, after two that compile and warm up."""
    import jax

    run = function if jitted else jax.jit(function)
    seconds = []
    for _ in range(calls + 2):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main(part: str, path: str, *flags: str) -> None:
    name, *rest = part.split()
    if "--small" in flags:  # most of a laptop's time would be compiling
        from moe.machine import xla_flags

        xla_flags.prepare(devices=1)
    elif name != "tests":  # whose own process needs the memory that this one leaves
        from moe.machine import accelerator

        accelerator.prepare()
    with open(path, "a", encoding="utf-8") as file:
        for row in PARTS[name]("--small" in flags, *rest):
            numbers = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            line = json.dumps({"part": part} | numbers)
            file.write(line + "\n")
            file.flush()
            print(line, flush=True)


PARTS = {f.__name__: f for f in (machine, tests, matmuls, layers, attention, step, profile, torch)}

if __name__ == "__main__":
    main(*sys.argv[1:])
