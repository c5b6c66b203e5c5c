"""Draws docs/sharding.png: which device of a mesh holds which part of which array.

python scripts/draw_sharding.py docs/sharding.png
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from moe.model import sharding

# What it is, its logical axes, its shape, and which two of its dimensions are drawn (down, across).
ARRAYS = (
    ("tokens (B, T)", ("batch", "length"), (8, 8), (0, 1)),
    ("experts' weights (E, D, F)", ("expert", "embed", "mlp"), (8, 8, 8), (0, 1)),
    ("the same (E, D, F)", ("expert", "embed", "mlp"), (8, 8, 8), (0, 2)),
    ("attention's weights (D, H, K)", ("embed", "heads", None), (8, 8, 4), (0, 1)),
    ("router's weights (D, E)", ("embed", None), (8, 8), (0, 1)),
)
MESHES = (
    sharding.MeshShape(data=2, expert=4),
    sharding.MeshShape(data=1, fsdp=2, expert=2, tensor=2),
    sharding.MeshShape(data=1, fsdp=2, expert=2, sequence=2),
)
COLOURS = [plt.get_cmap("tab10")(i) for i in range(8)]


def draw(axis, axes, shape, sides, mesh) -> None:
    """Every device's block in its colour; devices that share a block share its area in stripes."""
    placed = sharding.sharding(mesh, axes, shape)
    blocks: dict[tuple, list[int]] = {}
    for device, index in placed.devices_indices_map(shape).items():
        down, across = (index[side].indices(shape[side])[:2] for side in sides)
        blocks.setdefault((down, across), []).append(device.id)
    for (down, across), holders in blocks.items():
        width = (across[1] - across[0]) / len(holders)
        for n, device in enumerate(sorted(holders)):
            corner = (across[0] + n * width, down[0])
            axis.add_patch(Rectangle(corner, width, down[1] - down[0], color=COLOURS[device]))
            middle = (corner[0] + width / 2, (down[0] + down[1]) / 2)
            axis.annotate(str(device), middle, ha="center", va="center", color="white", fontsize=7)
        edge = {"fill": False, "edgecolor": "black", "linewidth": 0.8}
        size = (across[1] - across[0], down[1] - down[0])
        axis.add_patch(Rectangle((across[0], down[0]), *size, **edge))
    axis.set(xlim=(0, shape[sides[1]]), ylim=(shape[sides[0]], 0), xticks=[], yticks=[])


def main(path: str) -> None:
    size = (2.4 * len(ARRAYS), 2.5 * len(MESHES))
    figure, grid = plt.subplots(len(MESHES), len(ARRAYS), figsize=size, layout="constrained")
    for row, shape in zip(grid, MESHES, strict=True):
        mesh = shape.build()
        said = "\n".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
        row[0].set_ylabel(said, rotation=0, ha="right", va="center", labelpad=8)
        for axis, (title, axes, dims, sides) in zip(row, ARRAYS, strict=True):
            draw(axis, axes, dims, sides, mesh)
            letters = title[title.index("(") + 1 : -1].split(", ")
            axis.set_xlabel(f"{letters[sides[1]]} →", fontsize=8)
            if axis is not row[0]:
                axis.set_ylabel(f"← {letters[sides[0]]}", fontsize=8)
            axis.set_title(title, fontsize=9)
    figure.suptitle(
        "A black frame is one part of an array; numbers and colours are the devices that hold it, "
        "each of them all of it"
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
