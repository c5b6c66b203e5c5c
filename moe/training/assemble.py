"""From a configuration to the parts of a run: model, data, mesh, program and what they cost."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from layers.experts.neurons import NeuronExperts
from layers.tokens import Tokens
from moe.data.text import PreparedData
from moe.errors import UserError
from moe.machine import hardware
from moe.model import flops, functional, sharding
from moe.model.functional import Arrays, Graph
from moe.model.transformer import Transformer
from moe.training import metrics, train_step
from moe.training.objective import Objective
from moe.training.optimizer import Optimizer
from routing import Decision, ExpertMerge, SoftSlots, TrainingText
from routing.records import TokenSequence


@dataclasses.dataclass(frozen=True)
class Model:
    """A model without values: its graph, its shapes, and one module to ask for its settings."""

    graph: Graph
    shapes: tuple[Arrays, Arrays]
    module: Transformer
    objective: Objective
    costs: flops.Costs
    sequence_length: int
    num_bytes_2V: np.ndarray  # bytes of text that each token gives back: first, later
    kind: str  # how its sparse layers share out their work: a word of `metrics.health`

    @property
    def moe_layer(self):
        """One of its sparse layers, or None for a dense model."""
        return next(iter(self.module.moe_layers_of_units()), None)

    @property
    def sequences_per_group(self) -> int:
        return self.moe_layer.sequences_per_group if self.moe_layer else 1

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """The router losses that are in effect."""
        told = {}
        if self.moe_layer is not None:
            router = self.moe_layer.router
            told = {loss.name: router.weight_of(loss) for loss in router.losses}
            told |= dict(router.completed)
        if self.module.depth_router is not None:
            depth = self.module.depth_router
            told |= {f"depth/{loss.name}": loss.coefficient for loss in depth.losses}
        return told


def assemble(
    make: Callable[..., Transformer],
    objective: Objective,
    *,
    token_vocabulary: int,
    num_bytes_2V: np.ndarray | None = None,
    batch_size: int,
    sequence_length: int,
    training_tokens: TokenSequence | None = None,
) -> Model:
    """The model that a configuration describes.

    num_bytes_2V: bytes of text that each of the tokenizer's tokens gives back, as a document's
        first and anywhere else; one where None.
    training_tokens: the training text (N,), for routers that count in it before they start; a
    model whose values are restored needs none.

    Raises:
        UserError: sizes that don't fit; a router that can't do what the objective asks.
    """
    vocab_size = token_vocabulary + objective.extra_tokens
    text = None if training_tokens is None else TrainingText(training_tokens, vocab_size)
    build = functools.partial(make, vocab_size=vocab_size, causal=objective.causal, text=text)
    try:
        graph, *shapes = functional.abstract(build)
        module = graph.join(*shapes)
        if module.learned is not None and module.learned.length < sequence_length:
            raise ValueError(
                f"Transformer.max_length={module.learned.length} is shorter than "
                f"sequence_length={sequence_length}"
            )
        shape = (batch_size, sequence_length)
        decision = _decision(graph, shapes, shape)
    except ValueError as error:
        raise UserError(_first_line(error)) from error
    costs = flops.costs(module, shapes[0], decision, sequence_length)
    if num_bytes_2V is None:
        num_bytes_2V = np.ones((2, token_vocabulary), np.int32)
    # The objective's own tokens give nothing back.
    num_bytes_2V = np.pad(num_bytes_2V, ((0, 0), (0, objective.extra_tokens)))
    shapes = (shapes[0], shapes[1])
    kind = kind_of(module, decision)
    return Model(graph, shapes, module, objective, costs, sequence_length, num_bytes_2V, kind)


def kind_of(module: Transformer, decision: Decision | None) -> str:
    """How the sparse layers share out their work, by what their routers decide."""
    if decision is None:
        return metrics.DENSE
    if any(isinstance(layer.experts, NeuronExperts) for layer in module.moe_layers_of_units()):
        return metrics.NEURONS
    return {SoftSlots: metrics.SOFT, ExpertMerge: metrics.MERGED}.get(
        type(decision), metrics.CHOICES
    )


def for_training(
    make: Callable[..., Transformer],
    objective: Objective,
    optimizer: Optimizer,
    mesh: Mesh,
    text: PreparedData,
    shape: tuple[int, int],
    steps: int,
    seed: int,
    accumulate: int,
) -> tuple[Model, train_step.Program]:
    """Model and program of a run on a text; shape: sequences per step, and their length.

    Raises:
        UserError: as `assemble` and `program`.
    """
    model = assemble(
        make,
        objective,
        token_vocabulary=text.tokenizer.vocab_size,
        num_bytes_2V=text.tokenizer.num_bytes_2V,
        batch_size=shape[0],
        sequence_length=shape[1],
        training_tokens=text.train.token_N,
    )
    sizes = {"steps": steps, "seed": seed, "accumulate": accumulate, "batch_size": shape[0]}
    made = program(model, optimizer, mesh, **sizes)
    check_memory(made)
    return model, made


def check_memory(program: train_step.Program) -> None:
    """Raise UserError where the state alone takes more memory than the devices here have."""
    places = jax.tree.leaves(program.abstract_state)
    per_device = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in places)
    devices = len(program.batch_sharding.addressable_devices)
    needed, there = per_device * devices, hardware.memory_bytes()
    if there is not None and needed > there:
        raise UserError(
            f"parameters and optimizer state take {needed / 2**30:,.0f} GiB, and there are "
            f"{there / 2**30:,.0f} here: smaller sizes (Transformer.d_model, MoELayer.d_ff, "
            "MoELayer.num_experts), or a mesh of more machines; `moe plan` tells what they need"
        )


def _first_line(error: Exception) -> str:
    """gin adds where it was called to a message; the user needs the first line."""
    return str(error).strip().splitlines()[0]


def _decision(graph: Graph, shapes, shape: tuple[int, int]) -> Decision | None:
    """The shapes of the routers' decision in training, without running anything."""
    tokens = abstract_tokens(shape)
    out = jax.eval_shape(lambda p, s, t: graph.join(p, s)(t), *shapes, tokens)
    return out.routers.decision if out.routers is not None else None


def abstract_tokens(shape: tuple[int, int]) -> Tokens:
    """The shapes of (B, T) tokens in training."""
    integers: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    index_B: Any = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Tokens(integers, integers, integers, index_B, key, train=True)


def program(model: Model, optimizer, mesh: Mesh, *, steps, seed, accumulate, batch_size):
    """The jitted step of a run.

    Raises:
        UserError: a batch that doesn't divide over micro-batches, groups or the mesh; sequences
            that don't.
    """
    per_group = min(model.sequences_per_group, batch_size)
    if accumulate < 1 or batch_size % (accumulate * per_group):
        raise UserError(
            f"train.batch_size={batch_size} doesn't divide into train.accumulate={accumulate} "
            f"micro-batches of groups of {per_group} sequences; choose a multiple"
        )
    num_experts = model.moe_layer.num_experts if model.moe_layer else None
    try:
        sharding.check_batch(mesh, batch_size // (accumulate * per_group), num_experts)
        sharding.check_length(mesh, model.sequence_length, per_group)
    except ValueError as error:
        raise UserError(str(error)) from error
    axes = {name: model.graph.axes[name] for name in model.shapes[0]}
    router = model.moe_layer.router if model.moe_layer else None
    return train_step.Step(
        model.graph,
        model.shapes,
        objective=model.objective,
        optimizer=optimizer.build(axes, steps),
        num_bytes_2V=model.num_bytes_2V,
        mesh=mesh,
        seed=seed,
        accumulate=accumulate,
        sequences_per_group=per_group,
        whole_step_losses=router is not None and router.needs_the_whole_step,
    ).program()
