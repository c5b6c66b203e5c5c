"""Logical axes of activations: layers name them, sharding rules map them to the axes of a mesh.

Layers call `logical_constraint(x_GTD, "batch", None, None)`, which does nothing outside
`with sharding_rules(rule):`.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import math
from typing import Any, NamedTuple

from einops import rearrange
import jax

Rule = Callable[[tuple[str | None, ...], tuple[int, ...]], jax.sharding.NamedSharding]
_rule: contextvars.ContextVar[Rule | None] = contextvars.ContextVar("rule", default=None)
_device: contextvars.ContextVar[Any] = contextvars.ContextVar("device", default=None)


@contextlib.contextmanager
def sharding_rules(rule: Rule | None, on: Any = None) -> Iterator[None]:
    """A context in which `logical_constraint` shards arrays by `rule`.

    on: a device that the program is for, or its platform and kind; needed where there is no rule
        and the device isn't JAX's default: a program compiled for one chip that is elsewhere.
    """
    tokens = _rule.set(rule), _device.set(on)
    try:
        yield
    finally:
        _rule.reset(tokens[0])
        _device.reset(tokens[1])


def has_mesh() -> bool:
    """Whether sharding rules are in force: arrays are spread over several devices."""
    return _rule.get() is not None


def logical_constraint(x: jax.Array, *axes: str | None) -> jax.Array:
    """x with the sharding of its logical axes: for each dimension a name, or None for any."""
    rule = _rule.get()
    if rule is None:
        return x
    assert len(axes) == x.ndim, (axes, x.shape)
    return jax.lax.with_sharding_constraint(x, rule(axes, x.shape))


def device() -> Any:
    """A device that the program runs on: of the mesh, or JAX's first one."""
    rule, on = _rule.get(), _device.get()
    if rule is None:
        return jax.devices()[0] if on is None else on
    return rule((), ()).mesh.devices.flat[0]  # pyright: ignore[reportOptionalMemberAccess]


def platform() -> str:
    """The platform that the program runs on: "cpu", "gpu" or "tpu"."""
    return device().platform


def mesh_axes(axis: str, size: int) -> dict[str, int]:
    """Name and size of the mesh axes that shard a dimension of this size; none off a mesh."""
    rule = _rule.get()
    if rule is None:
        return {}
    sharding = rule((axis,), (size,))
    return {name: sharding.mesh.shape[name] for name in _names(sharding.spec[0])}


def is_cut(axis: str) -> bool:
    """Whether the mesh shards dimensions of this logical axis, where they divide."""
    return bool(mesh_axes(axis, 0))


def splits_fully(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> bool:
    """Whether every device holds its own part of an array with these logical axes."""
    rule = _rule.get()
    if rule is None:
        return True
    sharding = rule(axes, shape)
    parts = math.prod(sharding.mesh.shape[n] for entry in sharding.spec for n in _names(entry))
    return parts == sharding.mesh.size


def per_device(
    function: Callable,
    arrays: tuple[jax.Array, ...],
    axes: tuple[tuple[str | None, ...], ...],
) -> jax.Array:
    """function(*arrays), which on a mesh every device calls with its part of the arrays.

    For kernels that can't say how their results vary over a mesh. The result has the axes of the
    first array, of which every device must hold its own part (`splits_fully`): so nothing that
    the unchecked program calls replicated could differ.
    """
    rule = _rule.get()
    if rule is None:
        return function(*arrays)
    assert splits_fully(axes[0], arrays[0].shape), (axes[0], arrays[0].shape)
    shardings = [rule(named, a.shape) for named, a in zip(axes, arrays, strict=True)]
    specs = tuple(sharding.spec for sharding in shardings)
    run = jax.shard_map(
        function,
        mesh=shardings[0].mesh,
        in_specs=specs,
        out_specs=specs[0],
        check_vma=False,
    )
    return run(*arrays)


class Shards(NamedTuple):
    """How a mesh shards groups of tokens: into P = groups * tokens shards, one for each device.

    Attributes:
        groups: shards along the axis of groups.
        tokens: shards along the axis of tokens.
        axis: the logical axis of P.
    """

    groups: int
    tokens: int
    axis: str

    @property
    def count(self) -> int:
        return self.groups * self.tokens

    def split(self, array: jax.Array) -> jax.Array:
        """(P, G * T / P, ...): an array (G, T, ...) shard by shard."""
        cut = {"g": self.groups, "t": self.tokens}
        shards = rearrange(array, "(g a) (t b) ... -> (g t) (a b) ...", **cut)
        return logical_constraint(shards, self.axis, *(None for _ in shards.shape[1:]))

    def merge(self, shards: jax.Array, groups: int) -> jax.Array:
        """(G, T, ...): the inverse of `split`."""
        cut = {"g": self.groups, "a": groups // self.groups}
        array = rearrange(shards, "(g t) (a b) ... -> (g a) (t b) ...", **cut)
        return logical_constraint(array, "batch", "length", *(None for _ in array.shape[2:]))


def shards_of(groups: int, tokens: int) -> Shards:
    """The shards of activations (groups, tokens, ...); a single one off a mesh."""
    by_group = math.prod(mesh_axes("batch", groups).values())
    by_token = math.prod(mesh_axes("length", tokens).values())
    axis = "batch" if by_token == 1 else "length" if by_group == 1 else "shard"
    return Shards(by_group, by_token, axis)


def _names(entry) -> tuple[str, ...]:
    """The mesh axes in an entry of a PartitionSpec: None, one name, or a tuple of names."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def per_shard(
    function: Callable,
    split: tuple[jax.Array, ...],
    whole: tuple[jax.Array, ...] = (),
    axes: tuple[tuple[str | None, ...], ...] = (),
    shard_axis: str = "batch",
):
    """function(*split, *whole), which on a mesh every device calls with its shard of the arrays.

    Args:
        function: called with one shard of each array.
        split: arrays whose leading axis counts the shards (`shards_of`), as that of the results.
        whole: arrays such as weights. A device gets its shard of them by their logical axes, but
            all of "embed", which is all-gathered.
        axes: the logical axes of each array of `whole`.
        shard_axis: the logical axis of the shards.

    Returns:
        The results, shard by shard. Where several devices hold the same shard of `split` and
        different shards of `whole`, their results are summed.
    """
    rule = _rule.get()
    if rule is None:
        return function(*split, *whole)
    sharding = rule((shard_axis,), split[0].shape[:1])
    split_spec = jax.sharding.PartitionSpec(sharding.spec[0])
    shard_names = set(_names(sharding.spec[0]))
    whole_specs, gathers = [], []
    for named, a in zip(axes, whole, strict=True):
        spec = list(rule(named, a.shape).spec)
        # Each device gathers "embed" inside, whose transpose reduce-scatters the gradients; only
        # where devices that hold different parts of "embed" have different shards of `split`.
        embed = [n for n, axis in enumerate(named) if axis == "embed" and spec[n]]
        inside = [n for n in embed if shard_names.issuperset(_names(spec[n]))]
        gathers.append([(n, _names(spec[n])) for n in inside])
        entries = [None if n in embed and n not in inside else s for n, s in enumerate(spec)]
        whole_specs.append(jax.sharding.PartitionSpec(*entries))
    specs = (*(split_spec for _ in split), *whole_specs)
    varies = [{name for entry in spec for name in _names(entry)} for spec in specs]
    everywhere = set().union(*varies)

    def local(*arrays):
        arrays = list(arrays)
        for number, gather in enumerate(gathers, start=len(split)):
            for dimension, names in gather:
                arrays[number] = jax.lax.all_gather(
                    arrays[number], names, axis=dimension, tiled=True
                )
        # Arrays that several devices hold get different gradients on each; pcast's transpose
        # sums them.
        arrays = [
            jax.lax.pcast(a, tuple(everywhere - held), to="varying") if everywhere - held else a
            for a, held in zip(arrays, varies, strict=True)
        ]
        found = function(*arrays)
        partial = tuple(everywhere - varies[0])
        return jax.lax.psum(found, partial) if partial else found

    run = jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=split_spec)
    return run(*split, *whole)
