"""Parameters and router state for fewer experts: slices of the old ones, or averages.

L layers of a stack, E experts, N experts that stay, D model width, F hidden width.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from moe.model.functional import Arrays, Graph
from moe.pruning.choose import Choice
from moe.training.abstract_model import AbstractModel


def shrunk(
    model: AbstractModel, smaller: AbstractModel, values: tuple[Arrays, Arrays], choice: Choice
) -> tuple[Arrays, Arrays]:
    """The smaller model's parameters and router state, from the model's values.

    Every array whose shape differs between the two is sliced along the axis that differs: the
    experts' own, the router's columns, a balancer's bias. So no array has to declare what of it
    belongs to an expert, and with all experts kept nothing changes.
    """
    params, router_state = values
    graph, place = model.graph, places_of(model.graph)
    merged = merged_experts(graph, params, choice) if choice.merges else params

    def sliced(arrays: Arrays, shapes: Arrays) -> Arrays:
        return {
            name: _kept(a, shapes[name].shape, [choice.kept_LN[place[n]] for n in layers])
            if a.shape != shapes[name].shape and (layers := layers_of(graph, name))
            else a
            for name, a in arrays.items()
        }

    new_params, new_state = smaller.shapes
    return sliced(merged, new_params), sliced(router_state, new_state)


def layers_of(graph: Graph, name: str) -> tuple[int, ...]:
    """The numbers in the model of the layers that an array stacks along its first axis."""
    return graph.variables[name].get_metadata()["layers"]


def places_of(graph: Graph) -> dict[int, int]:
    """The place of each sparse layer among the sparse ones, by its number in the model."""
    names = [name for name, axes in graph.axes.items() if "expert" in axes]
    numbers = sorted({number for name in names for number in layers_of(graph, name)})
    return {number: place for place, number in enumerate(numbers)}


def _kept(a: jax.Array, shape: tuple[int, ...], kept_LN: list[np.ndarray]) -> jax.Array:
    """Of each layer the kept experts' slices, along the one axis in which shapes differ."""
    [axis] = [i for i, (old, new) in enumerate(zip(a.shape, shape, strict=True)) if old != new]
    layers = [jnp.take(a[j], kept_N, axis=axis - 1) for j, kept_N in enumerate(kept_LN)]
    return jnp.stack(layers)


def merged_experts(graph: Graph, params: Arrays, choice: Choice) -> Arrays:
    """The parameters with the average of its group in the place of each expert that stays."""
    place, found = places_of(graph), dict(params)
    for prefix in sorted({n.rpartition(".")[0] for n in params if "expert" in graph.axes[n]}):
        names = [n for n in params if n.rpartition(".")[0] == prefix]
        layers = {name: list(params[name]) for name in names}
        for j, number in enumerate(layers_of(graph, names[0])):
            at = place[number]
            own = {name: np.asarray(layers[name][j], np.float32) for name in names}
            for name, a in averaged(own, at, choice).items():
                layers[name][j] = jnp.asarray(a, params[name].dtype)
        found |= {name: jnp.stack(layers[name]) for name in names}
    return found


def averaged(own: dict[str, np.ndarray], at: int, choice: Choice) -> dict[str, np.ndarray]:
    """One layer's arrays (E, ...), each kept expert's the weighted mean of its aligned group.

    The weights are those of M-SMoE, sum_i a_i W_i / sum_i a_i, with frequencies or saliencies for
    a_i; a group without any weight stays the kept expert.
    """
    new = {name: a.copy() for name, a in own.items()}
    for home, kept in enumerate(choice.kept_LN[at]):
        group = np.flatnonzero(choice.home_LE[at] == home)
        weights = choice.weight_LE[at][group]
        if weights.sum() <= 0 or len(group) == 1:
            continue
        for name in own:
            new[name][kept] = 0
        for expert, weight in zip(group, weights / weights.sum(), strict=True):
            order_F = np.arange(len(own[_down(own)][kept]))
            if expert != kept:
                order_F = aligned(own, int(kept), int(expert))
            for name, a in own.items():
                axis = 0 if name == _down(own) else 1
                new[name][kept] += weight * np.take(a[expert], order_F, axis=axis)
    return new


def _down(own: dict[str, np.ndarray]) -> str:
    return next(name for name in own if name.endswith("down_EFD"))


def hidden_rows(own: dict[str, np.ndarray], expert: int) -> Iterator[np.ndarray]:
    """An expert's weights with the hidden unit as the first axis: up, gate and down."""
    for name, a in own.items():
        yield a[expert] if name == _down(own) else a[expert].T


def aligned(own: dict[str, np.ndarray], kept: int, other: int) -> np.ndarray:
    """(F,): the order of another expert's hidden units that is nearest to a kept expert's.

    Weight matching (Ainsworth et al. 2022, which M-SMoE takes, too): a linear assignment that
    maximises the sum of the products of matched units' weights, in up, gate and down alike. An
    expert computes the same in any order of its units.
    """
    pairs = zip(hidden_rows(own, kept), hidden_rows(own, other), strict=True)
    likeness_FF = np.sum([a @ b.T for a, b in pairs], axis=0)
    return linear_sum_assignment(likeness_FF, maximize=True)[1]
