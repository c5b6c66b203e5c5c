"""TPU chips and slices of them, with the figures of Google Cloud's pages on TPU versions."""

from dataclasses import dataclass
import math
import re

from moe.errors import nearest


@dataclass(frozen=True)
class Chip:
    """The peak figures of one TPU chip."""

    flops: float  # bfloat16, per second
    memory: float  # bytes
    memory_bandwidth: float  # bytes per second
    interconnect: float  # bytes per second, over all links
    dimensions: int  # of the torus
    devices: int = 1  # JAX devices on the chip, among which all figures are divided


GIB = 2**30
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 3),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 2),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 3),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, 2),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 1200e9, 3, devices=2),
}


@dataclass(frozen=True)
class Topology:
    """A TPU slice, such as v5p:8x8x16, or several equal ones, such as 2*v5p:8x8x16."""

    name: str
    chip: Chip
    chips: int  # of all slices
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """The name of one of the slices."""
        return self.name.split("*")[-1]

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def memory(self) -> float:
        """Bytes of one device."""
        return self.share(self.chip.memory)

    def share(self, of_chip: float) -> float:
        """One device's share of a chip's figure."""
        return of_chip / self.chip.devices

    @classmethod
    def read(cls, name: str) -> "Topology":
        """Parse KIND:AxBxC, N*KIND:AxBxC or KIND-N; ValueError where that names no slice."""
        number, _, one = name.rpartition("*")
        one = shape_of_accelerator(one)
        if number and not re.fullmatch(r"[1-9]\d*", number):
            raise ValueError(f"--topology={name}: several slices are written as 2*v5p:4x4x4")
        kind, _, shape = one.partition(":")
        if kind not in CHIPS:
            hint = nearest(kind, CHIPS) or f"; one of {', '.join(CHIPS)}"
            raise ValueError(f"--topology={name}: no TPU is called {kind!r}{hint}")
        chip = CHIPS[kind]
        sides = shape.split("x")
        if not re.fullmatch(r"\d+(x\d+)*", shape) or len(sides) != chip.dimensions:
            example = "x".join(["4"] * chip.dimensions)
            raise ValueError(f"--topology={name}: {kind} has slices such as {kind}:{example}")
        slices = int(number or 1)
        name = f"{number}*{one}" if number else one
        return cls(name, chip, slices * math.prod(map(int, sides)), slices)


def shape_of_accelerator(name: str) -> str:
    """The slice KIND:AxB of Google Cloud's accelerator type KIND-N; other names are returned as is.

    N counts chips (v5e, v6e) or cores, two per chip (v4, v5p, tpu7x). The slice has sides that are
    powers of two, as equal as possible: v5e-8 is v5e:2x4, v5p-64 is v5p:2x4x4.
    """
    match = re.fullmatch(r"(v5litepod|\w+)-(\d+)", name)
    if match is None:
        return name
    kind, number = match[1].replace("v5litepod", "v5e"), int(match[2])
    if kind not in CHIPS:
        return f"{kind}:"  # Topology.read refuses it and names the kinds
    dimensions = CHIPS[kind].dimensions
    chips, rest = divmod(number, dimensions - 1)  # kinds with a 3D torus count cores
    if rest or chips < 1 or chips & (chips - 1):
        return f"{kind}:"
    sides = [1] * dimensions
    if dimensions == 3 and chips >= 4:  # a board of four is their smallest slice
        sides, chips = [1, 2, 2], chips // 4
    while chips > 1:
        sides, chips = sorted([2 * min(sides), *sorted(sides)[1:]]), chips // 2
    if sides == [1, 2, 2]:
        sides = [2, 2, 1]
    return f"{kind}:{'x'.join(map(str, sides))}"
