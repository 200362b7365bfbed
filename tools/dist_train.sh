#!/usr/bin/env bash
# Train with one process per GPU (NCCL), or GPUS processes on the CPU (gloo).
# Usage: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# Several machines: run it on each with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/misc/launch.sh" train.py "$2" "$1" "${@:3}"
