#!/usr/bin/env bash
# Set up, then check the code with ruff and run the tests.
# Usage: tools/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source tools/misc/setup_env.sh tests
ruff check .
ruff format --check .
# Two tests at a time, each on a core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest --numprocesses 2 --dist worksteal "$@"
