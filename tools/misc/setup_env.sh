#!/usr/bin/env bash
# Sourced by quickstart.sh and run_tests.sh: leaves `python` with everything installed.
# Takes the active virtual or conda environment if it has PyTorch, else makes .venv.
# OPENMMLAB_STACK=openmmlab installs the original packages where there are none.
# Usage: source setup_env.sh [tests]

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

newest_python() {
    local name
    for name in python3.12 python3.11 python3.10 python3 python3.9; do
        if "$name" -c 'import sys, venv; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "Error: no Python from 3.9 to 3.12 found; install one, with its venv module." >&2
    return 1
}

# Names the extra whose packages are not all there: onedl, or openmmlab where those are
# in use already or asked for. Nothing is printed for a complete environment.
missing_stack() {
    python - <<'PYTHON'
import os
from importlib.util import find_spec
from importlib.metadata import distributions

missing = any(find_spec(n) is None for n in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'))
if missing:
    names = {(d.metadata['Name'] or '').lower() for d in distributions()}
    used = 'openmmlab' if names & {'mmengine', 'mmcv', 'mmdet'} else 'onedl'
    print(os.environ.get('OPENMMLAB_STACK', used))
PYTHON
}

has_requirements() {
    python - "$@" <<'PYTHON'
import sys
from importlib.util import find_spec

sys.exit(any(find_spec(name) is None for name in sys.argv[1:]))
PYTHON
}

# The installed PyTorch stays what it is. mmcv is built here without its compiled ops,
# because an isolated build does not see PyTorch. Without PIP_USE_PEP517, pip before 25.3
# does not isolate that of the original mmcv where wheel is installed, and takes 15
# minutes to compile. The original one also needs an old setuptools, in both places.
install_stack() {
    local constraints
    constraints=$(mktemp)
    python -m pip list --format freeze | grep -E '^(torch|torchvision)==' >"$constraints" || true
    [ "$1" = onedl ] || echo 'setuptools<70' >>"$constraints"
    PIP_CONSTRAINT=$constraints PIP_BUILD_CONSTRAINT=$constraints PIP_USE_PEP517=1 \
        python -m pip install --requirement "$ROOT/requirements/$1.txt"
    rm -f "$constraints"
}

install_for_tests() {
    local names='pytest xdist hypothesis ruff sphinx myst_parser furo sphinx_copybutton nbclient ipykernel'
    local files=(tests.txt docs.txt)
    # They would bring NumPy 2 where the original packages keep an older one.
    if python -c 'import sys, numpy; sys.exit(numpy.__version__ < "2")'; then
        names="$names onnx onnxruntime onnxscript"
        files+=(export.txt)
    fi
    # The names are split into words on purpose.
    # shellcheck disable=SC2086
    if ! has_requirements $names; then
        python -m pip install --quiet "${files[@]/#/--requirement=$ROOT/requirements/}"
    fi
}

set_up_environment() {
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python -c 'import torch' 2>/dev/null; then
        echo "Using the active environment: $(python -c 'import sys; print(sys.prefix)')"
    else
        if [ ! -x "$ROOT/.venv/bin/python" ]; then
            echo "Making a virtual environment in .venv"
            "$(newest_python)" -m venv "$ROOT/.venv"
        fi
        # shellcheck disable=SC1091
        source "$ROOT/.venv/bin/activate"
        if ! has_requirements torch torchvision; then
            echo "Installing PyTorch (1 to 2 minutes)"
            python -m pip install --requirement "$ROOT/requirements/torch.txt"
        fi
        if ! (cd / && has_requirements mlla_mm); then
            python -m pip install --quiet --no-deps --editable "$ROOT"
        fi
    fi

    local stack
    stack=$(missing_stack)
    if [ -n "$stack" ]; then
        echo "Installing the OpenMMLab packages, extra '$stack' (1 to 2 minutes)"
        install_stack "$stack"
    fi
    if ! has_requirements sklearn matplotlib; then
        python -m pip install --quiet --requirement "$ROOT/requirements/runtime.txt"
    fi
    if [ "${1:-}" = tests ]; then
        install_for_tests
    fi
    # The tools of this clone, whatever else is installed.
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    python -m mlla_mm.utils.collect_env
}

set_up_environment "$@"
