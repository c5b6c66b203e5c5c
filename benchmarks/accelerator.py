"""What one GPU or TPU does, part by part, within eight minutes.

    python benchmarks/accelerator.py --folder=benchmarks/results [--small] [--part=NAME ...]

Each part runs in a process of its own with a time limit of its own, so that one that fails, or
takes all memory, costs its own rows. Rows are appended to FOLDER/accelerator.jsonl as they come;
at the end FOLDER/DEVICE.json has all of them. --small takes sizes for a laptop's CPU.
"""

import argparse
import json
import os
from pathlib import Path
import re
import subprocess
import sys
import time

HERE = Path(__file__).resolve().parent
# Seconds of each part, in their order; all together end by DEADLINE.
LIMITS = {
    "machine": 25,
    "tests": 60,
    "matmuls olmoe": 35,
    "matmuls mixtral": 35,
    "layers olmoe": 60,
    "layers mixtral": 60,
    "attention": 25,
    "step Sorted": 40,
    "step Sorted bfloat16": 40,
    "step SlotGather": 40,
    "profile": 30,
    "torch eager": 25,
    "torch compiled": 45,
}
DEADLINE = 470


def run_part(name: str, path: Path, limit: float, *, small: bool) -> dict | None:
    """Run a part, whose process appends its rows to `path`; returns a row where it fails."""
    words = [sys.executable, str(HERE / "accelerator_parts.py"), name, str(path)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    }
    started = time.monotonic()
    process = subprocess.Popen(
        words + ["--small"] * small,
        stdout=2,  # rows are in the file
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        errors = process.communicate(timeout=limit)[1]
        why = f"exit status {process.returncode}: {last_error(errors)}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its own children too
        process.communicate()
        why = f"not done after {limit:.0f} s"
    if process.returncode:
        return {"part": name, "error": why, "seconds": round(time.monotonic() - started, 1)}
    return None


def last_error(text: str) -> str:
    """The last line that names an error, or else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or lines or ["nothing was said"])[-1][:300]


def summary(rows: list[dict]) -> dict:
    """All rows by part, with the machine's on top and a list of what failed."""
    machine = next((row for row in rows if row["part"] == "machine" and "device" in row), {})
    found = {key: value for key, value in machine.items() if key != "part"}
    found["failed"] = [row for row in rows if "error" in row]
    parts: dict[str, list[dict]] = {}
    for row in rows:
        if row is not machine and "error" not in row:
            rest = {key: value for key, value in row.items() if key != "part"}
            parts.setdefault(row["part"], []).append(rest)
    return found | {"parts": parts}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", action="append", choices=LIMITS, help="these alone")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / "accelerator.jsonl"
    path.write_text("", encoding="utf-8")
    end = time.monotonic() + DEADLINE
    for name in given.part or LIMITS:
        limit = max(1.0, min(LIMITS[name], end - time.monotonic()))
        failed = run_part(name, path, limit, small=given.small)
        if failed:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(failed) + "\n")
            print(json.dumps(failed), flush=True)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = summary(rows)
    kind = re.sub(r"[^a-z0-9]+", "_", found.get("kind", "unknown device").lower()).strip("_")
    whole = given.folder / f"{kind}.json"
    whole.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{len(rows)} rows, {len(found['failed'])} failed; written to {path} and {whole}")


if __name__ == "__main__":
    main()
