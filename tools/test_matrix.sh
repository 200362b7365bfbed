#!/usr/bin/env bash
# Run the tests on several stacks, each in a virtual environment of its own, made from
# the package index; those that exist are used again.
# Usage: tools/test_matrix.sh [--dir FOLDER] [STACK ...] [-- pytest arguments]
#   fork      the default: the extras torch and onedl
#   compiled  the same with mmcv's compiled ops: MMCV_WHEEL=FILE installs a wheel, else
#             they are built here (15 minutes and a C++ compiler)
#   original  the extras torch21 and openmmlab: the original OpenMMLab packages
#   newest    the newest torch that has a torchvision, and the fork
# All four without a STACK. FOLDER is .matrix and gets a log for each stack; PYTHON is
# the interpreter (python3.11 or 3.10, for which all stacks have packages).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

STACKS=(fork compiled original newest)
folder=.matrix
chosen=()

usage() {
    sed -n '/^# Usage/,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit ;;
        --dir)
            folder=${2:?--dir needs a folder}
            shift
            ;;
        --)
            shift
            break
            ;;
        *)
            if [[ " ${STACKS[*]} " != *" $1 "* ]]; then
                echo "Error: no stack '$1'; there are ${STACKS[*]}. pytest's arguments come after --." >&2
                exit 2
            fi
            chosen+=("$1")
            ;;
    esac
    shift
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${STACKS[@]}")
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3.10}; do
        if "$name" -c 'import venv' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "Error: no ${PYTHON:-Python 3.10 or 3.11} found; install one, or set PYTHON." >&2
    return 1
}

# The commands that `python -m mlla_mm.utils.collect_env` gives to users.
compile_mmcv() {
    python -c 'import mmcv._ext' 2>/dev/null && return
    if [ -n "${MMCV_WHEEL:-}" ]; then
        python -m pip install --no-deps --force-reinstall "$MMCV_WHEEL"
        return
    fi
    python - <<'PYTHON' | bash -ex
from mlla_mm.compat.stack import compiled_mmcv_commands

lines = map(str.strip, compiled_mmcv_commands().splitlines())
print(*(line for line in lines if not line.startswith('(')), sep='\n')
PYTHON
}

# Leaves the environment of a stack active.
set_up() {
    export MLLA_VENV=$folder/$1
    if [ ! -e "$MLLA_VENV/bin/activate" ]; then
        "$(find_python)" -m venv "$MLLA_VENV" || return
    fi
    # torchvision names the torch that it was built for; the newest torch may have none yet.
    if [ "$1" = newest ]; then
        "$MLLA_VENV/bin/python" -m pip install --upgrade torchvision || return
    fi
    [ "$1" != original ] || export OPENMMLAB_STACK=openmmlab
    # shellcheck disable=SC1091
    source tools/misc/setup_env.sh tests || return
    [ "$1" != compiled ] || compile_mmcv
}

# As run_tests.sh does, but without ruff and mypy, which do not depend on the stack.
run_tests() {
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$PWD \
        python -m pytest --numprocesses 2 --dist worksteal "$@"
}

versions() {
    python - <<'PYTHON'
import platform
from importlib.metadata import version

from mlla_mm.compat.mmcv_ext import is_stand_in
from mlla_mm.compat.stack import collect_stack

stack = collect_stack()
mmengine = ' '.join(f'{n} {v}' for n, v in stack.packages['mmengine'].items())
ops = 'no' if is_stand_in() else 'yes'
print(platform.python_version(), version('torch'), mmengine, ops, sep=' | ')
PYTHON
}

# One line of the table; fails if the tests do. What happens goes to the log as well.
run_stack() {
    local stack=$1 log=$folder/$1.log result status=1 seconds=$SECONDS
    shift
    if set_up "$stack" >"$log" 2>&1; then
        run_tests "$@" >>"$log" 2>&1 && status=0
        result=$(grep -E '^(=+ )?[0-9]+ (passed|failed|skipped|deselected|error).* in [0-9.]+s' "$log" |
            tail -1 | sed -E 's/^=+ | =+$//g')
        [ -n "$result" ] || result="stopped before the tests ended, see $log"
    else
        result="not set up, see $log"
    fi
    [ $status = 0 ] || result="FAILED: $result"
    echo "| $stack | $(versions 2>/dev/null || echo '? | ? | ? | ?') | $result | $(((SECONDS - seconds + 30) / 60)) min |"
    return $status
}

table=$folder/results.md
echo '| Stack | Python | torch | MMEngine | Compiled mmcv ops | Tests | Time |
|---|---|---|---|---|---|---|' >"$table"
failed=0
for stack in "${chosen[@]}"; do
    echo "Testing stack '$stack'; log: $folder/$stack.log"
    # In a shell of its own, so that no environment reaches the next stack.
    (run_stack "$stack" "$@") >>"$table" || failed=1
done
echo
cat "$table"
exit $failed
