# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Training samples as the model gets them, with their labels."""

from pathlib import Path
from typing import Callable, Union

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from .segmentation import overlay
from .sheet import enlarge, enlargement, save_sheet

# Draws the labels of a sample on its RGB picture.
Draw = Callable[[np.ndarray, object], np.ndarray]


def training_sheet(
    cfg: Config, out: Union[str, Path], num_images: int = 8, repeat: bool = False
) -> None:
    """Save a sheet of training pictures, as stored beside augmented with labels.

    Shown is what the data set's pipeline makes. What the data preprocessor does with a
    batch comes after it: normalisation, padding, Mixup and CutMix.

    Args:
        cfg (Config): Config of any of the three tasks; its training set is drawn.
        out (str | Path): Picture file to write.
        num_images (int): Number of samples. Defaults to 8.
        repeat (bool): Draw the first sample again and again, instead of samples spread
            over the data set. Defaults to False.

    Raises:
        ValueError: If the config's task is not one of the three, or there is nothing
            to draw.
    """
    if cfg.get('default_scope') not in _DRAWERS:
        raise ValueError(
            f'default_scope must be one of {list(_DRAWERS)}, got '
            f'{cfg.get("default_scope")!r}.'
        )
    if num_images < 1:
        raise ValueError(f'The number of images must be at least 1, got {num_images}.')
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    draw = _DRAWERS[cfg.default_scope](dataset.metainfo)
    last = 0 if repeat else len(dataset) - 1
    pairs = []
    for i in np.linspace(0, last, num_images).astype(int):
        packed = dataset[i]
        sample = packed['data_samples']
        stored = mmcv.imread(sample.img_path, channel_order='rgb')
        # Inputs are (3, H, W), BGR.
        augmented = packed['inputs'].numpy()[::-1].transpose(1, 2, 0)
        stored = enlarge(stored, enlargement(stored.shape[:2]))
        pairs.append((stored, draw(np.ascontiguousarray(augmented), sample)))
    save_sheet(pairs, ('as stored', 'augmented, with labels'), out)


def _detection_drawer(metainfo: dict) -> Draw:
    from mmdet.models.utils import mask2ndarray
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer
    from mmengine.structures import InstanceData

    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = metainfo

    def draw(image: np.ndarray, sample: DetDataSample) -> np.ndarray:
        factor = enlargement(image.shape[:2])
        instances = sample.gt_instances
        enlarged = InstanceData(
            bboxes=instances.bboxes.tensor * factor, labels=instances.labels
        )
        if 'masks' in instances:
            masks = mask2ndarray(instances.masks).astype(bool)
            enlarged.masks = masks.repeat(factor, axis=1).repeat(factor, axis=2)
        visualizer.add_datasample(
            'sample',
            enlarge(image, factor),
            DetDataSample(gt_instances=enlarged),
            draw_pred=False,
        )
        return visualizer.get_image()

    return draw


def _segmentation_drawer(metainfo: dict) -> Draw:
    palette = np.array(metainfo['palette'], dtype=np.float32)

    def draw(image: np.ndarray, sample) -> np.ndarray:
        return overlay(image, sample.gt_sem_seg.data[0].numpy(), palette)

    return draw


def _classification_drawer(metainfo: dict) -> Draw:
    from mmpretrain.visualization import UniversalVisualizer

    visualizer = UniversalVisualizer()

    def draw(image: np.ndarray, sample) -> np.ndarray:
        image = enlarge(image, enlargement(image.shape[:2]))
        return visualizer.visualize_cls(
            image, sample, classes=metainfo.get('classes'), draw_pred=False
        )

    return draw


_DRAWERS = {
    'mmdet': _detection_drawer,
    'mmseg': _segmentation_drawer,
    'mmpretrain': _classification_drawer,
}
