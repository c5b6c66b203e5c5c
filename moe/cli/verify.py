"""`moe verify`: whether a run's checkpoints and other files are as they were written."""

from pathlib import Path

from moe.errors import printable
from moe.runs.storage.json_files import write_json
from moe.runs.storage.verify import parts

DAMAGED = 1


def run(flags) -> int:
    """Print a line for each checkpoint and file; returns 1 where one is damaged."""
    found = parts(Path(flags.folder))
    for part in found:
        state = f"damaged: {'; '.join(part.faults)}" if part.faults else "sound"
        note = f" ({part.note})" if part.note else ""
        print(printable(f"{part.name}: {state}{note}"))
    broken = [part.name for part in found if part.faults]
    if flags.json:
        rows = [vars(part) for part in found]
        write_json(Path(flags.json), {"folder": flags.folder, "sound": not broken, "parts": rows})
    if not broken:
        return 0
    print(printable(f"{len(broken)} of {len(found)} damaged: {', '.join(broken)}"))
    return DAMAGED
