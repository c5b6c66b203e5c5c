"""What one layer's forward and backward pass needs on an H100, by its compiler, without one.

PATH=... python benchmarks/compiled_for_h100.py --json=benchmarks/results/compiled_for_h100.json,
with the wheels jax-cuda13-pjrt, jax-cuda13-plugin and nvidia-cuda-nvcc (its bin/ on PATH) and
JAX 0.12. Bytes of temporaries beside arguments and results, the numbers in the largest array, our
kernels and the bytes of registers that they spill. It says nothing about speed.
"""

import argparse
import json
from pathlib import Path
import subprocess
import sys

PROGRAM = Path(__file__).parents[1] / "tests" / "cuda_layer.py"
SIZES = ((65536, 64, 2048, 1024), (16384, 8, 4096, 14336))  # rows, experts, width, hidden width
KERNELS = ("hopper", "slot_blocks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="the file to write")
    flags = parser.parse_args()
    results = []
    for sizes in SIZES:
        for kernel in KERNELS:
            command = [sys.executable, str(PROGRAM), kernel, *map(str, sizes)]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            row = dict(zip(("rows", "experts", "width", "hidden"), sizes, strict=True))
            results.append({"kernel": kernel} | row | json.loads(said.splitlines()[-1]))
            print(json.dumps(results[-1]), flush=True)
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
