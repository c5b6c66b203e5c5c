"""The findings of `moe plan` as text."""

from collections.abc import Collection
from typing import Any

from moe.planning import wheels
from moe.planning.chips import GIB, GPUS

STATE = ("parameters", "optimizer", "router_state")


def of_state(held: dict[str, int]) -> int:
    """Bytes of parameters, optimizer state and router state."""
    return sum(held[name] for name in STATE)


def sizes(held: dict[str, int], kinds: Collection[str]) -> str:
    """The sizes of these kinds, such as "parameters 1.00 GiB, optimizer 2.00 GiB"."""
    return ", ".join(
        f"{name.replace('_', ' ')} {size / GIB:.2f} GiB"
        for name, size in held.items()
        if name in kinds
    )


def by_counting(held: dict[str, int]) -> str:
    """The line with a step's counted bytes beside its state, where they can be counted."""
    if "total" not in held:
        return "by counting  only the state, on a mesh with a tensor or sequence axis"
    rest = sizes(held, {name for name, size in held.items() if size} - {*STATE, "total"})
    return f"by counting  {held['total'] / GIB:.1f} GiB: that, and {rest}"


def milliseconds(seconds: float) -> str:
    """Such as "1,125.0 ms" or "0.022 ms"."""
    return f"{1e3 * seconds:,.1f} ms" if seconds >= 1e-3 else f"{1e3 * seconds:.2g} ms"


def counted_report(found: dict[str, Any]) -> str:
    """The findings without the compiler, and whether the step would fit by them."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
    held, room = found["bytes_per_chip"], found["memory_per_chip"]
    lines = [
        f"{found['topology']}: {found['chips']:,} chips; mesh {mesh or 'of one'}",
        f"parameters   {found['parameters_total']:,} total, {found['parameters_active']:,} active",
        f"a step       {found['tokens_per_step']:,} tokens, {found['flops_per_step']:.3g} FLOPs; "
        f"{milliseconds(found['seconds_of_products_at_peak'])} at every chip's peak",
        f"per device   {sizes(held, STATE)}",
        by_counting(held),
        *([f"left out     {found['left_out']}"] if found.get("left_out") else []),
    ]
    if "total" in held:
        fits = "fits" if held["total"] <= room else "does not fit"
        size = f"{held['total'] / GIB:.1f} of {room / GIB:.0f} GiB per device"
        lines.append(f"{fits} by counting: {size}")
    return "\n".join(lines)


def compiled_report(found: dict[str, Any]) -> str:
    """The compiler's findings, or why nothing was compiled."""
    compiled, room = found["compiled"], found["memory_per_chip"]
    if compiled is None:
        how = wheels.hint(gpu=found["topology"].partition(":")[0] in GPUS)
        return f"not compiled: {found['reason']}" + (f"\n  {how}" if how else "")
    if not compiled["fits"]:
        return f"does not fit: {compiled['refused']}\n  {way_out(found)}"
    line = found["roofline"]
    lines = [
        *of_program(compiled),
        f"roofline     matmuls {milliseconds(line['products'])}, memory at least "
        f"{milliseconds(line['memory'])}, interconnect {milliseconds(line['interconnect'])}",
        f"utilisation  at most {line['utilisation_if_all_overlaps']:.2f} where all of it overlaps, "
        f"{line['utilisation_if_nothing_overlaps']:.2f} where nothing does",
        *idle_hint(found),
    ]
    fits = f"{compiled['total'] / GIB:.1f} of {room / GIB:.0f} GiB per device"
    if change := found.get("change"):
        lines.append("does not fit as it is; the cheapest change found with which it does:")
        lines += [f'  --gin_bindings="{setting}"' for setting in change]
        lines.append(f"then it takes {fits}")
    else:
        lines.append(f"fits: {fits}")
    return "\n".join(lines)


def way_out(found: dict[str, Any]) -> str:
    """What would make a step fit that the compiler has refused."""
    state, room = of_state(found["bytes_per_chip"]), found["memory_per_chip"]
    if state > room:
        return (
            f"the state alone takes {state / GIB:.1f} of {room / GIB:.0f} GiB: it needs more "
            "chips, or larger fsdp, expert or tensor axes"
        )
    if found.get("untried"):
        return (
            f"nor with the {found['tries']} changes that were tried; {found['untried']} more could "
            "be: raise --tries"
        )
    return "nor with more micro-batches and everything recomputed: more chips"


def idle_hint(found: dict[str, Any], low: float = 0.3) -> list[str]:
    """A line on what the chips wait for; empty where overlap alone would keep them busy.

    found: findings of `plan`. low: below which utilisation with perfect overlap.
    """
    line = found["roofline"]
    if line["utilisation_if_all_overlaps"] >= low:
        return []
    seconds = {name: line[name] for name in ("memory", "interconnect")}
    bound = max(seconds, key=lambda name: seconds[name])
    tokens = found["tokens_per_step"] / found["chips"]
    times = seconds[bound] / line["products"]
    why = {
        "memory": "weights and optimizer state are read for few tokens",
        "interconnect": "collectives take longer than the matmuls",
    }[bound]
    return [
        f"  the chips wait for the {bound}: {why} ({tokens:,.0f} tokens a chip and step); a batch "
        f"up to {times:.0f} times as large (train.batch_size), or fewer chips, keeps them busier"
    ]


def of_program(compiled: dict[str, Any]) -> list[str]:
    """Lines on the compiled step: its size, its collectives and its exchanges."""
    lines = [
        f"compiled     in {compiled['seconds']:.0f} s: arguments "
        f"{compiled['arguments'] / GIB:.2f} GiB, temporaries {compiled['temporaries'] / GIB:.2f} "
        "GiB per device",
        "collectives of a step: times, kind, mesh axes that they cross, bytes that a device sends:",
    ]
    for row in compiled["collectives"]:
        size = f"{row['moved'] / 2**20:10,.1f} MiB"
        lines.append(f"  {row['times']:5} x {row['kind']:20} {row['axes']:22} {size}")
    if exchanges := compiled["exchanges"]:
        beside = sum(exchange["products_beside"] > 0 for exchange in exchanges)
        shared = sum(exchange["of_shared_experts"] > 0 for exchange in exchanges)
        lines.append(
            f"exchanges    of rows and experts: {len(exchanges)} in the program, {beside} of them "
            f"while matmuls run, {shared} while shared experts do"
        )
    return lines
