#!/usr/bin/env bash
# Evaluate with one process per GPU (NCCL), or GPUS processes on the CPU (gloo).
# Usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# Several machines: run it on each with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/misc/launch.sh" test.py "$3" "$1" "$2" "${@:4}"
