"""A training run as a value: its settings, and the model and program built from them."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import gin
import jax
from jax.sharding import Mesh
import numpy as np

from moe.data.shards import TokenShards
from moe.data.text import PreparedData, TextData
from moe.data.tokens.tokenizer import TokenizerFile
from moe.errors import UserError
from moe.machine import hardware
from moe.model import sharding
from moe.model.sharding import MeshShape
from moe.model.transformer import Transformer
from moe.training import train_step
from moe.training.abstract_model import AbstractModel, Vocabulary, abstract_model
from moe.training.bad_steps import BadSteps, RewindBadSteps, SkipBadSteps
from moe.training.corruption import CorruptionChecks
from moe.training.distillation import Distillation, Teacher
from moe.training.few_bits import require_library
from moe.training.logger import Logger, Metric
from moe.training.objective import NextToken, Objective
from moe.training.optimizer import AdamW, Optimizer
from moe.training.precision import Precision
from moe.training.quantisation import Quantisation
from moe.training.train_step import Program
from routing.ranges import Count, Natural, Positive, Size
from routing.training_text import TokenSequence

DEFAULT_VOCABULARY = 50_304
MAY_CHANGE = {"may_change": True}  # when a run is continued: steps compute the same


@gin.configurable("train")  # pyright: ignore[reportCallIssue]
@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A training run; in a config it is `train`.

    Attributes:
        data: the text; None only where nothing is trained or evaluated.
        model: the transformer's class, with its settings.
        objective: `NextToken()` (where None) or `MaskedToken()`.
        optimizer: with its learning rate and schedule; `AdamW()` where None.
        precision: the types in which parameters and moments are kept; float32 where None.
        weights: rounds the weights that the model computes with, in training and at evaluation:
            `Quantisation()`; the optimizer and the checkpoints have floats. None rounds nothing.
        mesh: sizes of the mesh axes; all devices on the data axis where None.
        steps: optimizer steps; the schedule ends there. A run that is continued with more steps is
            trained longer, with a schedule over all of them.
        batch_size: sequences per optimizer step, over all devices.
        sequence_length: tokens per sequence.
        accumulate: micro-batches per optimizer step; the result is the same.
        seed: of initial values, data order and every random draw.
        log_every: steps between two lines of metrics.
        eval_every: steps between evaluations on part of the held-out documents, each followed by
            a checkpoint; only at the end where None.
        eval_bytes: bytes of held-out text in those evaluations. The best checkpoint is chosen by
            them: where it changes within a run, losses of different text are compared.
        final_eval_bytes: bytes of it in the last evaluation; all where None.
        eval_stride: tokens from one window of a long document to the next; half the sequence where
            None.
        save_every: steps between checkpoints without an evaluation.
        keep: how many of the last checkpoints are kept, beside the best.
        stop_at: pause after this step, as if interrupted; without it the same command continues.
        max_seconds: end after this much training time, wherever the schedule is.
        fit_steps: with max_seconds: time the first steps of a new run, and set `steps` to as many
            as there is time for. A run that is continued keeps that number.
        hang_seconds: a step that takes longer ends the run, with every thread's stack in its
            folder; five times the usual step where None, and at least a minute with several
            processes, ten minutes with one.
        heartbeat_seconds: with several processes, how long one may be silent until it is taken for
            dead and the others end.
        prompts: texts to continue in samples.txt.
        artifacts: whether compressors' figures, samples and the picture are made at the end.
        start_from: the folder of another run, whose parameters and router state a new run starts
            with (fine-tuning).
        start_from_optimizer: with `start_from`: start with its optimizer's state, too.
        distil: learn from another run's model beside the text: `Distillation()`.
        loggers: where metrics go beside the run's logs, such as `WandB()`.
        metrics: functions from a step's routing and metrics to further metrics.
        bad_steps: what is done where a loss, a gradient or the state is not finite, or spikes:
            `SkipBadSteps()` or `RewindBadSteps()`; None ends the run at the last good checkpoint.
        checks: comparisons that find devices which compute or remember wrongly:
            `CorruptionChecks()`.
        deterministic: refuse what keeps a run from giving equal bits each time on this backend.
    """

    data: TextData | TokenShards | None = gin.REQUIRED  # pyright: ignore[reportAssignmentType]
    model: Callable[..., Transformer] = Transformer
    objective: Objective | None = None
    optimizer: Optimizer | None = None
    precision: Precision | None = None
    weights: Quantisation | None = None
    mesh: MeshShape | None = dataclasses.field(default=None, metadata=MAY_CHANGE)
    steps: Count = dataclasses.field(default=1000, metadata=MAY_CHANGE)
    batch_size: Count = 32
    sequence_length: Count = 256
    accumulate: Count = 1
    seed: Natural = 0
    log_every: Count = dataclasses.field(default=10, metadata=MAY_CHANGE)
    eval_every: Count | None = dataclasses.field(default=None, metadata=MAY_CHANGE)
    eval_bytes: Size | None = dataclasses.field(default=200_000, metadata=MAY_CHANGE)
    final_eval_bytes: Size | None = dataclasses.field(default=None, metadata=MAY_CHANGE)
    eval_stride: Count | None = dataclasses.field(default=None, metadata=MAY_CHANGE)
    save_every: Count | None = dataclasses.field(default=None, metadata=MAY_CHANGE)
    keep: Count = dataclasses.field(default=2, metadata=MAY_CHANGE)
    stop_at: Count | None = dataclasses.field(default=None, metadata=MAY_CHANGE)
    max_seconds: Positive | None = dataclasses.field(default=None, metadata=MAY_CHANGE)
    fit_steps: bool = dataclasses.field(default=False, metadata=MAY_CHANGE)
    hang_seconds: Positive | None = dataclasses.field(default=None, metadata=MAY_CHANGE)
    heartbeat_seconds: Positive = dataclasses.field(default=30.0, metadata=MAY_CHANGE)
    prompts: tuple[str, ...] = dataclasses.field(default=("",), metadata=MAY_CHANGE)
    artifacts: bool = dataclasses.field(default=True, metadata=MAY_CHANGE)
    start_from: str | None = None
    start_from_optimizer: bool = False
    distil: Distillation | None = None
    loggers: Sequence[Logger] = dataclasses.field(default=(), metadata=MAY_CHANGE)
    metrics: Sequence[Metric] = dataclasses.field(default=(), metadata=MAY_CHANGE)
    bad_steps: BadSteps | None = dataclasses.field(default=None, metadata=MAY_CHANGE)
    checks: CorruptionChecks | None = dataclasses.field(default=None, metadata=MAY_CHANGE)
    deterministic: bool = dataclasses.field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self):
        for name in ("steps", "log_every", "keep", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.eval_stride is not None and self.eval_stride > self.sequence_length:
            raise UserError(
                f"train.eval_stride={self.eval_stride} must lie in 1 to "
                f"train.sequence_length={self.sequence_length}"
            )
        if self.weights is not None:
            require_library()
        if self.start_from_optimizer and self.start_from is None:
            raise UserError(
                "train.start_from_optimizer=True needs train.start_from: a run's folder"
            )
        if isinstance(self.bad_steps, RewindBadSteps) and not (self.save_every or self.eval_every):
            raise UserError(
                "train.bad_steps=@RewindBadSteps() goes back to a checkpoint, and none is made "
                "before the end; set train.save_every or train.eval_every"
            )

    @classmethod
    def may_change(cls) -> tuple[str, ...]:
        """The settings, as written in a config, that may change when a run is continued.

        The mesh is one: a checkpoint is restored bit for bit on any. What is done at bad steps is
        another: whoever has met one may choose how to go on.
        """
        own = [f"train.{f.name}" for f in dataclasses.fields(cls) if f.metadata == MAY_CHANGE]
        others = MeshShape, SkipBadSteps, RewindBadSteps, CorruptionChecks
        named = [f"{kind.__name__}.{f.name}" for kind in others for f in dataclasses.fields(kind)]
        return (*own, *named)

    @property
    def in_force(self) -> "InForce":
        """Objective, optimizer, mesh and precision, with defaults in place of None."""
        return InForce(
            self.objective or NextToken(),
            self.optimizer or AdamW(),
            self.mesh or MeshShape(),
            self.precision or Precision(),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences per optimizer step, and their length in tokens."""
        return self.batch_size, self.sequence_length

    def prepare_data(self, say: Callable[[str], None] = lambda line: None) -> PreparedData:
        """The text, read and tokenised; UserError where there is none."""
        if self.data is None:
            raise UserError("train.data=None: this needs text, such as train.data = @TextData()")
        return self.data.prepare(say)

    @property
    def vocab_size(self) -> int:
        """V as the config's tokenizer asks for it; that of GPT-2, padded, where it doesn't say."""
        tokenizer = getattr(self.data, "tokenizer", None)
        if isinstance(tokenizer, str):  # of token shards: a tokenizer's file
            return TokenizerFile(tokenizer).vocab_size
        return getattr(tokenizer, "vocab_size", DEFAULT_VOCABULARY)

    def build_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over these devices, or over all; UserError where their number doesn't fit."""
        try:
            return self.in_force.mesh.build(devices)
        except ValueError as error:
            raise UserError(str(error)) from error

    def rates(self) -> np.ndarray:
        """(N,): the learning rate of every step."""
        rate = self.in_force.optimizer.rate(self.steps)
        return np.asarray(jax.vmap(rate)(np.arange(self.steps)))

    def build_model(
        self, vocabulary: Vocabulary, training_tokens: TokenSequence | None = None
    ) -> AbstractModel:
        """The model without values; arguments and errors are those of `abstract_model`.

        Its weights are rounded as `weights` says; UserError where they can't be.
        """
        model = abstract_model(
            self.model,
            self.in_force.objective,
            vocabulary,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            training_tokens=training_tokens,
        )
        if self.weights is None:
            return model
        self.weights.check(model.shapes[0], model.graph.declared)
        graph = dataclasses.replace(model.graph, rounding=self.weights)
        return dataclasses.replace(model, graph=graph)

    def build(
        self,
        vocabulary: Vocabulary,
        mesh: Mesh,
        training_tokens: TokenSequence | None = None,
        teacher: Teacher | None = None,
    ) -> tuple[AbstractModel, Program]:
        """The model without values, and the jitted training step on a mesh.

        teacher: of `distil`; where None, the step is that of a run without one.

        Raises:
            UserError: as `abstract_model`; or the batch does not divide over micro-batches, groups
                or the mesh, or a sequence over the mesh.
        """
        model = self.build_model(vocabulary, training_tokens)
        return model, self._program(model, mesh, teacher)

    def _program(self, model: AbstractModel, mesh: Mesh, teacher: Teacher | None) -> Program:
        batch_size, accumulate = self.batch_size, self.accumulate
        models = [model, *([teacher.model] if teacher else [])]
        per_group = math.lcm(*(min(m.sequences_per_group, batch_size) for m in models))
        if batch_size % (accumulate * per_group):
            raise UserError(
                f"train.batch_size={batch_size} doesn't divide into train.accumulate={accumulate} "
                f"micro-batches of groups of {per_group} sequences; choose a multiple"
            )
        try:
            for one in models:
                experts = one.moe_layer.num_experts if one.moe_layer else None
                sharding.check_batch(mesh, batch_size // (accumulate * per_group), experts)
            sharding.check_length(mesh, model.sequence_length, per_group)
        except ValueError as error:
            raise UserError(str(error)) from error
        router = model.moe_layer.router if model.moe_layer else None
        return train_step.TrainingFunctions(
            model.graph,
            model.shapes,
            objective=model.objective,
            optimizer=self.in_force.optimizer.build(model.graph.declared),
            rate_N=self.rates(),
            loss_weights=model.loss_weights,
            num_bytes_2V=model.num_bytes_2V,
            mesh=mesh,
            seed=self.seed,
            accumulate=accumulate,
            sequences_per_group=per_group,
            global_batch_losses=router is not None and router.needs_global_batch,
            skip_bad_steps=isinstance(self.bad_steps, SkipBadSteps),
            precision=self.in_force.precision,
            teacher=teacher,
        ).program()


class InForce(NamedTuple):
    """The objective, optimizer, mesh and precision of a run, none of them None."""

    objective: Objective
    optimizer: Optimizer
    mesh: MeshShape
    precision: Precision


def check_memory(program: Program) -> None:
    """Raise UserError where the state alone takes more memory than the devices here have."""
    taught = program.step.given.teacher
    arrays = jax.tree.leaves((program.abstract_state, taught and taught[:2]))
    per_device = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)
    devices = len(program.batch_sharding.addressable_devices)
    needed, available = per_device * devices, hardware.memory_bytes()
    if available is not None and needed > available:
        raise UserError(
            f"parameters and optimizer state take {needed / 2**30:,.0f} GiB, and there are "
            f"{available / 2**30:,.0f} here: smaller sizes (Transformer.d_model, MoELayer.d_ff, "
            "MoELayer.num_experts), or a mesh of more machines; `moe plan` tells what they need"
        )
