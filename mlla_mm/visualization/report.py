# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Pictures and summary of a finished demo run."""

from pathlib import Path
from typing import List, NamedTuple, Union

from mmengine.config import Config

from ..utils.records import is_number, read_record
from ..utils.text import printable
from .classification import classification_sheet
from .curves import plot_curves
from .detection import detection_sheet
from .segmentation import segmentation_sheet


class Line(NamedTuple):
    """A line of the summary."""

    test: str  # name of the test run, a folder below the work_dir
    metric: str  # name that it logged
    label: str
    digits: int  # decimals
    title: str = ''  # how the title of the predictions says it, if it does


LINES = {
    'mmdet': [
        Line('test', 'coco/bbox_mAP', 'bbox_mAP', 3, 'bbox mAP {}'),
        Line('test', 'coco/segm_mAP', 'segm_mAP', 3, 'segm mAP {}'),
    ],
    'mmseg': [
        Line('test', 'mIoU', 'mIoU', 1, 'mIoU {}'),
        Line('test_tta', 'mIoU', 'mIoU (multi-scale)', 1),
    ],
    'mmpretrain': [
        Line('test', 'accuracy/top1', 'accuracy/top1', 1, 'top-1 accuracy {} %'),
        Line('test_ema', 'accuracy/top1', 'accuracy/top1 (EMA)', 1),
    ],
}
_CURVES = {
    'mmdet': ['coco/bbox_mAP', 'coco/segm_mAP'],
    'mmseg': ['mIoU'],
    'mmpretrain': ['accuracy/top1', 'ema_accuracy/top1'],
}
_SHEETS = {
    'mmdet': (detection_sheet, 'predictions.pkl'),
    'mmseg': (segmentation_sheet, 'predictions'),
    'mmpretrain': (classification_sheet, 'predictions.pkl'),
}


def write_report(cfg: Config, work_dir: Union[str, Path]) -> List[str]:
    """Draw predictions and learning curves of a run and sum up its tests.

    Args:
        cfg (Config): Config of the run.
        work_dir (str | Path): Its work_dir. The folders of :data:`LINES` below it are
            the work_dirs of `tools/test.py`; 'test' holds the predictions too.

    Returns:
        list[str]: The lines of the summary.

    Raises:
        FileNotFoundError: If a test has not been run.
        ValueError: If a file of the run is damaged or something else.
    """
    work_dir = Path(work_dir)
    summary, titles = [], []
    for line in LINES[cfg.default_scope]:
        metric = _newest_value(work_dir / line.test, line.metric)
        value = f'{metric:.{line.digits}f}'
        summary.append(f'{line.label}: {value}')
        if line.title:
            titles.append(line.title.format(value))
    draw, predictions = _SHEETS[cfg.default_scope]
    draw(
        cfg,
        work_dir / 'test' / predictions,
        work_dir / 'predictions.png',
        ', '.join(titles),
    )
    plot_curves(work_dir, _CURVES[cfg.default_scope], work_dir / 'curves.png')
    return [
        *summary,
        f'Predictions and ground truth: {work_dir / "predictions.png"}',
        f'Learning curves: {work_dir / "curves.png"}',
    ]


def _newest_value(test_dir: Path, metric: str) -> float:
    logs = [x for x in test_dir.glob('*/*.json') if x.stem == x.parent.name]
    if not logs:
        raise FileNotFoundError(f'No metrics in {test_dir}: no finished test there.')
    newest = max(logs)
    value = (read_record(newest) or {}).get(metric)
    if not is_number(value):
        raise ValueError(
            f'{printable(newest)} has no number for {metric}. Test again with '
            f'--work-dir {test_dir}'
        )
    return value
