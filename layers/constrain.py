"""Logical axes for activations: layers name them, whoever runs the model maps them to a mesh.

Layers call `constrain(x_GTD, "batch", None, None)`. Outside `with placing(rule):` it does nothing.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import math

import jax

Rule = Callable[[tuple[str | None, ...], tuple[int, ...]], jax.sharding.NamedSharding]
_rule: contextvars.ContextVar[Rule | None] = contextvars.ContextVar("rule", default=None)


@contextlib.contextmanager
def placing(rule: Rule | None) -> Iterator[None]:
    """While this is open, `constrain` asks `rule` for the sharding of logical axes."""
    token = _rule.set(rule)
    try:
        yield
    finally:
        _rule.reset(token)


def is_placed() -> bool:
    """True where arrays are spread over several devices."""
    return _rule.get() is not None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, placed as its logical axes say (one name, or None, per dimension)."""
    rule = _rule.get()
    if rule is None:
        return x
    assert len(axes) == x.ndim, (axes, x.shape)
    return jax.lax.with_sharding_constraint(x, rule(axes, x.shape))


def platform() -> str:
    """What the program is for: the mesh's kind of device, or off a mesh JAX's own."""
    rule = _rule.get()
    if rule is None:
        return jax.default_backend()
    return rule((), ()).mesh.devices.flat[0].platform  # pyright: ignore[reportOptionalMemberAccess]


def batch_parts(groups: int) -> int:
    """Into how many parts a mesh cuts so many groups; 1 off a mesh."""
    rule = _rule.get()
    if rule is None:
        return 1
    placed = rule(("batch",), (groups,))
    return math.prod(placed.mesh.shape[axis] for axis in _axes(placed))


def _axes(placed: jax.sharding.NamedSharding) -> tuple[str, ...]:
    """The mesh axes that cut the first dimension: JAX tells one by its name, several in a tuple."""
    first = placed.spec[0]
    return (first,) if isinstance(first, str) else tuple(first or ())


def on_each_part(function: Callable, split: tuple[jax.Array, ...], whole) -> jax.Array:
    """function(*split, whole), on a mesh by each device for its own part of `split`.

    The leading axis of every array of `split` and of the result counts the parts (`batch_parts`);
    each call sees one of them. `whole` (a tree of arrays) is gathered to every device.
    """
    rule = _rule.get()
    if rule is None:
        return function(*split, whole)
    placed = rule(("batch",), split[0].shape[:1])
    cut, axes = jax.sharding.PartitionSpec(placed.spec[0]), _axes(placed)

    def local(split, whole):
        # Every device has gradients of its own for what all of them hold; their sum counts.
        return function(*split, jax.tree.map(lambda a: jax.lax.pcast(a, axes, to="varying"), whole))

    specs = (cut, jax.sharding.PartitionSpec())
    return jax.shard_map(local, mesh=placed.mesh, in_specs=specs, out_specs=cut)(split, whole)
