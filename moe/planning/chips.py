"""TPU slices and NVIDIA GPUs: what a chip computes, holds and sends, by their makers' figures."""

from dataclasses import dataclass
import math
import re
from typing import NamedTuple

from moe.errors import nearest


@dataclass(frozen=True)
class Chip:
    """The peak figures of one chip: a TPU's, or a GPU."""

    flops: float  # bfloat16, per second, without sparsity
    memory: float  # bytes
    memory_bandwidth: float  # bytes per second
    interconnect: float  # bytes per second, over all links; a GPU's: sent over NVLink
    dimensions: int = 0  # of a TPU's torus
    devices: int = 1  # JAX devices on the chip, among which all figures are divided
    network: float = 0.0  # bytes per second that a GPU sends to other nodes
    kind: str = "TPU"  # as JAX names the device


GIB = 2**30
NODE = 8  # GPUs that NVLink joins
# Google Cloud's pages on TPU versions.
TPUS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 3),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 2),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 3),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, 2),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 1200e9, 3, devices=2),
}
# FLOPs, bandwidth and NVLink (half of what is given for both directions): NVIDIA's data sheets of
# the H100 (SXM), H200 (SXM) and DGX B200. Memory: what the driver reports, by the descriptions of
# cards in XLA's sources (xla/backends/gpu/target_config/specs). Network: the user guides of DGX
# H100, H200 and B200, one port of 400 Gb/s for each GPU.
GPUS = {
    "h100": Chip(989e12, 84942979072, 3350e9, 450e9, network=50e9, kind="NVIDIA H100"),
    "h200": Chip(989e12, 151397597184, 4800e9, 450e9, network=50e9, kind="NVIDIA H200"),
    "b200": Chip(2250e12, 191514411008, 8000e9, 900e9, network=50e9, kind="NVIDIA B200"),
}
CHIPS = TPUS | GPUS


class DeviceKind(NamedTuple):
    """What the choice of kernels reads of a device that need not be here."""

    platform: str
    device_kind: str


@dataclass(frozen=True)
class Topology:
    """A TPU slice, such as v5p:8x8x16, several equal ones, such as 2*v5p:8x8x16, or h100:64."""

    name: str
    chip: Chip
    chips: int  # of all slices
    slices: int = 1

    @property
    def is_gpu(self) -> bool:
        return self.chip.dimensions == 0

    @property
    def device(self) -> DeviceKind:
        """A device of it, to choose kernels for."""
        return DeviceKind("gpu" if self.is_gpu else "tpu", self.chip.kind)

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
        """Parse KIND:AxBxC, N*KIND:AxBxC, KIND-N or GPU:N; ValueError where that names nothing."""
        number, _, one = name.rpartition("*")
        one = shape_of_accelerator(one)
        if number and not re.fullmatch(r"[1-9]\d*", number):
            raise ValueError(f"--topology={name}: several slices are written as 2*v5p:4x4x4")
        kind, _, shape = one.partition(":")
        if kind not in CHIPS:
            hint = nearest(kind, CHIPS) or f"; one of {', '.join(CHIPS)}"
            raise ValueError(f"--topology={name}: no TPU or GPU is called {kind!r}{hint}")
        if kind in GPUS:
            return cls(name, GPUS[kind], gpus(name, kind, shape, one_node=not number))
        chip = TPUS[kind]
        sides = shape.split("x")
        if not re.fullmatch(r"\d+(x\d+)*", shape) or len(sides) != chip.dimensions:
            example = "x".join(["4"] * chip.dimensions)
            raise ValueError(f"--topology={name}: {kind} has slices such as {kind}:{example}")
        slices = int(number or 1)
        name = f"{number}*{one}" if number else one
        return cls(name, chip, slices * math.prod(map(int, sides)), slices)


def gpus(name: str, kind: str, count: str, *, one_node: bool) -> int:
    """How many GPUs `count` says; ValueError for what nodes of eight don't make."""
    if not one_node or not re.fullmatch(r"[1-9]\d*", count):
        raise ValueError(
            f"--topology={name}: GPUs are counted, as {kind}:{NODE} or {kind}:{8 * NODE}"
        )
    if int(count) > NODE and int(count) % NODE:
        whole = -(-int(count) // NODE) * NODE
        raise ValueError(
            f"--topology={name}: more than {NODE} GPUs come in nodes of {NODE}; {kind}:{whole}?"
        )
    return int(count)


def shape_of_accelerator(name: str) -> str:
    """The slice KIND:AxB of Google Cloud's accelerator type KIND-N; other names are returned as is.

    N counts chips (v5e, v6e) or cores, two per chip (v4, v5p, tpu7x). The slice has sides that are
    powers of two, as equal as possible: v5e-8 is v5e:2x4, v5p-64 is v5p:2x4x4.
    """
    match = re.fullmatch(r"(v5litepod|\w+)-(\d+)", name)
    if match is None:
        return name
    kind, number = match[1].replace("v5litepod", "v5e"), int(match[2])
    if kind not in TPUS:
        return f"{kind}:"  # Topology.read refuses it and names the kinds
    dimensions = TPUS[kind].dimensions
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
