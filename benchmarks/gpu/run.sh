#!/usr/bin/env bash
# Checks and measurements on an NVIDIA GPU. Each check prints one line, PASS or FAIL.
# Usage: benchmarks/gpu/run.sh [STAGE ...]
# Stages, in the order given; without any: install env together kernels speed
#   install      an environment from .gpu/wheels, unless all packages are there
#   env          versions, the GPU, its bandwidth
#   correctness  tests marked gpu, and checks.py
#   demos        trains and evaluates the three demos; checks, stops and resumes a run
#   together     both at once: the GPU has room for them
#   speed        races of models, the most telling first
#   kernels      time of each kernel, and a profile of the models
# Environment, all optional:
#   BUDGET=520      seconds; what is not done by then is stopped or skipped
#   OUT=FOLDER      results (/tmp/mlla_mm_gpu/out)
#   WORK=FOLDER     environment, data, trainings, logs (/tmp/mlla_mm_gpu/work)
#   DEMOS_ALONE=1   leaves out the runs that are checked, stopped and resumed
#   RACE=0          number of the race in speed.py to begin with
#   PYTHON=python3  the interpreter
#   DRY=1           a dry run on the CPU, with tiny shapes and short trainings
set -uo pipefail

case ${1:-} in
-h | --help)
    sed -n '2,21s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
ROOT=$PWD
HERE=benchmarks/gpu
BUDGET=${BUDGET:-520}
DRY=${DRY:-}
OUT=${OUT:-${TMPDIR:-/tmp}/mlla_mm_gpu/out}
WORK=${WORK:-${TMPDIR:-/tmp}/mlla_mm_gpu/work}
mkdir -p "$OUT" "$WORK" || exit 2
# The tools run in other folders as well.
OUT=$(cd "$OUT" && pwd)
WORK=$(cd "$WORK" && pwd)
LOGS=$WORK/logs
DATA=$WORK/data${DRY:+_dry}
VENV=$WORK/venv
RUNNING=$WORK/running
SUMMARY=$OUT/summary.txt
export PYTHON=${PYTHON:-python3}
[ ! -f "$VENV/ready" ] || PYTHON=$VENV/bin/python
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore MPLBACKEND=Agg
# Processes share compiled kernels.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$WORK/triton}
rm -rf "$RUNNING"
mkdir -p "$LOGS" "$RUNNING"
rm -f "$LOGS"/*.log
: >"$SUMMARY"

# --- Helpers ---

left() { echo $((BUDGET - SECONDS)); }

say() { echo "$*" | tee -a "$SUMMARY"; }

# All logs in one file.
collect_logs() {
    local log
    for log in "$LOGS"/*.log; do
        [ -f "$log" ] || continue
        echo "===== $(basename "$log" .log)"
        tail -c 1000000 "$log"
    done >"$OUT/log.txt"
}

# Background commands have process groups of their own: Ctrl-C does not reach them.
stop_all() {
    local pid
    for pid in "$RUNNING"/*; do
        [ ! -e "$pid" ] || kill -TERM "$(basename "$pid")" 2>/dev/null
    done
}
trap 'stop_all; exit 130' INT
trap 'stop_all; exit 143' TERM

# limited SECONDS COMMAND ...
limited() {
    local rc pid
    timeout -k 5 "$@" &
    pid=$!
    touch "$RUNNING/$pid"
    wait "$pid"
    rc=$?
    rm -f "$RUNNING/$pid"
    return "$rc"
}

# run NAME LIMIT COMMAND ...: a check, of LIMIT seconds or what is left of BUDGET.
run() {
    local name=$1 limit=$2 begin=$SECONDS rc reason=''
    shift 2
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$limit" -lt 8 ]; then
        say "SKIP $name: no time left"
        return 1
    fi
    limited "$limit" "$@" >"$LOGS/$name.log" 2>&1
    rc=$?
    if [ "$rc" = 0 ]; then
        say "PASS $name ($((SECONDS - begin)) s)"
        return 0
    fi
    # 137: it had to be killed.
    [ "$rc" != 124 ] && [ "$rc" != 137 ] || reason=' out of time;'
    reason+=" $(grep -aE '(^|: )([A-Za-z_.]*Error|FAIL(ED)?)\b' "$LOGS/$name.log" |
        tail -n 1 | cut -c 1-200)"
    say "FAIL $name ($((SECONDS - begin)) s): status $rc;$reason"
    return "$rc"
}

# tell PATTERN LINES NAME ...: the last lines of logs that match go into the summary.
tell() {
    local pattern=$1 lines=$2 name
    shift 2
    for name in "$@"; do
        [ ! -f "$LOGS/$name.log" ] ||
            grep -aE "$pattern" "$LOGS/$name.log" | tail -n "$lines" |
            sed "s/^/    $name: /" | tee -a "$SUMMARY"
    done
}

# start COMMAND ...: in the background, its process in PIDS; in a dry run, whose machine
# may be small, one after the other.
start() {
    if [ -n "$DRY" ]; then
        "$@"
    else
        "$@" &
        PIDS+=($!)
    fi
}

# --- install, env ---

missing_packages() {
    "$PYTHON" - <<'PYTHON'
from importlib.util import find_spec

names = 'torch mmengine mmcv mmdet mmseg mmpretrain pytest xdist hypothesis'
print(*(name for name in names.split() if find_spec(name) is None))
PYTHON
}

make_environment() {
    local site
    # It sees the packages of PYTHON, which stays as it is.
    "$PYTHON" -m venv --clear --without-pip --system-site-packages "$VENV" || return 1
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$PYTHON" - "$site" <<'PYTHON' || return 1
import site
import sys
from pathlib import Path

# If PYTHON is itself of a virtual environment, that one's packages are not seen yet.
lines = [
    f'import site; site.addsitedir({folder!r})'
    for folder in [*site.getsitepackages(), site.getusersitepackages()]
    if Path(folder).is_dir()
]
# mmpretrain 1.3 does not import beside transformers 5, which nothing here needs. It looks
# for the package's metadata, and then imports it.
lines.append('import hide_transformers')
folder = Path(sys.argv[1])
(folder / 'gpu.pth').write_text('\n'.join(lines) + '\n')
(folder / 'hide_transformers.py').write_text('''
import sys
from importlib import metadata

sys.modules['transformers'] = None
found = metadata.distribution


def distribution(name):
    if name == 'transformers':
        raise metadata.PackageNotFoundError(name)
    return found(name)


metadata.distribution = distribution
''')
PYTHON
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --upgrade --target "$site" .gpu/wheels/*.whl || return 1
    # All cores at once, instead of every process when it starts.
    "$PYTHON" -m compileall -q -j 0 "$site" >/dev/null
    touch "$VENV/ready"
}

stage_install() {
    local missing
    missing=$(missing_packages)
    if [ -z "$missing" ]; then
        say "NOTE install: all packages are there"
        return
    fi
    if ! compgen -G '.gpu/wheels/*.whl' >/dev/null; then
        say "FAIL install: no $missing, nor .gpu/wheels; see $HERE/README.md"
    elif run install 120 bash -c make_environment; then
        PYTHON=$VENV/bin/python
        missing=$(missing_packages)
        [ -z "$missing" ] || say "FAIL install: .gpu/wheels and $PYTHON lack $missing"
    fi
    ! grep -q '^FAIL' "$SUMMARY" || finish
}

stage_env() {
    (nvidia-smi || true) >"$LOGS/nvidia-smi.log" 2>&1
    ("$PYTHON" -m pip list || true) >"$LOGS/pip-list.log" 2>&1 &
    local pid=$!
    run env 120 "$PYTHON" "$HERE/checks.py" env
    tell '^  ' 20 env
    wait "$pid"
}

# --- correctness ---

# marked_gpu NAME PROCESSES FOLDER ...
marked_gpu() {
    local name=$1 processes=$2 options=()
    shift 2
    ! "$PYTHON" -c 'import pytest_timeout' 2>/dev/null || options=(--timeout 120)
    run "$name" 200 nice "$PYTHON" -m pytest "$@" -m gpu -v \
        -p no:cacheprovider -n "$processes" "${options[@]}"
}

stage_correctness() {
    local PIDS=() OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
    export OMP_NUM_THREADS
    # The demos, which may run beside, take longest.
    start marked_gpu tests_ops 4 tests/test_ops
    start marked_gpu tests_others 2 tests/test_benchmarks tests/test_engine \
        tests/test_models tests/test_reproducible tests/test_configs \
        tests/test_compat tests/test_apis
    start run checks_golden 200 nice "$PYTHON" "$HERE/checks.py" golden grads shapes
    start run checks_models 200 nice "$PYTHON" "$HERE/checks.py" models inout
    start run checks_graphs 200 nice "$PYTHON" "$HERE/checks.py" graphs
    [ ${#PIDS[@]} = 0 ] || wait "${PIDS[@]}"
    tell '^(FAIL|[0-9]+ failed|All passed)' 20 \
        checks_golden checks_models checks_graphs
    # Each test has its line at once: time may run out before the summary.
    tell '(FAILED|ERROR) |(passed|failed|skipped|deselected).* in ' 30 \
        tests_ops tests_others
}

# --- demos ---

DET=configs/detection/mask-rcnn_mlla-nano_fpn_digits.py
SEG=configs/segmentation/upernet_mlla-nano_digits.py
CLS=configs/classification/mlla-nano_digits.py

# The demos' data, and a small set for the runs that are not about accuracy.
make_data() {
    local small=(--train 48 --val 16) size=() pids=() pid format
    [ -z "$DRY" ] || size=("${small[@]}")
    for format in coco ade20k imagenet; do
        "$PYTHON" tools/dataset_tools/make_digits.py "$DATA/$format" \
            --format "$format" "${size[@]}" &
        pids+=($!)
    done
    "$PYTHON" tools/dataset_tools/make_digits.py "$DATA/small" --format coco \
        "${small[@]}" &
    pids+=($!)
    for pid in "${pids[@]}"; do
        wait "$pid" || return 1
    done
}
# For bash -c, since timeout runs no functions.
export -f make_data make_environment
export DATA DRY VENV

# data_options FOLDER: options of a config, a line each.
data_options() {
    local loader
    for loader in train val test; do
        echo "${loader}_dataloader.dataset.data_root=$DATA/$1/"
    done
    case $1 in
    coco | small)
        for loader in val test; do
            echo "${loader}_evaluator.ann_file=$DATA/$1/annotations/instances_val.json"
        done
        ;;
    esac
}

# train NAME CONFIG FOLDER [ARGUMENTS ...] [-- OPTIONS ...]
train() {
    local name=$1 config=$2 data=$3 arguments=() options=()
    shift 3
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        arguments+=("$1")
        shift
    done
    [ $# = 0 ] || shift
    [ -n "$DRY" ] || arguments+=(--amp)
    mapfile -t options < <(data_options "$data")
    run "$name" 240 bash tools/dist_train.sh "$config" 1 "${arguments[@]}" \
        --cfg-options "${options[@]}" "$@"
}

# demo TASK CONFIG FOLDER [OPTIONS ...] [-- ARGUMENTS OF THE TEST ...]; leaves the seconds
# of training in TRAINING_SECONDS.
demo() {
    local task=$1 config=$2 data=$3 options=() begin=$SECONDS checkpoint
    shift 3
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    [ $# = 0 ] || shift
    rm -rf "${WORK:?}/$task" "$WORK/${task}_test"
    train "${task}_train" "$config" "$data" --seed 0 --work-dir "$WORK/$task" \
        -- "${options[@]}" || return 1
    TRAINING_SECONDS=$((SECONDS - begin))
    checkpoint=$(cat "$WORK/$task/last_checkpoint")
    mapfile -t options < <(data_options "$data")
    run "${task}_test" 90 bash tools/dist_test.sh "$config" "$checkpoint" 1 "$@" \
        --work-dir "$WORK/${task}_test" --cfg-options "${options[@]}"
}

# at_least TASK METRIC LIMIT: of a demo.
at_least() {
    local task=$1 metric=$2 limit=$3 value
    [ -z "$DRY" ] || limit=0
    value=$("$PYTHON" "$HERE/metric.py" "$WORK/${task}_test" "$metric")
    if [ -z "$value" ]; then
        say "FAIL $task: no $metric"
        return
    fi
    printf '{"task": "%s", "metric": "%s", "value": %s, "training_seconds": %s}\n' \
        "$task" "$metric" "$value" "$TRAINING_SECONDS" >>"$OUT/demos.jsonl"
    if awk "BEGIN {exit !($value >= $limit)}"; then
        say "PASS $task: $metric $value (at least $limit)"
    else
        say "FAIL $task: $metric $value (at least $limit)"
    fi
}

# Limits are well below what the demos reach on a CPU, in the comments.
demo_detection() {
    local options=(train_dataloader.batch_size=8 train_cfg.val_interval=4)
    [ -z "$DRY" ] || options+=(train_cfg.max_epochs=1)
    demo detection "$DET" coco "${options[@]}" || return
    at_least detection coco/bbox_mAP 0.62 # 0.706
    at_least detection coco/segm_mAP 0.60 # 0.690
}

demo_segmentation() {
    local options=(train_dataloader.batch_size=8)
    [ -z "$DRY" ] || options+=(
        train_cfg.max_iters=6 train_cfg.val_interval=6 default_hooks.checkpoint.interval=6
    )
    demo segmentation "$SEG" ade20k "${options[@]}" || return
    at_least segmentation mIoU 60 # 68.8
}

demo_classification() { # with MESA from a quarter of the epochs on
    local options=(train_dataloader.batch_size=32)
    [ -z "$DRY" ] || options+=(train_cfg.max_epochs=2)
    demo classification "$CLS" imagenet "${options[@]}" -- --ema || return
    at_least classification accuracy/top1 90 # 95.5, of the averaged weights
}

# Stopped by a signal in the middle of a long run, as a cluster does, and resumed.
stop_and_resume() {
    local folder=$WORK/stopped log=$LOGS/stopped.log pid options=() amp=(--amp) epochs=4
    rm -rf "$folder"
    [ -z "$DRY" ] || amp=() epochs=3
    mapfile -t options < <(data_options small)
    # The signal is for the launcher alone, not for its processes as well, which have
    # time to save; timeout passes it on.
    timeout --foreground -k 60 120 bash tools/dist_train.sh "$DET" 1 "${amp[@]}" \
        --seed 0 --work-dir "$folder" --cfg-options "${options[@]}" \
        train_dataloader.batch_size=4 train_cfg.max_epochs=40 >"$log" 2>&1 &
    pid=$!
    touch "$RUNNING/$pid"
    for _ in $(seq 240); do
        sleep 0.5
        ! grep -qaE 'Epoch\(train\) +\[[2-9]\]' "$log" || break
        kill -0 "$pid" 2>/dev/null || break
    done
    kill -TERM "$pid" 2>/dev/null
    wait "$pid"
    rm -f "$RUNNING/$pid"
    if compgen -G "$folder/preempted_iter_*.pth" >/dev/null; then
        say "PASS stopped: a checkpoint was left"
    else
        say "FAIL stopped: no checkpoint in $folder"
        return
    fi
    train resumed "$DET" small --resume --work-dir "$folder" \
        -- train_dataloader.batch_size=4 train_cfg.max_epochs="$epochs"
}

check_run() {
    rm -rf "$WORK/checked"
    train checked "$DET" small --check --work-dir "$WORK/checked"
    tell '^  (peak|iter|data|time|largest)' 8 checked
}

keep_batch_size() {
    rm -rf "$WORK/kept"
    train kept "$DET" small --keep-batch-size --seed 0 --work-dir "$WORK/kept" \
        -- train_dataloader.batch_size=2 train_cfg.max_epochs=1
}

stage_demos() {
    local PIDS=() OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
    export OMP_NUM_THREADS
    if [ ! -f "$DATA/ready" ]; then
        run data 90 bash -c make_data || return
        touch "$DATA/ready"
    fi
    : >"$OUT/demos.jsonl"
    start demo_detection
    start demo_segmentation
    start demo_classification
    if [ -z "${DEMOS_ALONE:-}" ]; then
        start stop_and_resume
        start check_run
        start keep_batch_size
    fi
    [ ${#PIDS[@]} = 0 ] || wait "${PIDS[@]}"
}

# Compiles the kernels of the races, for the cache: S has the widths of T.
warm_up() {
    local race
    for race in 't bfloat16' 't float16' 't float32' 'b bfloat16'; do
        # A size and a precision.
        # shellcheck disable=SC2086
        start run "warm_${race/ /_}" 150 nice "$PYTHON" "$HERE/speed.py" --warm $race
    done
}

stage_together() {
    local PIDS=()
    [ -n "$DRY" ] || warm_up
    start stage_demos
    start stage_correctness
    [ ${#PIDS[@]} = 0 ] || wait "${PIDS[@]}"
}

# --- speed: nothing else may run on the GPU ---

stage_speed() {
    local options=(--seconds "$(($(left) - 25))" --out "$OUT" --first "${RACE:-0}")
    [ -z "$DRY" ] || options+=(--dry)
    run speed "$(($(left) - 3))" "$PYTHON" "$HERE/speed.py" "${options[@]}"
    grep -aE '^(#|\||Skipped|FAIL)' "$LOGS/speed.log"
}

# --- kernels ---

# Compiling takes longer than measuring, so all stages are compiled at once.
warm_stages() {
    local PIDS=() stage marker=$TRITON_CACHE_DIR/warm_stages
    [ ! -f "$marker" ] || return 0
    for stage in 0 1 2 3; do
        start run "warm_stage_$stage" 120 "$PYTHON" "$HERE/kernels.py" --warm "$stage"
    done
    [ ${#PIDS[@]} = 0 ] || wait "${PIDS[@]}"
    mkdir -p "$TRITON_CACHE_DIR"
    touch "$marker"
}

stage_kernels() {
    warm_stages
    run kernels "$(($(left) - 5))" "$PYTHON" "$HERE/kernels.py" \
        --seconds "$(($(left) - 20))" --out "$OUT"
    tell '^#' 20 kernels
}

# --- ---

finish() {
    collect_logs
    echo
    echo "===== Summary, $SECONDS s; results in $OUT ====="
    cat "$SUMMARY"
    if grep -q '^FAIL' "$SUMMARY"; then
        exit 1
    fi
    exit 0
}

[ $# -gt 0 ] || set -- install env together kernels speed
for stage in "$@"; do
    if [ "$(type -t "stage_$stage")" != function ]; then
        echo "Error: no stage '$stage'; see $HERE/run.sh --help." >&2
        exit 2
    fi
done
for stage in "$@"; do
    if [ "$(left)" -lt 10 ]; then
        say "SKIP stage $stage: no time left"
        continue
    fi
    echo "== $stage (at $SECONDS s)"
    "stage_$stage"
    collect_logs
done
finish
