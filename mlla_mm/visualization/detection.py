# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Detections beside ground truth."""

from pathlib import Path
from typing import List, Tuple, Union

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import InstanceData

from .sheet import enlarge, enlargement, save_sheet


def detection_sheet(
    cfg: Config,
    predictions: Union[str, Path],
    out: Union[str, Path],
    num_images: int = 8,
    score_thr: float = 0.5,
) -> None:
    """Save a sheet of detections beside ground truth.

    Args:
        cfg (Config): Config of the detector; its test set is drawn.
        predictions (str | Path): What `tools/test.py --out` wrote.
        out (str | Path): Picture file to write.
        num_images (int): Number of images, spread over the test set. Defaults to 8.
        score_thr (float): Least score of a detection to draw. Defaults to 0.5.
    """
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer

    init_default_scope('mmdet')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    instances = {info['img_id']: info['instances'] for info in infos}
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dataset.metainfo
    results = load(predictions)
    pairs: List[Tuple[np.ndarray, np.ndarray]] = []
    for i in np.linspace(0, len(results) - 1, num_images).astype(int):
        result = results[i]
        image = mmcv.imread(result['img_path'], channel_order='rgb')
        factor = enlargement(image.shape[:2])
        image = enlarge(image, factor)
        truth = DetDataSample(
            gt_instances=_ground_truth(instances[result['img_id']], factor)
        )
        found = DetDataSample(pred_instances=_detections(result, factor))
        visualizer.add_datasample('truth', image, truth, draw_pred=False)
        left = visualizer.get_image()
        visualizer.add_datasample(
            'found', image, found, draw_gt=False, pred_score_thr=score_thr
        )
        pairs.append((left, visualizer.get_image()))
    save_sheet(pairs, ('ground truth', f'detections, score > {score_thr:g}'), out)


def _ground_truth(instances: List[dict], factor: int) -> InstanceData:
    boxes = [instance['bbox'] for instance in instances]
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) * factor,
        labels=torch.tensor([instance['bbox_label'] for instance in instances]),
        masks=_decode([instance['mask'] for instance in instances], factor),
    )


def _detections(result: dict, factor: int) -> InstanceData:
    found = result['pred_instances']
    return InstanceData(
        bboxes=found['bboxes'] * factor,
        scores=found['scores'],
        labels=found['labels'],
        masks=_decode(found['masks'], factor),
    )


def _decode(masks: List[dict], factor: int) -> np.ndarray:
    """Run-length encoded masks to (n, H, W), bool."""
    from pycocotools import mask as mask_utils

    if not masks:
        return np.zeros((0, 1, 1), dtype=bool)
    decoded = [mask_utils.decode(mask).astype(bool) for mask in masks]
    return np.stack(decoded).repeat(factor, axis=1).repeat(factor, axis=2)
