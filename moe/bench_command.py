"""`moe bench`: times of our own parts on this machine."""

import json
from pathlib import Path

from moe.errors import UserError, nearest

SUITES = ("routers",)


def run(flags) -> int:
    """Print a line for each case as it is measured; `--json` also writes the list of them."""
    if flags.suite not in SUITES:
        hint = nearest(flags.suite, SUITES) or f"; there is {', '.join(SUITES)}"
        raise UserError(f"moe bench has no suite {flags.suite!r}{hint}")
    from moe import bench, hardware

    print(f"{hardware.describe_device()}; {flags.tokens:,} tokens, width {flags.width}, ", end="")
    print(f"{flags.experts} experts, float32; medians of {bench.REPEATS}")
    rows = []
    for row in bench.routers(flags.tokens, flags.width, flags.experts):
        share = f"{row['fraction_of_layer']:7.1%}"
        print(f"  {row['milliseconds']:10.2f} ms {share}  {row['router']}", flush=True)
        rows.append(row)
    if flags.json:
        Path(flags.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0
