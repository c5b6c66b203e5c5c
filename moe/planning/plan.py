"""What a config needs on a TPU slice: bytes by their kind, and the real compiler's answer."""

from collections.abc import Iterator
import dataclasses
import math
import time
from typing import Any

import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from moe.data.batch import Batch
from moe.errors import UserError
from moe.model.sharding import MESH_AXES
from moe.planning import hlo, memory
from moe.planning.chips import Topology
from moe.planning.report import of_state
from moe.training.abstract_model import AbstractModel, Vocabulary
from moe.training.run_spec import RunSpec
from moe.training.train_step import Program


@dataclasses.dataclass(frozen=True)
class Built:
    """A config's training step for a slice, not compiled; `reason` says why it can't be."""

    model: AbstractModel
    program: Program
    mesh: Mesh
    batch: Batch
    tokens: int
    accumulate: int
    reason: str | None


def plan(topology: Topology, vocab_size: int, tries: int, say) -> Iterator[dict[str, Any]]:
    """What is known so far, first without the compiler, then with it; reads gin's `train`.

    Where the step does not fit, `changes` that may fit by counting are compiled, at most so many
    `tries`; `change` is the first with which it does.

    Raises:
        UserError: a config that can't be, on this slice.
    """
    built = build(topology, vocab_size)
    costs = built.model.costs
    found = {
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": {axis: built.mesh.shape[axis] for axis in MESH_AXES},
        "parameters_total": costs.parameters_total,
        "parameters_active": costs.parameters_active,
        "tokens_per_step": built.tokens,
        "flops_per_step": built.tokens * costs.flops_per_token,
        "bytes_per_chip": counted(built),
        "memory_per_chip": topology.memory,
        "compiled": None,
        "reason": built.reason,
    }
    ideal = found["flops_per_step"] / (topology.chips * topology.chip.flops)
    found["seconds_of_products_at_peak"] = ideal
    yield found
    if built.reason is not None:
        return
    say("compiling the training step for this slice")
    found["compiled"] = compiled(built)
    if found["compiled"]["fits"]:
        yield found | {"roofline": roofline(found, topology)}
        return
    yield found
    if of_state(found["bytes_per_chip"]) > topology.memory:
        return  # no batch is small enough
    tried = untried = 0
    for change in changes():
        with gin.unlock_config():
            gin.parse_config(list(change))
        try:
            changed = build(topology, vocab_size)
        except UserError:  # a batch that doesn't divide so far
            continue
        # Counting is within a tenth of the compiler: what is far too much is not compiled.
        if (held := counted(changed)).get("total", 0) > 1.1 * topology.memory:
            continue
        if tried == tries:
            untried += 1
            continue
        tried += 1
        say(f"it does not fit; compiling with {', '.join(change)} (try {tried} of {tries} at most)")
        found["compiled"] = compiled(changed)
        if found["compiled"]["fits"]:
            found |= {"change": list(change), "bytes_per_chip": held}
            yield found | {"roofline": roofline(found, topology)}
            return
    yield found | {"tries": tried, "untried": untried}


def build(topology: Topology, vocab_size: int) -> Built:
    """The step that gin's `train` stands for; UserError for one that can't be."""
    spec = RunSpec(data=None)
    devices, reason = tpu_devices(topology)
    mesh = spec.build_mesh(devices)
    tokens = np.arange(2) % vocab_size
    model, program = spec.build(Vocabulary(vocab_size), mesh, training_tokens=tokens)
    batch = batch_of(program, *spec.shape)
    return Built(model, program, mesh, batch, math.prod(spec.shape), spec.accumulate, reason)


def counted(built: Built) -> dict[str, int]:
    """Bytes of a step by kind, on one device."""
    sequences = len(built.batch.index_B) // built.accumulate
    return memory.step_bytes(built.model, built.program, sequences, built.accumulate)


def changes() -> Iterator[tuple[str, ...]]:
    """Settings that need less memory, what costs least time first."""
    often = gin.get_bindings("train").get("accumulate", 1)
    more = [f"train.accumulate = {often * n}" for n in (2, 4, 8)]
    yield from ((line,) for line in more)
    if gin.get_bindings("Transformer").get("remat", "none") != "full":
        full = "Transformer.remat = 'full'"
        yield from ((line, full) for line in (f"train.accumulate = {often}", *more))


def roofline(found: dict[str, Any], topology: Topology) -> dict[str, float]:
    """Seconds of a step by what one chip can do, and the utilisation that they allow.

    products: the model's own, without what is recomputed. memory: at least this, everything that
    is kept written and read once. interconnect: all links of a chip at their speed at once.
    """
    chip, compiled = topology.chip, found["compiled"]
    products = found["seconds_of_products_at_peak"]
    touched = 2 * (compiled["arguments"] + compiled["temporaries"])
    memory = touched / topology.share(chip.memory_bandwidth)
    sent = sum(row["moved"] for row in compiled["collectives"])
    interconnect = sent / topology.share(chip.interconnect)
    parts = {"products": products, "memory": memory, "interconnect": interconnect}
    return parts | {
        "utilisation_if_all_overlaps": products / max(parts.values()),
        "utilisation_if_nothing_overlaps": products / sum(parts.values()),
    }


def tpu_devices(topology: Topology) -> tuple[list, str | None]:
    """The slice's devices for the compiler, or stand-ins and why there is no compiler."""
    from jax.experimental import topologies

    try:
        more = {} if topology.slices == 1 else {"num_slices": topology.slices}
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.slice_name, **more
        )
    except Exception as error:  # whatever a missing or refusing libtpu makes JAX raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [jax.devices()[0]] * topology.devices, first
    return list(described.devices), None


def batch_of(program: Program, batch_size: int, length: int) -> Batch:
    """The shapes of a batch."""
    shape, rows = (batch_size, length), (batch_size,)

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


def compiled(built: Built) -> dict[str, Any]:
    """What the compiler says of the whole training step: bytes per chip, and collectives.

    A program that doesn't fit is refused: its message is the answer.
    """
    started = time.monotonic()
    program, sizes = built.program, tuple(built.mesh.devices.shape)
    try:
        executable = program.step.lower(program.abstract_state, built.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "refused": str(error).strip().splitlines()[0]}
    analysis = executable.memory_analysis()
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    code = analysis.generated_code_size_in_bytes
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    whole = arguments + temporaries + code + new
    text = executable.as_text()
    return {
        "fits": True,
        "seconds": time.monotonic() - started,
        "arguments": arguments,
        "temporaries": temporaries,
        # The most at any one time: temporaries reuse arguments that are read no more.
        "total": analysis.peak_memory_in_bytes or whole,
        "collectives": hlo.by_kind(hlo.collectives(text, MESH_AXES, sizes)),
        "exchanges": [
            {
                "name": exchange.name,
                "products_beside": len(exchange.products),
                "of_shared_experts": sum("shared_experts" in name for name in exchange.products),
            }
            for exchange in hlo.exchanges(text)
        ],
    }
