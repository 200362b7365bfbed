#!/usr/bin/env bash
# Train with one process per GPU (NCCL), or GPUS processes on the CPU (gloo).
# Usage: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# Environment, all optional:
#   NNODES=1               number of machines; run this on each of them
#   NODE_RANK=0            which of them this one is: 0 to NNODES - 1
#   MASTER_ADDR=127.0.0.1  address of machine 0, where there are several
#   PORT=29500             free port of machine 0, where there are several
#   MAX_RESTARTS=0         how often to start again, from the newest checkpoint, when a
#                          process dies
#   RDZV_ID                for restarts on several machines: a secret word, the same on all
#   OMP_NUM_THREADS        threads of a process on the CPU (its part of the cores)
#   PYTHON=python          the interpreter
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,13s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/misc/launch.sh" train.py "$2" "$1" "${@:3}"
