#!/usr/bin/env bash
# What can only be known on a GPU or TPU, within eight minutes: the accelerator part of the suite,
# then layers beside dense ones and whole steps in bfloat16, into benchmarks/results/DEVICE.json.
#   scripts/accelerator_check.sh [FOLDER]      (PYTHON=... chooses the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
platform=$("$python" -c 'import jax; print(jax.default_backend())')
if [[ $platform == cpu ]]; then
  echo "no accelerator: JAX sees a CPU; the same program runs in small" >&2
  "$python" benchmarks/accelerator.py --folder="$folder" --small
  exit
fi
# The suite's own settings are for CPUs; its references are computed on one.
XLA_FLAGS=" " JAX_PLATFORMS="$([[ $platform == gpu ]] && echo cuda || echo "$platform"),cpu" \
  timeout 180 "$python" -m pytest -m accelerator tests/test_accelerator.py
timeout 300 "$python" benchmarks/accelerator.py --folder="$folder"
