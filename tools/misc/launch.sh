#!/usr/bin/env bash
# Run a Python tool in GPUS processes on this machine with torchrun.
# Usage: launch.sh SCRIPT GPUS [ARGUMENTS]
# Environment: as dist_train.sh says.
set -euo pipefail

SCRIPT=$1
GPUS=$2
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python}

if ! [[ $GPUS =~ ^[1-9][0-9]*$ ]]; then
    echo "Error: GPUS must be a positive number, got '$GPUS'." >&2
    exit 2
fi

NNODES=${NNODES:-1}
if [ -z "${PORT:-}" ]; then
    if [ "$NNODES" -gt 1 ]; then
        PORT=29500  # the machines have to agree on it
    else
        PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    fi
fi

if [ "${NODE_RANK:-0}" = 0 ] && ! "$PYTHON" -c "import socket; socket.create_server(('', $PORT))" 2>/dev/null; then
    echo "Error: port $PORT of this machine is in use, or no port. Set another one: PORT=..." >&2
    exit 2
fi

# On the CPU the processes share the cores. On GPUs several have one thread each, as
# torchrun would set with a warning.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    if ! nvidia-smi -L >/dev/null 2>&1; then
        cores=$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)))')
        export OMP_NUM_THREADS=$((cores > GPUS ? cores / GPUS : 1))
    elif [ "$GPUS" -gt 1 ]; then
        export OMP_NUM_THREADS=1
    fi
fi

MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
NODE_RANK=${NODE_RANK:-0}
MAX_RESTARTS=${MAX_RESTARTS:-0}
if [ "$MAX_RESTARTS" = 0 ]; then
    MEETING=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$PORT")
else
    # Meets anew on all machines when a process dies on one of them.
    MEETING=(
        --max-restarts "$MAX_RESTARTS"
        --rdzv-backend c10d
        --rdzv-endpoint "$MASTER_ADDR:$PORT"
        --rdzv-conf "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)"
    )
    # A store per attempt: in a shared one processes find addresses of dead ones.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # Newer checkpoints are this run's, see restart_checkpoint in mlla_mm/engine/launch.py.
    LAUNCH_TIME=$(date +%s)
    export LAUNCH_TIME
fi

PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODES" \
    "${MEETING[@]}" \
    --nproc-per-node "$GPUS" \
    "$ROOT/tools/$SCRIPT" "${@:3}" --launcher pytorch
