"""How long a collective takes over the links of a TPU, or over NVLink and the network of GPUs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe.planning.chips import NODE, Topology

ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")


def seconds(row: dict[str, Any], mesh: Mapping[str, int], topology: Topology) -> float:
    """Least seconds of the collectives of a row of `hlo.by_kind`.

    A GPU sends over NVLink inside its node of eight and over its own network port to others, both
    at once. Of an all-to-all, the share for other nodes takes the port. Any other collective
    crosses between nodes once for all members of a node, whose ports share it.

    mesh: name and size of each axis, the devices numbered along the last one first.
    """
    chip = topology.chip
    if not topology.is_gpu:
        return row["moved"] / topology.share(chip.interconnect)
    devices, members = group(row["axes"], mesh)
    if members == devices:
        return row["moved"] / chip.interconnect
    if row["kind"] in ALL_TO_ALL:
        outside = row["moved"] * (devices - members) / (devices - 1)
        return max((row["moved"] - outside) / chip.interconnect, outside / chip.network)
    return max(row["moved"] / chip.interconnect, row["moved"] / members / chip.network)


def group(axes: str, mesh: Mapping[str, int]) -> tuple[int, int]:
    """Devices of a group over axes such as "fsdp+expert", and those of them in one node."""
    numbers = np.zeros(1, int)
    stride = 1
    for axis, size in reversed(tuple(mesh.items())):
        if axis in axes.split("+"):
            numbers = (numbers[:, None] + stride * np.arange(size)).ravel()
        stride *= size
    return len(numbers), int((numbers < NODE).sum())
