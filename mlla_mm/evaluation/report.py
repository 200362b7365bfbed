# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Pictures and summary of a finished demo run."""

from pathlib import Path
from typing import List, NamedTuple, Union

from mmengine.config import Config
from mmengine.registry import init_default_scope

from ..checkpoints.reader import load_pickle_file
from ..datasets.corrupt_images import CheckedDataset
from ..utils.records import is_number, read_record
from ..utils.text import printable
from ..visualization import predictions as sheets
from ..visualization.curves import plot_curves
from .runs import read_run


class Line(NamedTuple):
    """A line of the summary.

    Attributes:
        test (str): Name of the test run, a folder below the work_dir.
        metric (str): Name under which the test logged the metric.
        label (str): Name in the summary.
        digits (int): Decimals.
        title (str): Text for the title of the predictions. Empty if it leaves the
            metric out.
    """

    test: str
    metric: str
    label: str
    digits: int
    title: str = ''


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


def write_report(cfg: Config, work_dir: Union[str, Path]) -> List[str]:
    """Draw predictions and learning curves of a run, and sum up its tests.

    Args:
        cfg (Config): Config of the run.
        work_dir (str | Path): Its work_dir. The folders of :data:`LINES` below it are
            the work_dirs of ``tools/test.py``. The predictions are in 'test'.

    Returns:
        list[str]: The lines of the summary.

    Raises:
        FileNotFoundError: If the training or a test has not been run.
        CheckpointError: If the file of predictions is damaged, or holds more than data.
        ValueError: If another file of the run is damaged, or of another run, or a curve
            was not logged.
    """
    work_dir = Path(work_dir)
    scope = cfg.default_scope
    summary, titles = [], []
    for line in LINES[scope]:
        metric = _newest_value(work_dir / line.test, line.metric)
        value = f'{metric:.{line.digits}f}'
        summary.append(f'{line.label}: {value}')
        if line.title:
            titles.append(line.title.format(value))
    picture, curves = work_dir / 'predictions.png', work_dir / 'curves.png'
    _draw_predictions(
        cfg, work_dir / 'test' / 'predictions', picture, ', '.join(titles)
    )
    run = read_run(work_dir)
    missing = [name for name in ('loss', *_CURVES[scope]) if name not in run.curves]
    if missing:
        there = [printable(name) for name in run.curves]
        raise ValueError(f'Not logged in {work_dir}: {missing}; there: {there}')
    plot_curves(run.curves, _CURVES[scope], curves)
    return [
        *summary,
        f'Predictions and ground truth: {picture}',
        f'Learning curves: {curves}',
    ]


def _draw_predictions(cfg: Config, path: Path, out: Path, title: str) -> None:
    init_default_scope(cfg.default_scope)
    dataset = CheckedDataset(cfg.test_dataloader.dataset)
    if cfg.default_scope == 'mmseg':
        sheets.segmentation_sheet(dataset, path, out, title)
        return
    path = path.with_suffix('.pkl')
    is_detector = cfg.default_scope == 'mmdet'
    draw = sheets.detection_sheet if is_detector else sheets.classification_sheet
    try:
        draw(dataset, load_pickle_file(path), out, title)
    except sheets.PredictionsError as error:
        raise ValueError(
            f'{printable(path)} {error}. Test again with --out {printable(path)}'
        ) from error


def _newest_value(test_dir: Path, metric: str) -> float:
    """A metric of the newest test in a folder."""
    logs = [x for x in test_dir.glob('*/*.json') if x.stem == x.parent.name]
    if not logs:
        raise FileNotFoundError(f'No metrics in {test_dir}: no finished test there.')
    newest = max(logs)
    value = (read_record(newest) or {}).get(metric)
    if value is None or not is_number(value):
        raise ValueError(
            f'{printable(newest)} has no number for {metric}. Test again with '
            f'--work-dir {test_dir}'
        )
    return value
