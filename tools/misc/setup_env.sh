#!/usr/bin/env bash
# Sourced by quickstart.sh and run_tests.sh: leaves `python` with everything installed.
# Takes the active virtual or conda environment if it has PyTorch, else makes .venv.
# OPENMMLAB_STACK=openmmlab installs the original packages where there are none;
# MLLA_VENV=FOLDER makes or takes that virtual environment; PYTHON=python3.11 makes it;
# UV= installs by pip.
# Usage: source setup_env.sh [tests]

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# PyTorch 2.1, which the original packages go with, has no packages for Python 3.12.
newest_python() {
    local name names='python3.12 python3.11 python3.10 python3 python3.9'
    [ "${OPENMMLAB_STACK:-}" != openmmlab ] || names="python3.11 python3.10 python3.9 $names"
    for name in ${PYTHON:-$names}; do
        if "$name" -c 'import sys, venv; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "Error: no ${PYTHON:-Python from 3.9 to 3.12} found; install one, with its venv module." >&2
    return 1
}

has_torch() {
    python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' 2>/dev/null
}

set_up_environment() {
    local options=() active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} venv=${MLLA_VENV:-$ROOT/.venv} name start
    if [ -z "${MLLA_VENV:-}" ] && [ -n "$active" ] && [ "$active" != "$venv" ] && has_torch; then
        echo "Using the active environment: $active"
    else
        options+=(--own)
        # Made last, so that an interrupted one is made again.
        if [ ! -e "$venv/bin/activate" ]; then
            name=$(newest_python) || return
            printf 'Making a virtual environment in %s (%s) ... ' "$venv" "$name"
            start=$SECONDS
            "$name" -m venv "$venv" || return
            echo "$((SECONDS - start)) s"
        fi
        # shellcheck disable=SC1091
        source "$venv/bin/activate" || return
    fi
    # Without arguments of its own, a sourced file sees those of the script around it.
    [ "${1:-}" != tests ] || options+=(--tests)
    python "$ROOT/tools/misc/install_packages.py" ${options[@]+"${options[@]}"} || return
    # Each process imports PyTorch and a toolbox: 28 s where Python compiles the sources
    # every time, as some containers make it do, and 10 s from byte code.
    unset PYTHONDONTWRITEBYTECODE
    # The tools of this clone, whatever else is installed.
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

set_up_environment "$@"
