"""What a run is and what it reached: on the screen, in run.json and in summary.json."""

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from layers import remat
from layers.dispatch import Sorted
from layers.kernels.choice import Choice
from layers.kernels.grouped_matmul import choose
from layers.logical_axes import sharding_rules
from layers.mixture_of_depths import blocks_of
from moe.data.text import PreparedData
from moe.machine import accelerator, hardware
from moe.model import sharding
from moe.model.transformer import DTYPES
from moe.runs.storage.folder import RunFolder, versions
from moe.settings import resolved
from moe.training.abstract_model import AbstractModel
from moe.training.evaluate import Evaluation


def describe(
    say: Callable[[str], None],
    table: resolved.Table,
    model: AbstractModel,
    text: PreparedData,
    peak: float,
    folder: RunFolder,
) -> None:
    """Say what is about to be trained: every setting in force, then text, model and machine.

    peak: FLOP/s of a matmul, measured on this machine.
    """
    say(f"settings in force (with those that are None: {folder.settings}):")
    for line in resolved.text(table, unset=False).splitlines():
        say(f"  {line}")
    costs, info = model.costs, text.info
    layer = model.moe_layer
    router = "none (dense)"
    if layer is not None:
        router = f"{type(layer.router).__name__}; dispatcher: {layer.dispatcher}"
        if layer.eval_dispatcher != layer.dispatcher:
            router += f", at evaluation {layer.eval_dispatcher}"
    losses = ", ".join(f"{c:g} * {n}" for n, c in model.loss_coefficients.items()) or "none"
    say(
        f"text: {info.name}, {info.train_bytes:,} bytes of training text, "
        f"{info.validation_bytes:,} held out in {info.validation_documents} documents; "
        f"{info.bytes_per_token:.2f} bytes per token"
    )
    say(
        f"model: {costs.parameters_total:,} parameters, {costs.parameters_active:,} active; "
        f"{costs.flops_per_token:,} FLOPs per token; router: {router}; router losses: {losses}"
    )
    if layer is not None and isinstance(layer.dispatcher, Sorted):
        width = layer.experts.row_width or model.module.d_model
        kernel, reason = choose(layer.dispatcher.kernel, model.module.compute_dtype, width)
        say(f"experts' matmuls: {kernel} ({reason})")
    if layer is not None and 1 < layer.num_experts <= costs.experts_per_token:
        say(
            f"every token uses all {layer.num_experts} experts: nothing is routed; raise "
            "MoELayer.num_experts, or lower K"
        )
    say(
        f"machine: {hardware.describe_device()}, {peak / 1e9:,.0f} GFLOP/s measured in "
        f"{model.module.compute_dtype} matmuls; run folder: {folder.path}"
    )


def attention_kernels(model: AbstractModel, mesh: Mesh) -> list[Choice]:
    """The kernels that compute attention on the mesh, and why."""
    found = {}
    sequences = sharding.batch_shards(mesh)  # one on each device
    with sharding_rules(sharding.rule(mesh), mesh.devices.flat[0]):
        for stack in model.module.stacks:
            for block in blocks_of(stack.unit.blocks):
                heads, width = block.attention.query_DHK.shape[-2:]
                shape = (sequences, model.sequence_length, heads, width)
                query = jax.ShapeDtypeStruct(shape, DTYPES[model.module.compute_dtype])
                found[block.attention.chosen_kernel(query)] = None
    return list(found)


def attention_of(model: AbstractModel, mesh: Mesh) -> str:
    """`attention_kernels` in words."""
    return in_words(attention_kernels(model, mesh))


def layers_of(model: AbstractModel, mesh: Mesh) -> str:
    """Whether the layers of each stack are scanned or unrolled on the mesh, and why."""
    with sharding_rules(sharding.rule(mesh), mesh.devices.flat[0]):
        return in_words(stack.loop for stack in model.module.stacks)


def in_words(choices: Iterable[Choice]) -> str:
    """Each choice once, with its reason."""
    return "; ".join(dict.fromkeys(f"{chosen} ({reason})" for chosen, reason in choices))


def saved_of(model: AbstractModel) -> str:
    """What layers keep from their forward to their backward pass."""
    return remat.described(model.module.stacks[0].remat)


def costs_of(model: AbstractModel) -> dict[str, Any]:
    """The numbers of parameters and FLOPs, for run.json and summary.json."""
    costs = model.costs
    return {
        "parameters_total": costs.parameters_total,
        "parameters_active": costs.parameters_active,
        "flops_per_token": costs.flops_per_token,
    }


def describe_run(
    model: AbstractModel, text: PreparedData, seed: int, peak: float
) -> dict[str, Any]:
    """The content of run.json: versions, machine, XLA's settings, text, seed, losses, costs."""
    return {
        "versions": versions(),
        "device": hardware.describe_device(),
        "xla": accelerator.shown(),
        "matmul_peak_flops": peak,
        "corpus": dataclasses.asdict(text.info),
        "data": text.fingerprint(),
        "tokenizer": text.tokenizer.fingerprint,
        "seed": seed,
        "router_losses": model.loss_coefficients,
        **costs_of(model),
    }


def summary_of(
    result: Evaluation, model: AbstractModel, text: PreparedData, peak: float
) -> dict[str, Any]:
    """The evaluation's result, with the model's costs, text and machine, for summary.json."""
    return {
        "objective": type(model.objective).__name__,
        "val_bits_per_byte": result.bits_per_byte,
        "val_loss": result.loss,
        "val_documents": result.documents,
        "val_bytes": result.bytes,
        "held_out_bytes": text.info.validation_bytes,
        **costs_of(model),
        "corpus": {name: getattr(text.info, name) for name in ("name", "bytes", "sha256")},
        "matmul_peak_flops": peak,
        "peak_memory_bytes": hardware.peak_memory_bytes(),
    }
