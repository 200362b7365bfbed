#!/usr/bin/env bash
# Evaluate on a Slurm cluster, one task per GPU.
# Usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]
# Environment: GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS
set -euo pipefail

if [ $# -lt 4 ]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/misc/srun.sh" "$1" "$2" test.py "${@:3}"
