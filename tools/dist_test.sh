#!/usr/bin/env bash
# Evaluate with one process per GPU (NCCL), or GPUS processes on the CPU (gloo).
# Usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# Environment, all optional:
#   NNODES=1               number of machines; run this on each of them
#   NODE_RANK=0            which of them this one is: 0 to NNODES - 1
#   MASTER_ADDR=127.0.0.1  address of machine 0, where there are several
#   PORT=29500             free port of machine 0, where there are several
#   OMP_NUM_THREADS        threads of a process on the CPU (its part of the cores)
#   PYTHON=python          the interpreter
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,10s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/misc/launch.sh" test.py "$3" "$1" "$2" "${@:4}"
