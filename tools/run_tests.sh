#!/usr/bin/env bash
# Set up, then check the code with ruff and run the tests.
# Usage: tools/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source tools/misc/setup_env.sh tests
ruff check .
ruff format --check .
python -m pytest "$@"
