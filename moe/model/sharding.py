"""The mesh, and the sharding rules: one table from logical axes to mesh axes.

Mesh axes: data (replicas), fsdp (parameters sharded along the model width), expert, tensor, and
sequence (tokens of long sequences: only keys, values and router statistics are gathered).
"""

from collections.abc import Sequence
import dataclasses
import math

import gin
import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from routing.ranges import MeshSize

MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")

# Logical axis -> mesh axes. "embed" shards parameters only: activations don't name their width.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("sequence",),
    "shard": ("data", "fsdp", "expert", "sequence"),  # shards of batch and length
    "expert_group": ("data", "fsdp"),
    "slot": ("sequence",),
    "expert": ("expert",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "layer": (),
    "segment": (),
}


@gin.configurable
@dataclasses.dataclass(frozen=True)
class MeshShape:
    """The size of each mesh axis; one may be -1, for all devices that the others leave.

    Attributes:
        data: shards the sequences of a batch.
        fsdp: shards sequences, and parameters along the model width.
        expert: shards sequences, and experts.
        tensor: shards heads, hidden units and the vocabulary.
        sequence: shards every sequence's tokens.
    """

    data: MeshSize = -1
    fsdp: MeshSize = 1
    expert: MeshSize = 1
    tensor: MeshSize = 1
    sequence: MeshSize = 1

    def build(self, devices: Sequence | None = None) -> Mesh:
        """The mesh over all devices.

        Raises:
            ValueError: the sizes don't multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        said = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        fixed = math.prod(size for size in sizes if size != -1)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"MeshShape({said}): sizes are at least 1, and one of them may be -1")
        if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
            raise ValueError(
                f"MeshShape({said}) needs {'a multiple of ' if -1 in sizes else ''}{fixed} "
                f"devices, but there are {len(devices)}; set one axis to -1 to use what is there"
            )
        sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
        # Auto axes: the compiler chooses shardings where no logical constraint says one.
        auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
        slices = len({getattr(device, "slice_index", None) for device in devices})
        if sizes[0] % slices:
            raise ValueError(
                f"MeshShape({said}): the devices are {slices} slices, whose slow network only the "
                f"data axis may cross; make MeshShape.data a multiple of {slices}"
            )
        # An axis may take part of a dimension of a TPU's torus: 8 of 4 x 4 x 4, say.
        if slices == 1:
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_hybrid_device_mesh(
                [sizes[0] // slices, *sizes[1:]],
                [slices, *(1 for _ in sizes[1:])],
                devices,
                allow_split_physical_axes=True,
            )
        return Mesh(grid, MESH_AXES, axis_types=auto)


def spec(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """The mesh axes of each dimension; one that the mesh does not divide is replicated."""
    used: set[str] = set()
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        names = [n for n in RULES[axis] if n not in used] if axis else []
        names = [n for n in names if mesh.shape[n] > 1]
        if names and size % math.prod(mesh.shape[n] for n in names):
            names = []
        used.update(names)
        entries.append(tuple(names) if names else None)
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, spec(mesh, axes, shape))


def rule(mesh: Mesh):
    """The rule for `layers.logical_axes.sharding_rules`; None on a single device."""
    if mesh.size == 1:
        return None
    return lambda axes, shape: sharding(mesh, axes, shape)


def batch_shards(mesh: Mesh) -> int:
    """Into how many shards the mesh cuts a batch's sequences."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def by_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays with a leading axis of sequences."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def check_batch(mesh: Mesh, groups: int, num_experts: int | None) -> None:
    """Raise ValueError where groups of sequences or experts don't divide over the mesh."""
    shards = batch_shards(mesh)
    if groups % shards:
        raise ValueError(
            f"{groups} groups of sequences per micro-batch don't divide over data * fsdp * expert "
            f"= {shards} devices; make train.batch_size a multiple of {shards} times "
            "MoELayer.sequences_per_group * train.accumulate"
        )
    if num_experts is not None and num_experts % mesh.shape["expert"]:
        raise ValueError(
            f"MoELayer.num_experts={num_experts} doesn't divide over MeshShape.expert="
            f"{mesh.shape['expert']}; choose a multiple"
        )


def check_length(mesh: Mesh, length: int, per_group: int) -> None:
    """Raise ValueError where a sequence, or a group of several, can't be cut over the mesh."""
    cut = mesh.shape["sequence"]
    if length % cut:
        raise ValueError(
            f"train.sequence_length={length} doesn't divide over MeshShape.sequence={cut}; choose "
            "a multiple"
        )
    if cut > 1 and per_group > 1:
        raise ValueError(
            f"MeshShape.sequence={cut} cuts groups along their tokens, which takes groups of one "
            f"sequence; set MoELayer.sequences_per_group = 1 (it is {per_group})"
        )
