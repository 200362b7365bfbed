#!/usr/bin/env bash
# Set up, then check the code with ruff and mypy and run the tests.
# Usage: tools/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source tools/misc/setup_env.sh tests
ruff check .
ruff format --check .
# Annotations of PyTorch differ from version to version: ours fit the default one.
if python -c 'import runpy, torch
pins = runpy.run_path("mlla_mm/compat/versions.py")
raise SystemExit(torch.__version__.split("+")[0] != pins["TORCH"][0])'; then
    mypy
else
    echo 'Types are not checked: this is not the default version of PyTorch.'
fi
# Two tests at a time, each on a core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest --numprocesses 2 --dist worksteal "$@"
