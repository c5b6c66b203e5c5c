"""TPU chips: what one of them has, by Google Cloud's pages on TPU versions."""

from dataclasses import dataclass
import math
import re

from moe.errors import nearest


@dataclass(frozen=True)
class Chip:
    """Of one chip: bfloat16 FLOP/s, bytes of memory, bytes/s of memory and of the interconnect."""

    flops: float
    memory: float
    memory_bandwidth: float
    interconnect: float
    dimensions: int  # of the torus


GIB = 2**30
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 3),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 2),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 3),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, 2),
}


@dataclass(frozen=True)
class Topology:
    """A slice: such as v5p:8x8x16."""

    name: str
    chip: Chip
    chips: int

    @classmethod
    def read(cls, name: str) -> "Topology":
        """From KIND:AxBxC; ValueError for what is no slice."""
        kind, _, shape = name.partition(":")
        if kind not in CHIPS:
            hint = nearest(kind, CHIPS) or f"; one of {', '.join(CHIPS)}"
            raise ValueError(f"--topology={name}: no TPU is called {kind!r}{hint}")
        chip = CHIPS[kind]
        parts = shape.split("x")
        if not re.fullmatch(r"\d+(x\d+)*", shape) or len(parts) != chip.dimensions:
            example = "x".join(["4"] * chip.dimensions)
            raise ValueError(f"--topology={name}: {kind} has slices such as {kind}:{example}")
        return cls(name, chip, math.prod(map(int, parts)))
