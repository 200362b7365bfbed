#!/usr/bin/env bash
# From nothing to a trained model: set up, make the digits data, train, evaluate, draw.
# Usage: tools/quickstart.sh [detection|segmentation|classification] [-v]
# Run again, it goes on from where it was and reuses what is there. -v shows all that the
# log files have.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VERBOSE=
if [ "${*: -1}" = -v ]; then
    VERBOSE=1
    set -- "${@:1:$#-1}"
fi
TASK=${1:-detection}
OUT=predictions.pkl
case $TASK in
detection)
    CONFIG=configs/detection/mask-rcnn_mlla-nano_fpn_digits.py
    FORMAT=coco
    NEXT=configs/detection/mask-rcnn_mlla-t_fpn_1x_coco.py
    ;;
segmentation)
    CONFIG=configs/segmentation/upernet_mlla-nano_digits.py
    FORMAT=ade20k
    OUT=predictions
    NEXT=configs/segmentation/upernet_mlla-b_8xb2-160k_ade20k-512x512.py
    ;;
classification)
    CONFIG=configs/classification/mlla-nano_digits.py
    FORMAT=imagenet
    NEXT=configs/classification/mlla-t_8xb128_in1k.py
    ;;
*)
    echo "Error: no task '$TASK'; there are detection, segmentation, classification." >&2
    exit 2
    ;;
esac
WORK_DIR=work_dirs/$(basename "$CONFIG" .py)

step() {
    echo
    echo "== $* ($(date +%T))"
}

# Usage: evaluate NAME [arguments of tools/test.py]
evaluate() {
    bash tools/dist_test.sh "$CONFIG" "$CHECKPOINT" "$PROCESSES" \
        --work-dir "$WORK_DIR/$1" ${VERBOSE:+-v} "${@:2}"
}

start=$SECONDS
step '1/5 Set-up'
source tools/misc/setup_env.sh
setup_time=$((SECONDS - start))

step '2/5 Digits data'
python tools/dataset_tools/make_digits.py "data/digits_$FORMAT" --format "$FORMAT"

# 1, 2 or 4 GPUs, so that they divide the batch; without any, 2 processes on the CPU.
# The batch size of the recipe, however many processes share it.
read -r PROCESSES BATCH_SIZE < <(python -c "
import torch
from mmengine.config import Config

gpus = torch.cuda.device_count()
processes = 2 if gpus == 0 else 4 if gpus >= 4 else 2 if gpus >= 2 else 1
config = Config.fromfile('$CONFIG', import_custom_modules=False)
print(processes, config.auto_scale_lr.base_batch_size // processes)")
step "3/5 Training in $PROCESSES processes; \"eta\" in the log is the time left"
start=$SECONDS
if [ -f "$WORK_DIR/finished" ]; then
    echo "Reusing $WORK_DIR; remove that folder to train again."
else
    bash tools/dist_train.sh "$CONFIG" "$PROCESSES" --seed 0 --resume auto \
        ${VERBOSE:+-v} --cfg-options "train_dataloader.batch_size=$BATCH_SIZE"
    touch "$WORK_DIR/finished"
fi
train_time=$((SECONDS - start))
CHECKPOINT=$(cat "$WORK_DIR/last_checkpoint")

step '4/5 Evaluation on digits that were not trained on'
start=$SECONDS
mkdir -p "$WORK_DIR/test"
evaluate test --out "$WORK_DIR/test/$OUT"
case $TASK in
segmentation) evaluate test_tta --tta ;;
classification) evaluate test_ema --ema ;;
esac
test_time=$((SECONDS - start))

step '5/5 Pictures and summary'
python tools/analysis_tools/demo_report.py "$CONFIG" "$WORK_DIR" | tee "$WORK_DIR/summary.txt"
echo "Time: set-up ${setup_time} s, training ${train_time} s, evaluation ${test_time} s"
echo "Checkpoint: $CHECKPOINT"
echo "Next: get the data and weights as README.md says, then"
[ "${VIRTUAL_ENV:-}" != "$PWD/.venv" ] || echo "    source .venv/bin/activate"
echo "    bash tools/dist_train.sh $NEXT 8"
