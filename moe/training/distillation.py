"""Distillation: a student learns from a teacher's distribution, too (Hinton et al. 2015).

B batch, T tokens, D model width, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import gin
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from moe.data.batch import Batch
from moe.errors import UserError
from moe.model import sharding
from moe.model.functional import Arrays
from moe.training import objective as objectives
from moe.training.abstract_model import AbstractModel
from routing.ranges import Count, Positive, Share


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Distillation:
    """Learn from another run's model, the teacher, as well as from the text (Hinton et al. 2015).

    The loss of a scored token is (1 - weight) * the task's loss + weight * temperature^2 *
    KL(teacher || student), both distributions softened by the temperature. The teacher reads the
    same tokens by its evaluation rule and never changes; routers' losses are as without it. The
    run's loss stays the task's, and the second term is logged as `distillation`.

    Attributes:
        teacher: the folder of a run with the same tokenizer and objective, which must keep the
            checkpoint that is read for as long as this run trains.
        step: of its checkpoint; the newest when this run begins where None.
        temperature: divides the logits of both.
        weight: share of the distillation term in the loss.
    """

    teacher: str = gin.REQUIRED  # pyright: ignore[reportAssignmentType]
    step: Count | None = None
    temperature: Positive = 2.0
    weight: Share = 0.5

    def __post_init__(self):
        if not self.temperature > 0:
            raise UserError(f"Distillation.temperature={self.temperature} must be above 0")
        if not 0 <= self.weight <= 1:
            raise UserError(f"Distillation.weight={self.weight} must lie in 0 to 1")

    def __str__(self) -> str:
        return (
            f"{self.weight:g} of the loss from {self.teacher}, "
            f"{'its newest checkpoint' if self.step is None else f'step {self.step}'}, "
            f"at temperature {self.temperature:g}"
        )


class TeacherValues(NamedTuple):
    """What a compiled step is given of the teacher, so that it is the same for all values of these.

    params, router_state: arrays, or their shapes where they are not read yet.
    """

    params: Arrays
    router_state: Arrays
    temperature: np.float32
    weight: np.float32


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher's model, and its values as the training step is given them."""

    model: AbstractModel
    values: TeacherValues

    @classmethod
    def of(cls, model: AbstractModel, distil: Distillation, mesh: Mesh) -> "Teacher":
        """Without values: shapes, and where the mesh has them, as it has a model's own."""

        def placed(arrays: Arrays) -> Arrays:
            axes = model.graph.axes
            return {
                name: jax.ShapeDtypeStruct(
                    a.shape, a.dtype, sharding=sharding.sharding(mesh, axes[name], a.shape)
                )
                for name, a in arrays.items()
            }

        params, router_state = placed(model.shapes[0]), placed(model.shapes[1])
        numbers = np.float32(distil.temperature), np.float32(distil.weight)
        return cls(model, TeacherValues(params, router_state, *numbers))

    def with_values(self, params: Arrays, router_state: Arrays) -> "Teacher":
        values = self.values._replace(params=params, router_state=router_state)
        return dataclasses.replace(self, values=values)

    def shardings(self, mesh: Mesh) -> TeacherValues:
        """Where a mesh has each value."""
        everywhere: Any = NamedSharding(mesh, PartitionSpec())
        arrays = self.values.params, self.values.router_state
        params, router_state = jax.tree.map(lambda a: a.sharding, arrays)
        return TeacherValues(params, router_state, everywhere, everywhere)

    def read(self, values: TeacherValues, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The output weights (D, V) and the representations (B, T, D) of a prepared batch.

        By the evaluation rule: without noise, with the teacher's own router state.
        """
        model = self.model.graph.merge(values.params, values.router_state)
        key = objectives.step_key(0, objectives.EVALUATION)
        out = model(objectives.tokens_of(batch, key, train=False))
        return model.head(), out.hidden_BTD
