"""`moe plan`: what a config needs on a TPU slice, by the real compiler, without a TPU."""

import json
import os
from pathlib import Path
import re
import subprocess
import sys
import tempfile
from typing import Any

from moe.chips import GIB, Topology
from moe.errors import UserError


def run(flags) -> int:
    """Print the answer; 0 whether it fits or not. `--json` also writes it."""
    try:
        topology = Topology.read(flags.topology)
    except ValueError as error:
        raise UserError(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        # In a process and environment of its own: the compiler may end it, and JAX with libtpu
        # would look for a TPU.
        words = [str(path), topology.name, str(flags.vocab_size)]
        words += [*flags.gin_file, "--", *flags.gin_bindings]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several plans at a time
        done = subprocess.run(
            [sys.executable, "-m", "moe.plan_worker", *words],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    last = why(done.stderr) or f"exit status {done.returncode}"
    if "error" in found:
        raise UserError(found["error"])
    if not found:
        raise UserError(f"the plan could not be made: {last}")
    if done.returncode:
        found["reason"] = f"the compiler stopped: {last}"
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(report(found))
    return 0


def why(stderr: str) -> str:
    """The last line that names an error, else the last one."""
    lines = stderr.strip().splitlines()
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|F\d{4})\b", line)]
    return (named or lines or [""])[-1]


def report(found: dict[str, Any]) -> str:
    """What a person reads."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
    held, room = found["bytes_per_chip"], found["memory_per_chip"]
    state = sum(held.values())
    lines = [
        f"{found['topology']}: {found['chips']:,} chips; mesh {mesh or 'of one'}",
        f"parameters   {found['parameters_total']:,} total, {found['parameters_active']:,} active",
        f"a step       {found['tokens_per_step']:,} tokens, {found['flops_per_step']:.3g} FLOPs; "
        f"{1e3 * found['seconds_of_products_at_peak']:,.1f} ms at every chip's peak",
        "per device   "
        + ", ".join(
            f"{name.replace('_', ' ')} {size / GIB:.2f} GiB" for name, size in held.items()
        ),
    ]
    compiled = found["compiled"]
    if compiled is None:
        lines.append(f"not compiled: {found['reason']}")
        lines.append("  pip install 'moe-routing[plan]' gives the compiler (libtpu)")
        lines.append("  activations are not known without it")
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
    lines += [
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
