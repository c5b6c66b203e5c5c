"""What `moe plan` prints of what it found."""

from collections.abc import Collection
from typing import Any

from moe.chips import GIB

STATE = ("parameters", "optimizer", "router_state")


def of_state(held: dict[str, int]) -> int:
    """The bytes that a program is given, before it does anything."""
    return sum(held[name] for name in STATE)


def told(held: dict[str, int], kinds: Collection[str]) -> str:
    """The bytes of some kinds, in the order in which they stand."""
    return ", ".join(
        f"{name.replace('_', ' ')} {size / GIB:.2f} GiB"
        for name, size in held.items()
        if name in kinds
    )


def by_counting(held: dict[str, int]) -> str:
    """What a step holds beside its state, where that can be counted."""
    if "total" not in held:
        return "by counting  only the state, on a mesh with a tensor or sequence axis"
    rest = told(held, {name for name, size in held.items() if size} - {*STATE, "total"})
    return f"by counting  {held['total'] / GIB:.1f} GiB: that, and {rest}"


def report(found: dict[str, Any]) -> str:
    """What a person reads."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
    held, room = found["bytes_per_chip"], found["memory_per_chip"]
    state = of_state(held)
    lines = [
        f"{found['topology']}: {found['chips']:,} chips; mesh {mesh or 'of one'}",
        f"parameters   {found['parameters_total']:,} total, {found['parameters_active']:,} active",
        f"a step       {found['tokens_per_step']:,} tokens, {found['flops_per_step']:.3g} FLOPs; "
        f"{1e3 * found['seconds_of_products_at_peak']:,.1f} ms at every chip's peak",
        f"per device   {told(held, STATE)}",
        by_counting(held),
    ]
    compiled = found["compiled"]
    if compiled is None:
        if "total" in held:
            fits = "fits" if held["total"] <= room else "does not fit"
            size = f"{held['total'] / GIB:.1f} of {room / GIB:.0f} GiB per device"
            lines.append(f"{fits} by counting: {size}")
        lines.append(f"not compiled: {found['reason']}")
        lines.append("  pip install 'moe-routing[plan]' gives the compiler (libtpu)")
        return "\n".join(lines)
    if not compiled["fits"]:
        lines.append(f"does not fit: {compiled['refused']}")
        if state > room:
            lines.append(
                f"  the state alone takes {state / GIB:.1f} of {room / GIB:.0f} GiB: it needs more "
                "chips, or larger fsdp, expert or tensor axes"
            )
        else:
            lines.append("  nor with more micro-batches and everything recomputed: more chips")
        return "\n".join(lines)
    lines += of_program(compiled)
    line = found["roofline"]
    lines += [
        f"roofline     products {1e3 * line['products']:,.1f} ms, memory at least "
        f"{1e3 * line['memory']:,.1f} ms, interconnect {1e3 * line['interconnect']:,.1f} ms",
        f"utilisation  at most {line['utilisation_if_all_overlaps']:.2f} where all of it overlaps, "
        f"{line['utilisation_if_nothing_overlaps']:.2f} where nothing does",
    ]
    fits = f"{compiled['total'] / GIB:.1f} of {room / GIB:.0f} GiB per device"
    if change := found.get("change"):
        lines.append("does not fit as it is; the cheapest change with which it does:")
        lines += [f'  --gin_bindings="{setting}"' for setting in change]
        lines.append(f"then it takes {fits}")
    else:
        lines.append(f"fits: {fits}")
    return "\n".join(lines)


def of_program(compiled: dict[str, Any]) -> list[str]:
    """What the compiler made of the step: its size, and what travels."""
    lines = [
        f"compiled     in {compiled['seconds']:.0f} s: arguments "
        f"{compiled['arguments'] / GIB:.2f} GiB, temporaries {compiled['temporaries'] / GIB:.2f} "
        "GiB per device",
        "collectives of a step, by the mesh axes they cross, and what a device sends:",
    ]
    for row in compiled["collectives"]:
        size = f"{row['moved'] / 2**20:10,.1f} MiB"
        lines.append(f"  {row['times']:5} x {row['kind']:20} {row['axes']:22} {size}")
    if exchanges := compiled["exchanges"]:
        beside = sum(exchange["products_beside"] > 0 for exchange in exchanges)
        shared = sum(exchange["of_shared_experts"] > 0 for exchange in exchanges)
        lines.append(
            f"exchanges    of rows and experts: {len(exchanges)} in the program, {beside} of them "
            f"while products run, {shared} while shared experts do"
        )
    return lines
