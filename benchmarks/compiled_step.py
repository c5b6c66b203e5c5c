"""A training step of OLMoE's shape with four layers, by an H100's compiler, without one.

python benchmarks/compiled_step.py [--json=PATH] [--text=PATH] NAME=VALUE ..., settings of
`Transformer`, `AdamW` and `train` such as Transformer.remat=full; with the extra plan-cuda on
JAX 0.11 or later. Prints GiB of the state and of temporaries beside it, and how often the program
names our kernels and cuDNN's attention. It says nothing about speed.
"""

import argparse
import ast
import dataclasses
import functools
import json
import os
from pathlib import Path
import re
import time

from moe.planning import wheels

os.environ |= wheels.environment(gpu=True)


from layers.logical_axes import sharding_rules
from moe.planning import compilers
from moe.planning.chips import Topology
from moe.planning.plan import batch_of
from moe.training.abstract_model import Vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="the file to which a line is added")
    parser.add_argument("--text", type=Path, help="the file to write the compiled program to")
    parser.add_argument("--dispatcher", default="Sorted")
    parser.add_argument("settings", nargs="*", help="NAME=VALUE")
    flags = parser.parse_args()
    found = measured(flags)
    print(json.dumps(found))
    if flags.json:
        with flags.json.open("a") as file:
            file.write(json.dumps(found) + "\n")


def measured(flags):
    from accelerator_parts import olmoe_spec
    import gin

    given = dict(setting.split("=", 1) for setting in flags.settings)
    of_model = {n: v for n, v in given.items() if n.startswith("Transformer.")}
    gin.parse_config([f"{n} = {v}" for n, v in given.items() if n not in of_model])
    topology = Topology.read("h100:1")
    devices, reason = compilers.described(topology)
    assert reason is None, reason
    spec, vocab = olmoe_spec(flags.dispatcher, small=False)
    changed = {n.partition(".")[2]: ast.literal_eval(v) for n, v in of_model.items()}
    spec = dataclasses.replace(spec, model=functools.partial(spec.model, **changed))
    with compilers.assuming_cudnn(), sharding_rules(None, topology.device):
        model, program = spec.build(Vocabulary(vocab), spec.build_mesh(devices))
        rows = batch_of(program, *spec.shape)
        started = time.perf_counter()
        lowered = program.step.lower(program.abstract_state, rows)
        lowering = time.perf_counter() - started
        executable = lowered.compile()
    compiling = time.perf_counter() - started - lowering
    memory = executable.memory_analysis()
    text = executable.as_text()
    if flags.text:
        flags.text.write_text(text)
    return {
        "dispatcher": flags.dispatcher,
        "settings": flags.settings,
        "state_gib": memory.argument_size_in_bytes / 2**30,
        "temporaries_gib": memory.temp_size_in_bytes / 2**30,
        "peak_gib": getattr(memory, "peak_memory_in_bytes", 0) / 2**30,
        "kernels": len(re.findall(r"mosaic_gpu", text)),
        "fmha": text.count("__cudnn$fmha"),
        "lowering_s": round(lowering, 1),
        "compiling_s": round(compiling, 1),
    }


if __name__ == "__main__":
    main()
