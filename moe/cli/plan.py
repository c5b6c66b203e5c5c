"""`moe plan`: memory and time of a config on TPUs or GPUs, by their compilers, without any."""

import json
import os
from pathlib import Path
import re
import subprocess
import sys
import tempfile

from moe.errors import UserError
from moe.planning.chips import Topology
from moe.planning.report import compiled_report
from moe.planning.wheels import environment


def run(flags) -> int:
    """Print the findings; returns 0 whether the config fits or not. `--json` also writes them."""
    try:
        topology = Topology.read(flags.topology)
    except ValueError as error:
        raise UserError(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        # In a process of its own, since the compiler may end it.
        words = [str(path), topology.name, str(flags.vocab_size), str(flags.tries)]
        words += [*flags.gin_file, "--", *flags.gin_bindings]
        done = subprocess.run(
            [sys.executable, "-m", "moe.cli.plan_worker", *words],
            env=os.environ | environment(gpu=topology.is_gpu),
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
        found["reason"] = f"the compiler stopped by an error of its own: {last[:300]}"
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(compiled_report(found))
    return 0


def why(stderr: str) -> str:
    """The last line that names an error, or else the last line."""
    lines = stderr.strip().splitlines()
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|F\d{4})\b", line)]
    return (named or lines or [""])[-1]
