"""Weights in few bits: rounded to a format with a scale for each block, and what that saves.

The rounded values are computed with as floats: this tells what a format costs in loss, and how many
bytes it would leave, not how fast a kernel for it would be.

S stacked matrices, R rows (what a product sums over), C columns.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Literal, NamedTuple

import gin
import jax

from moe.errors import UserError, nearest
from moe.model.functional import Arrays, Declared
from moe.training import few_bits
from moe.training.few_bits import FORMATS, SCALE_BITS, require_library
from moe.training.optimizer import first_column, is_matrix, own_axes, stacked
from routing.parameters import ROLES
from routing.ranges import Count

Format = Literal["int8", "int4", "int2", "nf4", "fp8"]
USUAL = ("attention", "feed_forward", "expert", "latent")


class Size(NamedTuple):
    """What a model takes with rounded weights.

    bytes: of all parameters, those that aren't rounded in their own dtypes.
    bits_per_weight: of the rounded ones, scales included.
    """

    bytes: int
    bits_per_weight: float


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Quantisation:
    """Weight matrices rounded to the nearest value of a format.

    A block of weights along the axis that products sum over shares a scale, by its largest value,
    which is kept as a bfloat16. With `train.weights = @Quantisation()` the model computes with
    rounded weights in training and at every evaluation; gradients pass through the rounding
    unchanged (straight through, Bengio et al. 2013), and float weights are what the optimizer
    updates and a checkpoint holds. Needs the extra `quantise`.

    Attributes:
        format: int8, int4, int2, nf4 (Dettmers et al. 2023, arXiv 2305.14314) or fp8 (e4m3).
        block: weights that share a scale; those of a whole output channel where None.
        roles: the parameters that are rounded, by their role; of vectors, those of experts alone.
    """

    format: Format = "int8"
    block: Count | None = None
    roles: Sequence[str] = USUAL

    def __post_init__(self):
        if self.format not in FORMATS:
            hint = nearest(self.format, FORMATS) or f"; there are {', '.join(FORMATS)}"
            raise UserError(f"weights in {self.format!r}: no such format{hint}")
        if self.block is not None and self.block < 1:
            raise UserError(f"blocks of {self.block} weights: expected at least 1")
        for role in self.roles:
            if role not in ROLES:
                hint = nearest(role, ROLES) or f"; there are {', '.join(ROLES)}"
                raise UserError(f"weights of {role!r}: no parameters have this role{hint}")

    @classmethod
    def read(cls, text: str, roles: str | None = None) -> "Quantisation":
        """Of `FORMAT` or `FORMAT:BLOCK`, and roles with commas between them.

        Raises:
            UserError: it can't be read, or names no format or role that there is.
        """
        name, colon, block = text.partition(":")
        if colon and not block.isdecimal():
            raise UserError(f"--weights={text}: expected FORMAT:BLOCK, such as int4:32")
        chosen = tuple(roles.split(",")) if roles else USUAL
        # Every setting is given: gin would fill in the run's.
        return cls(name, int(block) if colon else None, chosen)  # pyright: ignore[reportArgumentType]

    def check(self, params: Arrays, declared: Mapping[str, Declared]) -> None:
        """Raise UserError where these parameters, or their shapes, can't be rounded.

        A block doesn't divide a matrix's rows, nothing has these roles, or the package is missing.
        """
        require_library()
        chosen = self.chosen(declared)
        if not chosen:
            raise UserError(f"the model has no matrices of {', '.join(self.roles)}")
        for name in chosen:
            _, rows, _ = matrices_shape(params[name].shape, declared[name])
            if rows % self.block_of(rows):
                raise UserError(
                    f"blocks of {self.block} don't divide the {rows} rows of {name}; a divisor of "
                    "them, or no block for a scale per channel"
                )

    def chosen(self, declared: Mapping[str, Declared]) -> list[str]:
        """The names of the parameters that are rounded."""
        return [n for n, d in declared.items() if d.role in self.roles and is_rounded(d)]

    def block_of(self, rows: int) -> int:
        """The weights that share a scale, of a matrix with so many rows."""
        return self.block or rows

    def __call__(self, params: Arrays, declared: Mapping[str, Declared]) -> Arrays:
        """The parameters, of which the chosen ones have rounded values; for use in jit as well.

        declared: their axes and roles, by name. The dtypes stay.
        """
        chosen = set(self.chosen(declared))
        return {n: self.rounded(a, declared[n]) if n in chosen else a for n, a in params.items()}

    def rounded(self, weight: jax.Array, declared: Declared) -> jax.Array:
        """A weight's nearest values."""
        shape, axis = with_rows(weight.shape, declared)
        block = self.block_of(shape[axis])
        rounded = few_bits.rounded(weight.reshape(shape), self.format, axis, block)
        return rounded.reshape(weight.shape)

    def size(self, params: Arrays, declared: Mapping[str, Declared]) -> Size:
        """What these parameters would take with the chosen ones in the format."""
        chosen, bits, weights = self.chosen(declared), 0, 0
        for name in chosen:
            size = params[name].size
            _, rows, _ = matrices_shape(params[name].shape, declared[name])
            weights += size
            bits += size * FORMATS[self.format] + size // self.block_of(rows) * SCALE_BITS
        others = sum(a.size * a.dtype.itemsize for n, a in params.items() if n not in chosen)
        return Size(others + math.ceil(bits / 8), bits / weights)

    def __str__(self) -> str:
        blocks = f"blocks of {self.block}" if self.block else "channels"
        return f"{self.format} in {blocks}: {', '.join(self.roles)}"


def is_rounded(declared: Declared) -> bool:
    """Whether a parameter is a matrix, or the vectors of experts that are neurons."""
    neurons = declared.role == "expert" and len(own_axes(declared.axes)) == 1
    return is_matrix(declared.axes) or neurons


def with_rows(shape: tuple[int, ...], declared: Declared) -> tuple[tuple[int, ...], int]:
    """A weight's shape with all rows as one axis, and that axis; rows are what a product sums over.

    The other axes stay, so that a mesh may cut them. Of a table, and of experts that are neurons,
    each vector is a matrix of one column.
    """
    axes, role, _ = declared
    if role in ("embedding", "position") or not is_matrix(axes):
        return shape, len(shape) - 1
    first, cut = stacked(axes), first_column(axes)
    return (*shape[:first], math.prod(shape[first:cut]), *shape[cut:]), first


def matrices_shape(shape: tuple[int, ...], declared: Declared) -> tuple[int, int, int]:
    """(S, R, C) of a weight that stacks matrices."""
    rows, axis = with_rows(shape, declared)
    return math.prod(rows[:axis]), rows[axis], math.prod(rows[axis + 1 :])
