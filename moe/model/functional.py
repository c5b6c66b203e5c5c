"""A model as arrays by dotted name, parameters and router state, and the graph that merges them."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax

from routing.parameters import Role, RouterState, initialize

Arrays = dict[str, Any]  # jax.Array; jax.ShapeDtypeStruct in an abstract model
Axes = tuple[str | None, ...]


class Declared(NamedTuple):
    """The logical axes and the role of a parameter, as its module declares them.

    rate: its share of the learning rate (`Transformer.base_width`).
    """

    axes: Axes
    role: Role
    rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class Graph:
    """A model without its values; `merge` makes a module of it and arrays.

    Attributes:
        graphdef: Flax's graph of the module.
        paths: the path of every variable, by dotted name.
        axes: the logical axes of every variable.
        roles: the role of every parameter.
        variables: the variables with abstract values.
        rounding: a function from parameters, and what is declared of them, to the values that the
            model computes with; None where they are its own.
    """

    graphdef: Any
    paths: dict[str, tuple]
    axes: dict[str, tuple[str | None, ...]]
    roles: dict[str, Role]
    variables: dict[str, nnx.Variable]
    rounding: Callable[[Arrays, Mapping[str, Declared]], Arrays] | None = None

    @property
    def declared(self) -> dict[str, Declared]:
        """The parameters by name, as optimizers read them."""
        rates = {n: self.variables[n].get_metadata().get("rate", 1.0) for n in self.roles}
        return {n: Declared(self.axes[n], role, rates[n]) for n, role in self.roles.items()}

    def merge(self, params: Arrays, state: Arrays) -> Any:
        """The module with these values. Without a rounding it costs nothing inside jit.

        Gradients pass through the rounding unchanged: those of the parameters are those at their
        rounded values.
        """
        if self.rounding is not None:
            params = _straight_through(params, self.rounding(params, self.declared))
        values = params | state
        flat = [
            (path, self.variables[name].replace(values[name])) for name, path in self.paths.items()
        ]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))

    def rounded_once(self, params: Arrays) -> tuple["Graph", Arrays]:
        """The graph without its rounding, and the rounded parameters: for many passes with them."""
        if self.rounding is None:
            return self, params
        return dataclasses.replace(self, rounding=None), self.rounding(params, self.declared)


def _straight_through(params: Arrays, rounded: Arrays) -> Arrays:
    """The rounded values, whose derivatives by the parameters are 1."""

    def one(name: str):
        value, own = rounded[name], params[name]
        if value is own:
            return own
        # Exactly the rounded value, which own + (value - own) isn't.
        return jax.lax.stop_gradient(value) + (own - jax.lax.stop_gradient(own))

    return {name: one(name) for name in params}


def split(model: nnx.Module) -> tuple[Graph, Arrays, Arrays]:
    """The graph, parameters and router state of a model, by dotted name."""
    graphdef, everything = nnx.split(model)
    flat = {".".join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(everything)}
    axes = {}
    for name, (_, variable) in flat.items():
        declared = variable.get_metadata()["axes"]
        stacked = len(variable.shape) == len(declared) + 1
        axes[name] = ("layer", *declared) if stacked else tuple(declared)
    variables = {name: v for name, (_, v) in flat.items()}
    params = {n: v.get_value() for n, v in variables.items() if isinstance(v, nnx.Param)}
    state = {n: v.get_value() for n, v in variables.items() if isinstance(v, RouterState)}
    assert len(params) + len(state) == len(flat), sorted(set(flat) - set(params) - set(state))
    abstract = {
        n: v.replace(jax.ShapeDtypeStruct(v.shape, v.dtype), filled=True)
        for n, v in variables.items()
    }
    paths = {n: p for n, (p, _) in flat.items()}
    roles = {n: variables[n].get_metadata()["role"] for n in params}
    return Graph(graphdef, paths, axes, roles, abstract), params, state


def abstract(make: Callable[[], nnx.Module]) -> tuple[Graph, Arrays, Arrays]:
    """The same for a model that is never allocated: its values are `ShapeDtypeStruct`s."""
    return split(nnx.eval_shape(make))


def initial_values(graph: Graph, params: Arrays, state: Arrays, seed) -> tuple[Arrays, Arrays]:
    """Initial parameters and router state, which depend on seed and names alone; jittable."""
    own = dataclasses.replace(graph, rounding=None)
    _, params, state = split(initialize(own.merge(params, state), seed))
    return params, state
