"""Dense models beside a mixture: as many active parameters, and as many in all."""

from collections.abc import Iterator
import dataclasses
import functools

import jax

from layers.experts.feed_forward import FeedForward
from moe.errors import UserError
from moe.inference.decoder import Decoder
from moe.model import functional
from moe.training.abstract_model import AbstractModel, Vocabulary
from moe.training.run_spec import RunSpec


def dense_twins(
    spec: RunSpec, model: AbstractModel, vocabulary: Vocabulary
) -> Iterator[tuple[str, AbstractModel, Decoder]]:
    """A name, the model and its decoder for each of the two, with first values.

    What a step costs doesn't depend on what it says.

    Args:
        spec: of a run, whose config is loaded.
        model: its model.
        vocabulary: of its tokenizer.

    Raises:
        UserError: the model is dense.
    """
    if model.moe_layer is None:
        raise UserError("--twins: this model is dense itself")
    costs = model.costs
    for name, target in (
        ("dense, as many active", costs.parameters_active),
        ("dense, as many in all", costs.parameters_total),
    ):
        twin = dense_twin(spec, vocabulary, target)

        def first(twin: AbstractModel = twin):
            params, state = functional.initial_values(twin.graph, *twin.shapes, 0)
            return spec.in_force.precision.stored(params, twin.graph.declared), state

        yield name, twin, Decoder(twin.graph, *jax.jit(first)())


def dense_twin(spec: RunSpec, vocabulary: Vocabulary, parameters: int) -> AbstractModel:
    """The run's model with dense layers only, as wide inside as gives about so many parameters."""

    def of_width(d_ff: int) -> AbstractModel:
        dense = functools.partial(FeedForward, d_ff=d_ff)
        without = {"moe": None, "moe_every": 1, "moe_layers": None}
        make = functools.partial(spec.model, feed_forward=dense, **without)
        return dataclasses.replace(spec, model=make).build_model(vocabulary)

    first, second = (of_width(d_ff).costs.parameters_total for d_ff in (1, 2))
    return of_width(max(1, 1 + round((parameters - first) / (second - first))))
