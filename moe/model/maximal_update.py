"""Maximal update parametrization (µP): the best learning rate stays where the width grows.

Of a weight, the width is on the side of its inputs, of its outputs, of both, or of neither; with
m = width / base width, Adam's rate and the initial values follow Yang et al. 2022 (Tensor Programs
V, arXiv 2203.03466, table 3):

    kind      width on               initial deviation       rate
    hidden    both sides             1 / sqrt(fan-in)        1 / m
    output    the inputs' alone      1 / fan-in              1 / m
    other     the outputs' or none   as it is                1

Experts are hidden weights, and routers outputs, as Małaśnicki et al. 2025 (arXiv 2508.09752) have
it for mixtures. All widths have to grow together: d_model, d_ff and the number of heads. Nothing is
promised for more, finer or fewer chosen experts.
"""

from typing import Literal

from flax import nnx

from routing.parameters import Init, Parameter

WIDE = ("embed", "mlp", "heads", "kv_heads")  # logical axes that grow with the width
Kind = Literal["hidden", "output", "other"]


def kind_of(axes: tuple[str | None, ...]) -> Kind:
    """Where a weight has the width.

    axes: the logical axes of one layer's weight, inputs first.

    Raises:
        ValueError: an expert is one vector (PEER), which may be its inputs' or its outputs'.
    """
    own = [axis for axis in axes if axis not in ("expert", "segment")]
    if "expert" in axes and len(own) == 1:
        raise ValueError(
            "Transformer.base_width says nothing of experts of single neurons (PEER); leave it out"
        )
    if not own or own[0] not in WIDE:
        return "other"
    return "hidden" if any(axis in WIDE for axis in own[1:]) else "output"


def parametrize(model: nnx.Module, ratio: float) -> None:
    """Give a model's parameters the rates and first values of its width, in place.

    model: whose parameters have no values yet. ratio: its width over the base width.
    """
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, Parameter):
            meta = variable.get_metadata()
            kind = kind_of(meta["axes"])
            if kind != "other":
                variable.set_metadata(rate=1 / ratio)
            if kind == "output":
                variable.set_metadata(init=scaled(meta["init"], ratio**-0.5))


def scaled(init: Init, factor: float) -> Init:
    """An initializer whose values are multiplied by a factor."""
    return lambda key, shape, dtype: factor * init(key, shape, dtype)
