# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Work_dirs as MMEngine and our hooks leave them behind, without the training."""

import json
from pathlib import Path
from typing import Optional

DETECTOR = 'mask-rcnn_mlla-t_fpn_1x_coco'


def add_session(
    work_dir: Path,
    time: str,
    config: str = DETECTOR,
    entries: Optional[list] = None,
    tested: Optional[dict] = None,
    record: Optional[dict] = None,
    **run,
) -> Path:
    """Write what one start of a tool leaves.

    Args:
        work_dir (Path): Made if it does not exist.
        time (str): Name of the session, later ones sort behind earlier ones.
        config (str): Name of a config, without suffix.
        entries (list, optional): Log of a training.
        tested (dict, optional): Metrics of a test.
        record (dict, optional): Content of recipe.json.
        **run: Of run.json, what is not as for a training of 12 epochs.
    """
    session = work_dir / time
    (session / 'vis_data').mkdir(parents=True)
    usual = dict(
        config=config,
        unit='epoch',
        length=12,
        resumed=False,
        checkpoint=None,
        test_time_augmentation=False,
        averaged_weights=False,
    )
    (session / 'vis_data' / 'run.json').write_text(json.dumps({**usual, **run}))
    if entries is not None:
        lines = ''.join(f'{json.dumps(entry)}\n' for entry in entries)
        (session / 'vis_data' / 'scalars.json').write_text(lines)
    if tested is not None:
        (session / f'{time}.json').write_text(json.dumps(tested))
    if record is not None:
        (session / 'recipe.json').write_text(json.dumps(record))
    return session


def coco_metrics(box: float, mask: float) -> dict:
    """Metrics as CocoMetric logs them, AP50 and AP75 as published for MLLA-T 1x."""
    return {
        'coco/bbox_mAP': box,
        'coco/bbox_mAP_50': 0.695,
        'coco/bbox_mAP_75': 0.515,
        'coco/segm_mAP': mask,
        'coco/segm_mAP_50': 0.664,
        'coco/segm_mAP_75': 0.450,
    }


def coco_log(epochs, box: float = 0.468, mask: float = 0.421, per_epoch: int = 4):
    """Log of these epochs; the metrics rise to ``box`` and ``mask`` at epoch 12."""
    entries = []
    for epoch in epochs:
        for i in range(per_epoch):
            step = (epoch - 1) * per_epoch + i + 1
            entries.append(dict(loss=2 / step**0.5, epoch=epoch, iter=step, step=step))
        part = (epoch / 12) ** 0.2
        entries.append(
            dict(
                coco_metrics(round(box * part, 3), round(mask * part, 3)),
                data_time=0.1,
                time=0.1,
                step=epoch,
            )
        )
    return entries
