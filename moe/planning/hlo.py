"""Reads a compiled program's HLO text: its collectives, how often each runs, over which mesh axes.

Sizes in bytes are those of one device.
"""

from dataclasses import dataclass
import math
import re
from typing import Any

import numpy as np

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    "collective-permute",
)
_PAIRS = ("all-gather", "collective-permute", "ragged-all-to-all")  # starts give operand and result
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1, "f64": 8}
_LINE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\((.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_EXCHANGE = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) (?:ragged-)?all-to-all(-start)?\(")
_DONE = re.compile(r" (?:ragged-)?all-to-all-done\(%?([\w.-]+)\)")
_FLOATS = re.compile(r"(?:bf16|f16|f32)\[")
_MATMUL = re.compile(r"dot_general|ragged[_-]dot")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)")


@dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
        kind: one of COLLECTIVES.
        axes: the mesh axes that the devices of a group differ in, such as "fsdp+expert".
        devices: how many a group has.
        bytes: size of the result on one device.
        times: how often one run of the program runs it.
    """

    kind: str
    axes: str
    devices: int
    bytes: int
    times: int

    @property
    def moved(self) -> float:
        """Bytes that one device sends in one run of the program, by the best known algorithm."""
        n = max(self.devices, 1)
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
        }.get(self.kind, (n - 1) / n)
        return self.times * self.bytes * share


def collectives(text: str, axis_names: tuple[str, ...], sizes: tuple[int, ...]) -> list[Collective]:
    """Every collective of a compiled program, for a mesh with axes of these names and sizes."""
    bodies = computations(text)
    times = runs(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            if match := _LINE.search(line):
                shapes, kind, start, rest = match.groups()
                group = group_of(rest, sizes)
                axes = axes_of(group, axis_names, sizes)
                pair = start and kind in _PAIRS  # (operand, result, flags)
                if start and shapes.startswith("(("):  # ((operands), results, flags)
                    shapes, pair = shapes.partition("), ")[2].replace("u32[]", ""), False
                # Otherwise several arrays are as many collectives that XLA has combined.
                size = result_bytes(shapes, whole=not pair)
                found.append(Collective(kind, axes, len(group), size, times.get(name, 1)))
    return found


def by_kind(found: list[Collective]) -> list[dict[str, Any]]:
    """A row for each kind and axes: the number of collectives, their runs, and bytes moved."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in found:
        start = {"kind": one.kind, "axes": one.axes, "count": 0, "times": 0, "moved": 0.0}
        row = rows.setdefault((one.kind, one.axes), start)
        row["count"] += 1
        row["times"] += one.times
        row["moved"] += one.moved
    return [rows[key] for key in sorted(rows)]


@dataclass(frozen=True)
class Exchange:
    """An all-to-all of rows, and the names of the matmuls between its start and its end."""

    name: str
    matmuls: tuple[str, ...]


def exchanges(text: str) -> list[Exchange]:
    """Every all-to-all of floating-point numbers, in the order of a compiled program.

    An all-to-all that the program waits for has no matmuls.
    """
    found = []
    for lines in computations(text).values():
        started: dict[str, int] = {}
        for number, line in enumerate(lines):
            if (match := _EXCHANGE.match(line)) and _FLOATS.search(match[2]):
                if match[3]:
                    started[match[1]] = number
                else:
                    found.append(Exchange(name_of(line), ()))
            elif (done := _DONE.search(line)) and done[1] in started:
                first = started[done[1]]
                between = (name_of(line) for line in lines[first + 1 : number])
                matmuls = tuple(name for name in between if _MATMUL.search(name))
                found.append(Exchange(name_of(lines[first]), matmuls))
    return found


def name_of(line: str) -> str:
    """An instruction's op_name, which names the place in the model's source; empty without one."""
    match = re.search(r'op_name="([^"]*)"', line)
    return match[1] if match else ""


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each of the program's functions, by name; the main function is ENTRY."""
    found: dict[str, list[str]] = {}
    inside = None
    for line in text.splitlines():
        if not line.startswith(" ") and (match := _HEAD.match(line)):
            inside = found.setdefault("ENTRY" if match[1] else match[2], [])
        elif line.rstrip() == "}":  # a kernel's attributes may begin a line with braces, too
            inside = None
        elif inside is not None:
            inside.append(line)
    return found


def runs(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each function runs in one run of the program; unknown loops count once."""
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    for name, lines in bodies.items():
        for line in lines:
            if match := _WHILE.search(line):
                known = _TRIPS.search(line)
                often = int(known[1]) if known else trips(bodies.get(match[1], []))
                calls[name].append((match[2], often))
            elif match := _CALLED.search(line):
                calls[name] += [(called.strip(" %"), 1) for called in match[1].split(",")]
    times: dict[str, int] = {}

    def visit(name: str, often: int) -> None:
        times[name] = times.get(name, 0) + often
        for called, loops in calls.get(name, []):
            visit(called, often * loops)

    visit("ENTRY", 1)
    return times


def trips(condition: list[str]) -> int:
    """Iterations of a loop that counts up to the only constant of its condition, else 1."""
    limits = {match[1] for line in condition if (match := re.search(r" constant\((\d+)\)", line))}
    return int(limits.pop()) if len(limits) == 1 else 1


def result_bytes(shapes: str, *, whole: bool = False) -> int:
    """Bytes of the largest array of a result such as (f32[8,16]{1,0}, f32[64,16]{1,0}).

    whole: of all arrays together.
    """
    sizes = [
        BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    ]
    return sum(sizes) if whole else max(sizes, default=0)


def group_of(attributes: str, sizes: tuple[int, ...]) -> list[int]:
    """The devices of a collective's first group, in any of the notations of XLA."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(n) for n in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, dims = ([int(n) for n in text.split(",")] for text in iota.groups()[:2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose([int(n) for n in iota[3].split(",")]) if iota[3] else ids
        return ids.reshape(shape)[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if named:
        return _group_of_axes(*named.groups())
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return [int(n) for n in pairs.groups()]
    return list(range(math.prod(sizes)))  # without groups, one of all devices


def _group_of_axes(mesh: str, chosen: str) -> list[int]:
    """The first group over the axes `chosen` of a mesh, such as "'a'=2,'b'=4" and "'b'".

    'b':(2)2 stands for a sub-axis of b: of size 2, below a sub-axis of size 2.
    """
    axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)]
    ids = np.arange(math.prod(size for _, size in axes)).reshape([size for _, size in axes])
    sub_axes = {
        name: (int(before or 1), int(size) if size else None)
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    index: list[Any] = []
    for name, size in axes:
        before, length = sub_axes.get(name, (1, 1))
        length = size if length is None else length
        stride = size // before // length  # between two neighbours of the group
        index.append(slice(0, length * stride, stride))
    return ids[tuple(index)].ravel().tolist()


def axes_of(group: list[int], names: tuple[str, ...], sizes: tuple[int, ...]) -> str:
    """The mesh axes in which a group's devices differ; "none" for a group of one device."""
    places = np.stack(np.unravel_index(group, sizes))
    differ = [name for name, row in zip(names, places, strict=True) if len(set(row)) > 1]
    return "+".join(differ) or "none"
