"""Logical axes for activations: layers name them, whoever runs the model maps them to a mesh.

Layers call `constrain(x_GTD, "batch", None, None)`; outside `with sharding_rules(rule):` it does
nothing.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import math
from typing import NamedTuple

from einops import rearrange
import jax

Rule = Callable[[tuple[str | None, ...], tuple[int, ...]], jax.sharding.NamedSharding]
_rule: contextvars.ContextVar[Rule | None] = contextvars.ContextVar("rule", default=None)


@contextlib.contextmanager
def sharding_rules(rule: Rule | None) -> Iterator[None]:
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


def mesh_axes(axis: str, size: int) -> dict[str, int]:
    """The mesh axes, with their sizes, that cut a dimension of so many; none off a mesh."""
    rule = _rule.get()
    if rule is None:
        return {}
    placed = rule((axis,), (size,))
    return {name: placed.mesh.shape[name] for name in _names(placed.spec[0])}


def is_cut(axis: str) -> bool:
    """Whether the mesh cuts dimensions of this logical axis, where they divide."""
    return bool(mesh_axes(axis, 0))


class Shards(NamedTuple):
    """Groups of tokens as a mesh cuts them: P = groups * tokens pieces, one on each device.

    axis: the logical axis of a dimension that counts the pieces.
    """

    groups: int
    tokens: int
    axis: str

    @property
    def count(self) -> int:
        return self.groups * self.tokens

    def split(self, a_GT: jax.Array) -> jax.Array:
        """(G, T, ...) as (P, G * T / P, ...)."""
        cut = {"g": self.groups, "t": self.tokens}
        a_PN = rearrange(a_GT, "(g a) (t b) ... -> (g t) (a b) ...", **cut)
        return constrain(a_PN, self.axis, *(None for _ in a_PN.shape[1:]))

    def join(self, a_PN: jax.Array, groups: int) -> jax.Array:
        """(P, G * T / P, ...) as (G, T, ...): the inverse of `split`."""
        cut = {"g": self.groups, "a": groups // self.groups}
        a_GT = rearrange(a_PN, "(g t) (a b) ... -> (g a) (t b) ...", **cut)
        return constrain(a_GT, "batch", "length", *(None for _ in a_GT.shape[2:]))


def shards_of(groups: int, tokens: int) -> Shards:
    """Of (groups, tokens) activations; one part off a mesh."""
    by_group = math.prod(mesh_axes("batch", groups).values())
    by_token = math.prod(mesh_axes("length", tokens).values())
    axis = "batch" if by_token == 1 else "length" if by_group == 1 else "part"
    return Shards(by_group, by_token, axis)


def _names(part) -> tuple[str, ...]:
    """A dimension's mesh axes: JAX tells one by its name, several in a tuple."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def per_shard(
    function: Callable,
    split: tuple[jax.Array, ...],
    whole: tuple[jax.Array, ...] = (),
    axes: tuple[tuple[str | None, ...], ...] = (),
    shard_axis: str = "batch",
):
    """function(*split, *whole), on a mesh by each device for its own part of `split`.

    The leading axis of every array of `split` and of the results counts the shards (`shards_of`,
    whose axis is `shard_axis`); each call sees one of them. Of each array of `whole`, a call sees
    the piece that its logical `axes` give to the device, with "embed" put together. Where several
    devices work on one part, with different pieces, their results add up.
    """
    rule = _rule.get()
    if rule is None:
        return function(*split, *whole)
    placed = rule((shard_axis,), split[0].shape[:1])
    cut = jax.sharding.PartitionSpec(placed.spec[0])
    own = set(_names(placed.spec[0]))
    pieces, gathers = [], []
    for named, a in zip(axes, whole, strict=True):
        spec = list(rule(named, a.shape).spec)
        # Put together by every device itself, so that gradients are summed into pieces; only
        # where devices with different pieces work on different shards.
        at = [n for n, axis in enumerate(named) if axis == "embed" and spec[n]]
        apart = [n for n in at if own.issuperset(_names(spec[n]))]
        gathers.append([(n, _names(spec[n])) for n in apart])
        pieces.append([None if n in at and n not in apart else s for n, s in enumerate(spec)])
    pieces = [jax.sharding.PartitionSpec(*spec) for spec in pieces]
    specs = (*(cut for _ in split), *pieces)
    varies = [{name for part in spec for name in _names(part)} for spec in specs]
    everywhere = set().union(*varies)

    def local(*arrays):
        arrays = list(arrays)
        for number, gather in enumerate(gathers, start=len(split)):
            for dimension, names in gather:
                arrays[number] = jax.lax.all_gather(
                    arrays[number], names, axis=dimension, tiled=True
                )
        # Every device has gradients of its own for what several of them hold; their sum counts.
        arrays = [
            jax.lax.pcast(a, tuple(everywhere - held), to="varying") if everywhere - held else a
            for a, held in zip(arrays, varies, strict=True)
        ]
        found = function(*arrays)
        partial = tuple(everywhere - varies[0])
        return jax.lax.psum(found, partial) if partial else found

    run = jax.shard_map(local, mesh=placed.mesh, in_specs=specs, out_specs=cut)
    return run(*split, *whole)
