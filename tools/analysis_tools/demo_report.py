# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Draw the pictures of a finished demo run and print its summary."""

import argparse
import json
from pathlib import Path

from mlla_mm.engine.config import read_config
from mlla_mm.visualization.curves import plot_curves
from mlla_mm.visualization.detection import detection_sheet

# Metrics of the summary by default scope: logged name and label.
METRICS = {
    'mmdet': {'coco/bbox_mAP': 'bbox_mAP', 'coco/segm_mAP': 'segm_mAP'},
}
SHEETS = {'mmdet': detection_sheet}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of the run')
    parser.add_argument('work_dir', type=Path, help='work_dir of the training')
    parser.add_argument(
        'test_dir', type=Path, help='work_dir of the test, with predictions.pkl'
    )
    return parser.parse_args()


def newest_metrics(test_dir: Path) -> dict:
    """Metrics that the last test run in a work_dir logged."""
    logs = sorted(test_dir.glob('*/*.json'))
    if not logs:
        raise FileNotFoundError(f'No metrics in {test_dir}: no finished test yet?')
    return json.loads(logs[-1].read_text())


def main() -> None:
    args = parse_args()
    cfg = read_config(args.config)
    metrics = METRICS[cfg.default_scope]
    sheet = args.work_dir / 'predictions.png'
    curves = args.work_dir / 'curves.png'
    SHEETS[cfg.default_scope](cfg, args.test_dir / 'predictions.pkl', sheet)
    plot_curves(args.work_dir, list(metrics), curves)
    results = newest_metrics(args.test_dir)
    for name, label in metrics.items():
        print(f'{label}: {results[name]:.3f}')
    print(f'Predictions beside ground truth: {sheet}')
    print(f'Learning curves: {curves}')


if __name__ == '__main__':
    main()
