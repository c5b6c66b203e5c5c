"""What a config needs on a TPU slice: bytes by their kind, and the real compiler's answer."""

from collections.abc import Iterator
import math
import re
import time
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np

from moe import assemble
from moe.batch import Batch
from moe.chips import Topology
from moe.errors import UserError
from moe.model import Transformer
from moe.objective import NextToken
from moe.optimizer import AdamW
from moe.sharding import MESH_AXES, MeshShape
from moe.step import Program

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    "collective-permute",
)
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1, "f64": 8}


def plan(topology: Topology, vocab_size: int, say) -> Iterator[dict[str, Any]]:
    """What is known so far, first without the compiler, then with it; reads gin's `train`.

    Raises:
        UserError: a config that can't be, on this slice.
    """
    settings = gin.get_bindings("train")
    size = {"batch_size": settings.get("batch_size", 32)}
    length = settings.get("sequence_length", 256)
    model = assemble.assemble(
        settings.get("model") or Transformer,
        settings.get("objective") or NextToken(),
        token_vocabulary=vocab_size,
        sequence_length=length,
        training_tokens=np.arange(2) % vocab_size,
        **size,
    )
    devices, reason = tpu_devices(topology)
    try:
        mesh = (settings.get("mesh") or MeshShape()).build(devices)
    except ValueError as error:
        raise UserError(str(error)) from error
    program = assemble.program(
        model,
        settings.get("optimizer") or AdamW(),
        mesh,
        steps=settings.get("steps", 1000),
        seed=0,
        accumulate=settings.get("accumulate", 1),
        **size,
    )
    tokens = size["batch_size"] * length
    found = {
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": {axis: mesh.shape[axis] for axis in MESH_AXES},
        "parameters_total": model.costs.parameters_total,
        "parameters_active": model.costs.parameters_active,
        "tokens_per_step": tokens,
        "flops_per_step": tokens * model.costs.flops_per_token,
        "bytes_per_chip": bytes_per_chip(program),
        "memory_per_chip": topology.chip.memory,
        "compiled": None,
        "reason": reason,
    }
    ideal = found["flops_per_step"] / (topology.chips * topology.chip.flops)
    found["seconds_of_products_at_peak"] = ideal
    yield found
    if reason is None:
        say("compiling the training step for this slice")
        yield found | {"compiled": compiled(program, mesh, batch_of(program, size, length))}


def tpu_devices(topology: Topology) -> tuple[list, str | None]:
    """The slice's devices for the compiler, or stand-ins and why there is no compiler."""
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except Exception as error:  # whatever a missing or refusing libtpu makes JAX raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [jax.devices()[0]] * topology.chips, first
    return list(described.devices), None


def bytes_per_chip(program: Program) -> dict[str, int]:
    """Of the state that a step reads and writes, by kind, on the fullest chip."""
    state = program.abstract_state

    def held(tree) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    return {
        "parameters": held(state.params),
        "optimizer": held(state.opt_state),
        "router_state": held(state.router_state),
    }


def batch_of(program: Program, size: dict[str, int], length: int) -> Batch:
    """The shapes of a batch."""
    shape, rows = (size["batch_size"], length), (size["batch_size"],)

    def of(shape, dtype=jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=program.batch_sharding)

    return Batch(
        token_BT=of(shape),
        target_BT=of(shape),
        segment_BT=of(shape),
        position_BT=of(shape),
        scored_BT=of(shape, jnp.bool_),
        index_B=of(rows),
    )


def compiled(program: Program, mesh, batch: Batch) -> dict[str, Any]:
    """What the compiler says of the whole training step: bytes per chip, and collectives.

    A program that doesn't fit is refused: its message is the answer.
    """
    started = time.monotonic()
    try:
        executable = program.step.lower(program.abstract_state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "refused": str(error).strip().splitlines()[0]}
    memory = executable.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    code = memory.generated_code_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "fits": True,
        "seconds": time.monotonic() - started,
        "arguments": arguments,
        "temporaries": temporaries,
        "total": arguments + temporaries + code + new,
        "collectives": collectives(executable.as_text(), tuple(mesh.devices.shape)),
    }


def collectives(text: str, mesh_sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """By kind and mesh axes: how often they stand in the program, and the bytes of their results.

    What stands in a loop over layers or micro-batches counts once.
    """
    found: dict[tuple[str, str], list[int]] = {}
    pattern = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\((.*)")
    for line in text.splitlines():
        if match := pattern.search(line):
            shapes, kind, rest = match.groups()
            where = found.setdefault((kind, axes_of(rest, mesh_sizes)), [0, 0])
            where[0] += 1
            where[1] += result_bytes(shapes)
    return [
        {"kind": kind, "axes": axes, "count": count, "bytes": size}
        for (kind, axes), (count, size) in sorted(found.items())
    ]


def result_bytes(shapes: str) -> int:
    """Of the largest array among a result's, such as (f32[8,16]{1,0}, f32[64,16]{1,0})."""
    sizes = [
        BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    ]
    return max(sizes, default=0)


def axes_of(attributes: str, mesh_sizes: tuple[int, ...]) -> str:
    """The mesh axes over which the devices of the first group differ, such as "fsdp+expert"."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if listed:
        group = [int(n) for n in listed[1].split(",")]
    elif iota:
        shape, dims = ([int(n) for n in part.split(",")] for part in iota.groups()[:2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose([int(n) for n in iota[3].split(",")]) if iota[3] else ids
        group = ids.reshape(shape)[0].tolist()
    elif pairs:
        group = [int(n) for n in pairs.groups()]
    else:  # no groups are one of all devices
        group = list(range(math.prod(mesh_sizes)))
    places = np.stack(np.unravel_index(group, mesh_sizes))
    names = [axis for axis, row in zip(MESH_AXES, places, strict=True) if len(set(row)) > 1]
    return "+".join(names) or "none"
