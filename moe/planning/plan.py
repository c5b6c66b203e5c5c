"""The memory and time that a config needs on TPUs or GPUs: counted, and by their compilers."""

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

from layers.logical_axes import sharding_rules
from moe.data.batch import Batch
from moe.errors import UserError, first_line
from moe.model.sharding import MESH_AXES
from moe.planning import compilers, hlo, links, memory
from moe.planning.chips import Topology
from moe.planning.report import of_state
from moe.training.abstract_model import AbstractModel, Vocabulary
from moe.training.run_spec import RunSpec
from moe.training.train_step import Program


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """A config's training step for a topology, not compiled yet.

    Attributes:
        topology: that it is for.
        batch: shapes of the global batch; tokens: how many it has.
        accumulate: micro-batches of the step.
        reason: why it can't be compiled here; None where it can.
        left_out: what a run would compute beside it, in words; None where nothing.
    """

    topology: Topology
    model: AbstractModel
    program: Program
    mesh: Mesh
    batch: Batch
    tokens: int
    accumulate: int
    reason: str | None
    left_out: str | None


def plan(topology: Topology, vocab_size: int, tries: int, say) -> Iterator[dict[str, Any]]:
    """Findings on the training step of gin's `train`: counted ones, then with the compiler's.

    Each item has all findings so far and replaces the one before it. Where the step does not fit,
    `changes` that may fit by counting are compiled; `change` is the first that does.

    Args:
        topology: TPUs or GPUs.
        vocab_size: of the tokenizer.
        tries: how many changes are compiled at most.
        say: prints what is under way.

    Raises:
        UserError: a config that can't be built for it.
    """
    step = build(topology, vocab_size)
    costs = step.model.costs
    found = {
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": {axis: step.mesh.shape[axis] for axis in MESH_AXES},
        "parameters_total": costs.parameters_total,
        "parameters_active": costs.parameters_active,
        "tokens_per_step": step.tokens,
        "flops_per_step": step.tokens * costs.flops_per_token,
        "bytes_per_chip": counted(step),
        "memory_per_chip": topology.memory,
        "left_out": step.left_out,
        "compiled": None,
        "reason": step.reason,
    }
    ideal = found["flops_per_step"] / (topology.chips * topology.chip.flops)
    found["seconds_of_products_at_peak"] = ideal
    yield found
    if step.reason is not None:
        return
    say("compiling the training step")
    found["compiled"] = compiled(step)
    if found["compiled"]["fits"]:
        yield found | {"roofline": roofline(found, topology)}
        return
    yield found
    if of_state(found["bytes_per_chip"]) > topology.memory:
        return  # no smaller batch helps
    yield from _with_changes(found, topology, vocab_size, tries, say)


def _with_changes(
    found: dict[str, Any], topology: Topology, vocab_size: int, tries: int, say
) -> Iterator[dict[str, Any]]:
    """The findings with the first of `changes` that fits, or with how many were tried."""
    tried = untried = 0
    for change in changes():
        with gin.unlock_config():
            gin.parse_config(list(change))
        try:
            changed = build(topology, vocab_size)
        except UserError:  # the batch doesn't divide into so many micro-batches
            continue
        # Counts are within a tenth of the compiler's: what exceeds that is not compiled.
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


def build(topology: Topology, vocab_size: int) -> TrainingStep:
    """The training step of gin's `train` for a topology; UserError where it can't be built."""
    spec = RunSpec(data=None)
    devices, reason = compilers.described(topology)
    mesh = spec.build_mesh(devices)
    tokens = np.arange(2) % vocab_size
    with compilers.assuming_cudnn(), sharding_rules(None, topology.device):
        model, program = spec.build(Vocabulary(vocab_size), mesh, training_tokens=tokens)
    batch = batch_of(program, *spec.shape)
    sizes = math.prod(spec.shape), spec.accumulate
    taught = spec.distil and f"the teacher's values and its forward pass ({spec.distil})"
    return TrainingStep(topology, model, program, mesh, batch, *sizes, reason, taught)


def counted(step: TrainingStep) -> dict[str, int]:
    """Peak bytes of a step on one device, by kind, as `memory.step_bytes` counts them."""
    sequences = len(step.batch.index_B) // step.accumulate
    with compilers.assuming_cudnn():
        return memory.step_bytes(
            step.model, step.program, sequences, step.accumulate, step.topology.device
        )


def changes() -> Iterator[tuple[str, ...]]:
    """Settings that need less memory, those that cost least time first."""
    often = gin.get_bindings("train").get("accumulate", 1)
    more = [f"train.accumulate = {often * n}" for n in (2, 4, 8)]
    yield from ((line,) for line in more)
    if gin.get_bindings("Transformer").get("remat", "none") != "full":
        full = "Transformer.remat = 'full'"
        yield from ((line, full) for line in (f"train.accumulate = {often}", *more))


def roofline(found: dict[str, Any], topology: Topology) -> dict[str, float]:
    """Least seconds of a step by each limit of a chip, and the utilisation that they allow.

    found: findings of `plan`, with the compiler's.

    Returns:
        products: seconds of the model's matmuls at the chip's peak, without recomputation.
        memory: a lower bound: arguments and temporaries are each written and read once.
        interconnect: with all links of a chip busy at once, by `links.seconds`.
        utilisation_if_all_overlaps, utilisation_if_nothing_overlaps: shares of the chip's peak.
    """
    chip, compiled = topology.chip, found["compiled"]
    matmuls = found["seconds_of_products_at_peak"]
    touched = 2 * (compiled["arguments"] + compiled["temporaries"])
    memory = touched / topology.share(chip.memory_bandwidth)
    rows = compiled["collectives"]
    interconnect = sum(links.seconds(row, found["mesh"], topology) for row in rows)
    seconds = {"products": matmuls, "memory": memory, "interconnect": interconnect}
    return seconds | {
        "utilisation_if_all_overlaps": matmuls / max(seconds.values()),
        "utilisation_if_nothing_overlaps": matmuls / sum(seconds.values()),
    }


def batch_of(program: Program, batch_size: int, length: int) -> Batch:
    """The shapes and shardings of a global batch."""

    def zeros() -> Batch:
        ids_BT = jnp.zeros((batch_size, length), jnp.int32)
        index_B = jnp.zeros(batch_size, jnp.int32)
        return Batch(ids_BT, ids_BT, ids_BT, ids_BT, ids_BT > 0, index_B)

    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=program.batch_sharding),
        jax.eval_shape(zeros),
    )


def compiled(step: TrainingStep) -> dict[str, Any]:
    """The compiler's findings on the training step: bytes per device, collectives, exchanges.

    Where the program doesn't fit the compiler refuses it, and its message is the only finding.
    """
    started = time.monotonic()
    program, sizes = step.program, tuple(step.mesh.devices.shape)
    try:
        with compilers.assuming_cudnn():
            lowered = program.step.lower(program.abstract_state, step.batch)
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "refused": first_line(error)}
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
        # The peak over time: temporaries may reuse the memory of arguments.
        "total": analysis.peak_memory_in_bytes or whole,
        "collectives": hlo.by_kind(hlo.collectives(text, MESH_AXES, sizes)),
        "exchanges": [
            {
                "name": exchange.name,
                "products_beside": len(exchange.matmuls),
                "of_shared_experts": sum("shared_experts" in name for name in exchange.matmuls),
            }
            for exchange in hlo.exchanges(text)
        ],
    }
