"""What a run computes with: its text, mesh, model and training program."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from jax.sharding import Mesh

from moe.data.batches import TrainBatches, ValidationBatches
from moe.data.text import PreparedData
from moe.machine import processes
from moe.settings import resolved
from moe.training.abstract_model import AbstractModel, Vocabulary
from moe.training.run_spec import RunSpec, check_memory
from moe.training.train_step import Program


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run's text, batches, mesh, abstract model and program, built from its spec and checked.

    held_out: batches of `train.eval_bytes` of the held-out documents, for evaluations during
        training. final_held_out: of `train.final_eval_bytes`, for the last evaluation.
    """

    spec: RunSpec
    text: PreparedData
    train_batches: TrainBatches
    held_out: ValidationBatches
    final_held_out: ValidationBatches
    mesh: Mesh
    model: AbstractModel
    program: Program

    @classmethod
    def of(cls, spec: RunSpec, say: Callable[[str], None]) -> "Setup":
        """Prepare the text and build the program; nothing is compiled yet.

        Raises:
            UserError: devices, text or sizes that don't fit together.
        """
        mesh = spec.build_mesh()
        text = spec.prepare_data(say)
        model, program = spec.build(Vocabulary.of(text.tokenizer), mesh, text.train.token_N)
        check_memory(program)
        train_batches = text.train_batches(*spec.shape, spec.seed)
        batches = functools.partial(
            text.validation_batches, *spec.shape, spec.eval_stride, causal=model.objective.causal
        )
        final_held_out = batches(spec.final_eval_bytes)
        held_out = batches(spec.eval_bytes)
        return cls(spec, text, train_batches, held_out, final_held_out, mesh, model, program)

    def with_steps(self, steps: int) -> "Setup":
        """The same run with another number of steps; its program has the schedule for them."""
        spec = dataclasses.replace(self.spec, steps=steps)
        vocabulary = Vocabulary.of(self.text.tokenizer)
        model, program = spec.build(vocabulary, self.mesh, self.text.train.token_N)
        return dataclasses.replace(self, spec=spec, model=model, program=program)

    @property
    def rows(self) -> slice:
        """The rows of each batch that this process reads."""
        return processes.rows(self.program.batch_sharding, self.spec.batch_size)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a state this run's, recorded in each checkpoint: text, batches and seed."""
        spec = self.spec
        data = self.text.fingerprint()
        return {"data": data, "batch_size": spec.batch_size, "seed": spec.seed}

    @property
    def settings(self) -> resolved.Table:
        """Every setting in force, by configurable."""
        return resolved.rows(self.spec, *self.spec.in_force, self.model.module)
