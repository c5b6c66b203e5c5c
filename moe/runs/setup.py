"""What a run computes with: its text, mesh, model and training program."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from jax.sharding import Mesh

from moe.data.batches import TrainBatches, ValidationBatches
from moe.data.text import PreparedData
from moe.machine import processes
from moe.runs import teachers
from moe.runs.storage.folder import AnotherRun
from moe.settings import resolved
from moe.training.abstract_model import AbstractModel, Vocabulary
from moe.training.distillation import Teacher
from moe.training.run_spec import RunSpec, check_memory
from moe.training.train_step import Program


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run's text, batches, mesh, abstract model and program, built from its spec and checked.

    held_out: batches of `train.eval_bytes` of the held-out documents, for evaluations during
        training. final_held_out: of `train.final_eval_bytes`, for the last evaluation.
    teacher: of `train.distil`; `with_teacher` reads its values.
    teacher_record: which checkpoint they are of.
    """

    spec: RunSpec
    text: PreparedData
    train_batches: TrainBatches
    held_out: ValidationBatches
    final_held_out: ValidationBatches
    mesh: Mesh
    model: AbstractModel
    program: Program
    teacher: Teacher | None = None
    teacher_record: dict[str, Any] | None = None

    @classmethod
    def of(cls, spec: RunSpec, say: Callable[[str], None], teach: bool = True) -> "Setup":
        """Prepare the text and build the program; nothing is compiled yet.

        teach: whether the teacher of `train.distil` is looked for; a finished run needs none.

        Raises:
            UserError: devices, text or sizes that don't fit together.
        """
        mesh = spec.build_mesh()
        text = spec.prepare_data(say)
        teach = teach and spec.distil is not None
        teacher = teachers.find(spec, text.tokenizer, mesh, say) if teach else None
        vocabulary = Vocabulary.of(text.tokenizer)
        model, program = spec.build(vocabulary, mesh, text.train.token_N, teacher)
        check_memory(program)
        train_batches = text.train_batches(*spec.shape, spec.seed)
        batches = functools.partial(
            text.validation_batches, *spec.shape, spec.eval_stride, causal=model.objective.causal
        )
        final_held_out = batches(spec.final_eval_bytes)
        held_out = batches(spec.eval_bytes)
        batches = train_batches, held_out, final_held_out
        return cls(spec, text, *batches, mesh, model, program, teacher)

    def with_steps(self, steps: int) -> "Setup":
        """The same run with another number of steps; its program has the schedule for them."""
        spec = dataclasses.replace(self.spec, steps=steps)
        vocabulary = Vocabulary.of(self.text.tokenizer)
        model, program = spec.build(vocabulary, self.mesh, self.text.train.token_N, self.teacher)
        return dataclasses.replace(self, spec=spec, model=model, program=program)

    def with_teacher(self, restored: dict[str, Any], say: Callable[[str], None]) -> "Setup":
        """The same run with its teacher's values in the program; the same where it has none.

        restored: the JSON of the run's own checkpoint, empty for a run that begins.

        Raises:
            UserError: as `teachers.read`; or the checkpoint was made with a teacher and the run has
                none, or the other way round.
        """
        distil, before = self.spec.distil, restored.get("teacher")
        if restored and (before is None) != (distil is None):
            there = "no teacher" if before is None else f"the teacher {before['run']!r}"
            raise AnotherRun(
                f"this run's checkpoints were made with {there}; choose another --workdir, or the "
                "same train.distil to continue it"
            )
        if distil is None or self.teacher is None:
            return self
        taught, record = teachers.read(distil, self.teacher, self.mesh, before, say)
        given = {"teacher": taught.values}
        step, gradients = (
            f.with_given(**given) for f in (self.program.step, self.program.gradients)
        )
        program = dataclasses.replace(self.program, step=step, gradients=gradients)
        return dataclasses.replace(self, program=program, teacher=taught, teacher_record=record)

    @property
    def rows(self) -> slice:
        """The rows of each batch that this process reads."""
        return processes.rows(self.program.batch_sharding, self.spec.batch_size)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a state this run's, in each checkpoint: text, batches, seed and teacher."""
        spec = self.spec
        data = self.text.fingerprint()
        found = {"data": data, "batch_size": spec.batch_size, "seed": spec.seed}
        return found | ({"teacher": self.teacher_record} if self.teacher_record else {})

    @property
    def settings(self) -> resolved.Table:
        """Every setting in force, by configurable."""
        return resolved.rows(self.spec, *self.spec.in_force, self.model.module)
