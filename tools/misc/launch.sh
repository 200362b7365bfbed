#!/usr/bin/env bash
# Run a Python tool in GPUS processes on this machine with torchrun.
# Usage: launch.sh SCRIPT GPUS [ARGUMENTS]
# Environment: as dist_train.sh says.
set -euo pipefail

SCRIPT=$1
GPUS=$2
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
PORT=${PORT:-29500}
MAX_RESTARTS=${MAX_RESTARTS:-0}

for name in GPUS NNODES PORT; do
    if ! [[ ${!name} =~ ^[1-9][0-9]*$ ]]; then
        echo "Error: $name must be a positive number, got '${!name}'." >&2
        exit 2
    fi
done
for name in NODE_RANK MAX_RESTARTS; do
    if ! [[ ${!name} =~ ^[0-9]+$ ]]; then
        echo "Error: $name must be a number from 0 on, got '${!name}'." >&2
        exit 2
    fi
done

if [ "$NNODES" -gt 1 ] && [ "$NODE_RANK" = 0 ] &&
    ! "$PYTHON" -c "import socket; socket.create_server(('', $PORT))" 2>/dev/null; then
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

if [ "$NNODES" = 1 ]; then
    # By default torchrun's store listens on all network interfaces, so a file is used in
    # its place. The file has no name: nobody else can open it, and it is removed when
    # torchrun ends. Every keep-alive message makes it longer, so one is sent per hour.
    STORE=$(mktemp)
    exec 9<>"$STORE"
    rm "$STORE"
    MEETING=(
        --rdzv-backend c10d
        --rdzv-conf store_type=file,keep_alive_interval=3600
        --rdzv-endpoint /proc/self/fd/9
        --local-addr 127.0.0.1
    )
elif [ "$MAX_RESTARTS" = 0 ]; then
    MEETING=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$PORT")
else
    if [ -z "${RDZV_ID:-}" ]; then
        echo "Error: MAX_RESTARTS on several machines needs RDZV_ID, a secret word that is the same on all of them." \
            "Make one: python -c 'import secrets; print(secrets.token_hex())'" >&2
        exit 2
    fi
    # Not by --rdzv-id: every user of the machine can read a command line.
    export PET_RDZV_ID=$RDZV_ID
    # When a process dies on one machine, the processes of all machines start again.
    MEETING=(
        --rdzv-backend c10d
        --rdzv-endpoint "$MASTER_ADDR:$PORT"
        --rdzv-conf "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)"
    )
fi
# torchrun must not open a store for the processes: it would listen on all interfaces,
# and after a restart have addresses of dead processes. They open one of their own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [ "$MAX_RESTARTS" != 0 ]; then
    # A restart resumes a checkpoint only if it is newer than this time: see
    # restart_checkpoint in mlla_mm/engine/launch.py.
    LAUNCH_TIME=$(date +%s)
    export LAUNCH_TIME
fi

PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODES" \
    --max-restarts "$MAX_RESTARTS" \
    "${MEETING[@]}" \
    --nproc-per-node "$GPUS" \
    "$ROOT/tools/$SCRIPT" "${@:3}" --launcher pytorch
