"""A dispatcher for decoding, where a step has a row or a few for each expert."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from layers.dispatch.base import Dispatcher
from layers.dispatch.sorted import Sorted
from layers.kernels.grouped_matmul import SortedRows
from layers.logical_axes import has_mesh, platform
from routing.records import Decision, TokenChoice

ROWS_PER_EXPERT = 2  # up to which rows one by one are faster than blocks (benchmarks/decode.py)


@dataclasses.dataclass(frozen=True)
class FewRows(Dispatcher):
    """`Sorted`, whose experts compute one row after the other; without a gradient."""

    needs_slots: ClassVar[bool] = False

    def dispatch(self, x_GTD: Float[Array, "G T D"], decision: Decision) -> jax.Array | SortedRows:
        rows = Sorted().dispatch(x_GTD, decision)
        if isinstance(rows, SortedRows):
            return dataclasses.replace(rows, kernel="row_by_row")
        return rows

    def combine(self, expert_rows: jax.Array, decision: Decision) -> jax.Array:
        return Sorted().combine(expert_rows, decision)


def for_decoding(decision: Decision) -> Dispatcher:
    """The dispatcher for one more token of each sequence: nothing dropped, no expert for nothing.

    Rows one by one are for a CPU alone; elsewhere the platform's kernel for sorted rows is taken.
    """
    if not isinstance(decision, TokenChoice) or platform() != "cpu" or has_mesh():
        return Sorted()
    few = decision.expert_GTK.size <= ROWS_PER_EXPERT * decision.num_experts
    return FewRows() if few else Sorted()
