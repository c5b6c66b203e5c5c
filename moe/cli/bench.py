"""`moe bench`: times of routers and layers on this machine."""

from collections.abc import Iterator
import json
from pathlib import Path

from moe.errors import UserError, nearest

SUITES = ("routers", "layer")
DTYPES = ("float32", "bfloat16")


def run(flags) -> int:
    """Print a line for each result as it is measured; `--json` also writes the list of them."""
    if flags.suite not in SUITES:
        hint = nearest(flags.suite, SUITES) or f"; there is {', '.join(SUITES)}"
        raise UserError(f"moe bench has no suite {flags.suite!r}{hint}")
    rows = list(routers(flags) if flags.suite == "routers" else layer(flags))
    if flags.json:
        Path(flags.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def routers(flags) -> Iterator[dict]:
    """Print a line for each router, and yield it as a row."""
    from moe.bench import routers
    from moe.machine import hardware

    print(f"{hardware.describe_device()}; {flags.tokens:,} tokens, width {flags.width}, ", end="")
    print(f"{flags.experts} experts, float32; medians of {routers.REPEATS}")
    for row in routers.routers(flags.tokens, flags.width, flags.experts):
        share = f"{row['fraction_of_layer']:7.1%}"
        print(f"  {row['milliseconds']:10.2f} ms {share}  {row['router']}", flush=True)
        yield row


def layer(flags) -> Iterator[dict]:
    """Print a line for each case, routing and dispatcher, and yield it as a row; then the means."""
    from moe.bench import layer
    from moe.machine import hardware
    from moe.runs.tracking import progress

    if flags.dtype not in DTYPES:
        raise UserError(f"--dtype={flags.dtype}: one of {', '.join(DTYPES)}")
    try:
        cases = tuple(map(layer.Case.read, flags.case)) or layer.CASES
    except ValueError as error:
        raise UserError(str(error)) from error
    device = hardware.describe_device()
    print(f"{device}; {flags.dtype}; medians of {layer.ROUNDS} paired calls")
    print(
        "ms of forward and of forward + backward (over the dense layer's), share of the roofline,"
    )
    print("peak memory over the dense layer's with all experts' weights")
    rows = []
    for row in progress.with_status(lambda say: layer.layers(cases, flags.dtype, say)):
        where = f"{row['case']:34} {row['routing']:9} {row['dispatcher']:36}"
        rows.append(row)
        yield row
        if "error" in row:
            print(f"  {where} {row['error']}", flush=True)
            continue
        forward, both = (
            f"{row[f'milliseconds_{what}']:9.1f} ({row[f'ratio_to_dense_{what}']:.2f})"
            for what in ("forward", "step")
        )
        memory = f"{row['memory_ratio']:5.2f}" if "memory_ratio" in row else ""
        line = f"  {where} {forward} {both} {row['roofline_fraction']:5.2f} {memory}"
        print(line.rstrip(), flush=True)
    for name, mean in layer.summary(rows).items():
        print(f"  geometric mean, {name}: {mean:.2f}")
