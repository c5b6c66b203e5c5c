"""Times layers beside dense ones, and whole training steps, on one device.

    python benchmarks/accelerator.py --folder=benchmarks/results

Writes DEVICE.json there. Layers are timed as by `moe bench layer` in bfloat16. Training steps have
OLMoE's shape with few layers, and random tokens; there is one for each dispatcher. --small takes
sizes for a laptop's CPU.
"""

import argparse
import functools
import json
from pathlib import Path
import re
import statistics
import time

import jax
import numpy as np

from layers.dispatch import Dispatcher, SlotGather, Sorted
from layers.moe_layer import MoELayer
from moe.bench import layer
from moe.data.batches import train_batch
from moe.machine import hardware
from moe.model.transformer import Transformer
from moe.training.abstract_model import Vocabulary
from moe.training.run_spec import RunSpec
from moe.training.train_step import to_devices
from routing import Capacity, TopK

CASES = ("8192,2048,1024,64,8", "8192,4096,14336,8,2")
SMALL_CASES = ("512,64,128,8,2",)
STEPS = 10


def step_seconds(dispatcher: Dispatcher, capacity: Capacity, *, small: bool) -> dict:
    """Median seconds of a training step, its FLOPs, and the model's number of parameters."""
    width, layers, experts, hidden = (64, 2, 8, 64) if small else (2048, 4, 64, 1024)
    vocab, batch, length = (256, 4, 64) if small else (50304, 8, 2048)
    moe = functools.partial(
        MoELayer,
        router=functools.partial(TopK, k=2 if small else 8),
        num_experts=experts,
        d_ff=hidden,
        capacity=capacity,
        dispatcher=dispatcher,
    )
    make = functools.partial(
        Transformer,
        d_model=width,
        num_layers=layers,
        moe=moe,
        compute_dtype="bfloat16",
        remat="dots_with_batch",
        tie_embeddings=False,
    )
    spec = RunSpec(None, make, steps=100, batch_size=batch, sequence_length=length)
    model, program = spec.build(Vocabulary(vocab), spec.build_mesh(jax.devices()[:1]))
    window_BW = np.random.default_rng(0).integers(0, vocab, (batch, length + 1), np.int32)
    rows = train_batch(window_BW, np.arange(batch, dtype=np.int32))
    rows = to_devices(rows, program.batch_sharding, batch)
    state, seconds = program.init(0), []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        state, measured = program.step(state, rows)
        jax.block_until_ready((state.params, measured.loss))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    flops = model.costs.flops_per_token * batch * length
    return {"seconds": median, "flops": flops, "parameters": model.costs.parameters_total}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    device = hardware.describe_device()
    peak = hardware.matmul_peak("bfloat16")
    record = {"device": device, "jax": jax.__version__, "matmul_peak_flops": peak, "layers": []}
    name = re.sub(r"[^a-z0-9]+", "_", jax.devices()[0].device_kind.lower()).strip("_")
    path = Path(given.folder) / f"{name}.json"

    def save():
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    print(f"{device}: {peak / 1e12:.3g} TFLOP/s in bfloat16 matmuls")
    cases = tuple(map(layer.Case.read, SMALL_CASES if given.small else CASES))
    for row in layer.layers(cases, "bfloat16"):
        print(row, flush=True)
        record["layers"].append(row)
        save()
    record["ratios"] = layer.summary(record["layers"])
    variants = {
        "Sorted": (Sorted(), Capacity(None)),
        "SlotGather": (SlotGather(), Capacity(1.25)),
    }
    for name, (dispatcher, capacity) in variants.items():
        found = step_seconds(dispatcher, capacity, small=given.small)
        found["utilisation"] = found["flops"] / found["seconds"] / peak
        print(f"a step with {name}: {found}", flush=True)
        record.setdefault("steps", {})[name] = found
        save()
    print(f"written to {path}")


if __name__ == "__main__":
    main()
