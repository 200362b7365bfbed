# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Detections beside ground truth."""

from pathlib import Path
from typing import List, Tuple, Union

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from ..utils.images import read_image
from ..utils.text import printable
from .sheet import (
    class_colors,
    draw_instances,
    errors_of_predictions,
    load_predictions,
    new_sheet,
    save_sheet,
    show,
    spread,
)


def detection_sheet(
    cfg: Config,
    predictions: Union[str, Path],
    out: Union[str, Path],
    metrics: str,
    num_images: int = 6,
    score_thr: float = 0.5,
) -> None:
    """Save a sheet of detections beside ground truth.

    Args:
        cfg (Config): Config of the detector; its test set is drawn.
        predictions (str | Path): What `tools/test.py --out` wrote.
        out (str | Path): Picture file to write.
        metrics (str): What the test measured, for the title.
        num_images (int): Number of images, spread over the test set. Defaults to 6.
        score_thr (float): Least score of a detection to draw. Defaults to 0.5.
    """
    init_default_scope('mmdet')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    classes, colors = dataset.metainfo['classes'], class_colors(dataset.metainfo)
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    instances = {info['img_id']: info['instances'] for info in infos}
    results = load_predictions(predictions, dataset)
    chosen = [results[i] for i in spread(len(results), num_images)]
    figure, axes = new_sheet(
        len(chosen),
        ('image', 'ground truth', f'prediction, score > {score_thr:g}'),
        f'{metrics} on {len(results)} validation images',
    )
    for panels, result in zip(axes, chosen):
        image = read_image(result['img_path'], channel_order='rgb')
        for ax in panels:
            show(ax, image)
        with errors_of_predictions(predictions):
            truth = instances[result['img_id']]
        labels = [instance['bbox_label'] for instance in truth]
        draw_instances(
            panels[1],
            [instance['bbox'] for instance in truth],
            [classes[label] for label in labels],
            [colors[label] for label in labels],
            _decode([instance['mask'] for instance in truth], image.shape[:2]),
        )
        with errors_of_predictions(predictions):
            found = result['pred_instances']
            # As many as mmdet finds in an image at most.
            kept = np.flatnonzero(found['scores'] > score_thr)[:100]
            labels = found['labels'][kept].tolist()
            scores = found['scores'][kept].tolist()
            draw_instances(
                panels[2],
                found['bboxes'][kept].tolist(),
                [f'{classes[label]} {p:.2f}' for label, p in zip(labels, scores)],
                [colors[label] for label in labels],
                _decode([found['masks'][i] for i in kept], image.shape[:2]),
            )
    save_sheet(figure, out)


def _decode(masks: List[dict], shape: Tuple[int, int]) -> List[np.ndarray]:
    """Run-length encoded masks to (H, W), bool."""
    from pycocotools import mask as mask_utils

    for mask in masks:
        # Huge ones crash pycocotools.
        if tuple(mask['size']) != shape:
            raise ValueError(
                'A mask is of another size than its image, (height, width) = '
                f'{tuple(map(printable, mask["size"]))} instead of {shape}. Test again.'
            )
    decoded = [mask_utils.decode(mask) for mask in masks]
    # What the runs do not reach is not set.
    if any(mask.max(initial=0) > 1 for mask in decoded):
        raise ValueError('A mask does not fill its image. Test again.')
    return [mask.astype(bool) for mask in decoded]
