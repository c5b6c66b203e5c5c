#!/usr/bin/env bash
# What can only be known on a GPU or TPU, within eight minutes: tests, matmuls by expert, layers,
# attention, whole steps (transformers' too, where torch is), a profile. One part that fails costs
# its own rows: FOLDER/accelerator.jsonl has them as they come, FOLDER/DEVICE.json all at the end.
# Packages that are missing are named in its first row.
#   scripts/accelerator_check.sh [FOLDER]      (PYTHON=... chooses the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
platform=$("$python" -c 'import jax; print(jax.default_backend())')
small=()
if [[ $platform == cpu ]]; then
  echo "no accelerator: JAX sees a CPU; the same program runs in small" >&2
  small=(--small)
fi
exec timeout 480 "$python" benchmarks/accelerator.py --folder="$folder" "${small[@]}"
