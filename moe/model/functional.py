"""A model as arrays by dotted name, parameters and router state, and the graph that merges them."""

from collections.abc import Callable
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
    """

    graphdef: Any
    paths: dict[str, tuple]
    axes: dict[str, tuple[str | None, ...]]
    roles: dict[str, Role]
    variables: dict[str, nnx.Variable]

    @property
    def declared(self) -> dict[str, Declared]:
        """The parameters by name, as optimizers read them."""
        rates = {n: self.variables[n].get_metadata().get("rate", 1.0) for n in self.roles}
        return {n: Declared(self.axes[n], role, rates[n]) for n, role in self.roles.items()}

    def merge(self, params: Arrays, state: Arrays) -> Any:
        """The module with these values. Costs nothing inside jit."""
        values = params | state
        flat = [
            (path, self.variables[name].replace(values[name])) for name, path in self.paths.items()
        ]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))


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
    _, params, state = split(initialize(graph.merge(params, state), seed))
    return params, state
