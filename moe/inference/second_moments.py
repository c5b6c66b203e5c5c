"""Of each weight in a function the sum of x x^T over the inputs x that it is multiplied with.

The function's program (its jaxpr) is run operation by operation. What a parameter becomes by casts,
reshapes and transposes is followed by the number of each element, so that at a matmul it is known
which of its rows are summed over, whichever module wrote it.

S stacked matrices, R rows, C columns, N inputs.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from moe.model.functional import Arrays, Declared
from moe.training.quantisation import is_rounded, matrices_shape

# Operations that leave elements where they are, and those that leave them in order.
SAME = {"convert_element_type", "copy", "copy_p", "name", "sharding_constraint"}
ORDERLY = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim"}


class Moments(NamedTuple):
    """hessian_SRR: the sums of x x^T; inputs_S: the number of inputs, zeros left out."""

    hessian_SRR: Float[Array, "S R R"]
    inputs_S: Int[Array, " S"]


@dataclasses.dataclass(frozen=True)
class Label:
    """An array that has a parameter's elements, and the number of each in that parameter."""

    name: str
    number: np.ndarray


def with_moments(
    function: Callable, params: Arrays, declared: Mapping[str, Declared], *arguments
) -> tuple[Any, dict[str, Moments]]:
    """function(params, *arguments), and the moments of the weights it multiplies; to be jitted.

    Without moments stay weights that are used otherwise: gathered, merged, or in an inner loop.
    declared: of each parameter, without an axis of layers.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(params, *arguments)
    names = jax.tree.leaves({n: n for n in params})
    followed = {n: a for n, a in params.items() if is_rounded(declared[n])}
    shapes_of = {n: matrices_shape(a.shape, declared[n]) for n, a in followed.items()}
    numbers = {n: np.arange(math.prod(a.shape)).reshape(a.shape) for n, a in followed.items()}
    labels = [Label(n, numbers[n]) if n in followed else None for n in names]
    inputs = jax.tree.leaves((params, *arguments))
    labels += [None] * (len(inputs) - len(labels))
    reader = _Reader(shapes_of, {})
    results, _ = reader.run(closed, inputs, labels)
    return jax.tree.unflatten(jax.tree.structure(shapes), results), reader.found


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Runs programs. shapes: (S, R, C) of each parameter; found: the moments so far."""

    shapes: dict[str, tuple[int, int, int]]
    found: dict[str, Moments]

    def run(self, closed: core.ClosedJaxpr, inputs: list, labels: list) -> tuple[list, list]:
        """The results of a program, and their labels."""
        jaxpr = closed.jaxpr
        values = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *inputs), strict=True)
        )
        marks = dict(zip(jaxpr.invars, labels, strict=True))

        def read(atom):
            literal = isinstance(atom, core.Literal)
            return (atom.val, None) if literal else (values[atom], marks.get(atom))

        for equation in jaxpr.eqns:
            pairs = [read(atom) for atom in equation.invars]
            given = [value for value, _ in pairs], [label for _, label in pairs]
            results, labels = self._run_one(jaxpr, equation, *given)
            values.update(zip(equation.outvars, results, strict=True))
            marks.update(zip(equation.outvars, labels, strict=True))
        outs = [read(atom) for atom in jaxpr.outvars]
        return [value for value, _ in outs], [label for _, label in outs]

    def _run_one(self, jaxpr, equation, inputs: list, labels: list) -> tuple[list, list]:
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        kind = equation.primitive.name
        followed = any(labels)
        if followed and isinstance(inner, core.ClosedJaxpr) and kind not in ("scan", "while"):
            return self.run(inner, inputs, labels)
        if followed and kind == "dot_general":
            self._note(inputs, labels, equation.params["dimension_numbers"])
        results = _computed(jaxpr, equation, inputs)
        label = _moved(equation, labels[0]) if followed and labels[0] is not None else None
        return results, [label] + [None] * (len(results) - 1) if results else []

    def _note(self, inputs: list, labels: list, dimensions) -> None:
        """Add the inputs of a matmul whose one operand is a weight that is summed over its rows."""
        contracted, batch = dimensions
        for w, x in ((0, 1), (1, 0)):
            label = labels[w]
            if label is None or labels[x] is not None:
                continue
            if not _sums_over_rows(label, contracted[w], batch[w], self.shapes[label.name]):
                continue
            x_SNR = _last(inputs[x], batch[x], contracted[x]).astype(jnp.float32)
            hessian_SRR = jnp.einsum("snr,snq->srq", x_SNR, x_SNR)
            found = Moments(hessian_SRR, (x_SNR != 0).any(-1).sum(-1))
            if label.name in self.found:
                found = Moments(*map(jnp.add, self.found[label.name], found))
            self.found[label.name] = found


def _computed(jaxpr: core.Jaxpr, equation, inputs: list) -> list:
    """The results of one operation of a program: those of a program that is nothing else."""
    given = {v: a for v, a in zip(equation.invars, inputs, strict=True) if isinstance(v, core.Var)}
    alone = jaxpr.replace(
        constvars=[], invars=list(given), outvars=equation.outvars, eqns=[equation]
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())


def _last(a, batch, contracted):
    """An array as (S, N, R): its batch, other and contracted axes."""
    others = [axis for axis in range(a.ndim) if axis not in (*batch, *contracted)]
    shape = [math.prod(a.shape[axis] for axis in axes) for axes in (batch, others, contracted)]
    return a.transpose((*batch, *others, *contracted)).reshape(shape)


def _sums_over_rows(label: Label, contracted, batch, shape: tuple[int, int, int]) -> bool:
    """Whether a matmul's batch, contracted and other axes are a weight's S, R and C, in order."""
    expected_SRC = np.arange(math.prod(shape)).reshape(shape)
    return np.array_equal(_last(label.number, batch, contracted), expected_SRC.swapaxes(1, 2))


def _moved(equation, label: Label) -> Label | None:
    """The label of an operation's result, where it only moves its operand's elements."""
    kind, params, number = equation.primitive.name, equation.params, label.number
    if kind in SAME:
        return label
    if kind == "transpose":
        return Label(label.name, number.transpose(params["permutation"]))
    shape = equation.outvars[0].aval.shape
    if kind in ORDERLY and math.prod(shape) == number.size:
        return Label(label.name, number.reshape(shape))
    return None
